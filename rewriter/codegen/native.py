"""Attention over listed blocks of keys in generated C++: rendered, built by the machine's own compiler, and called.

    kernel = load(Spec(head_dim=64, v_head_dim=64, mask="j <= i && i - j < 256"))
    if isinstance(kernel, Kernel):  # else a refusal, for example without a compiler
        out = kernel(query, key, value, first, runs, scale=0.125)

Forward only. A build takes a second or two, once for each source text, compiler and torch: `cache_dir("native")`. Half
of it would be the reading of PyTorch's headers, so g++ is given them read, 90 MB in the same folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rewriter.cache import cache_dir
from rewriter.codegen.source import rendered, stored
from rewriter.errors import OptionError
from rewriter.site import Refusal

_ELEMENTS = {"float32": "float", "bfloat16": "at::BFloat16"}
_FLOATING = _ELEMENTS | {"float16": "at::Half", "float64": "double"}
_CAPTURED = _FLOATING | {"bool": "bool", "uint8": "uint8_t", **{f"int{n}": f"int{n}_t" for n in (8, 16, 32, 64)}}
_NORMALISERS = ("softmax", "sigmoid", "relu")
_TORCH = Path(torch.__file__).parent
_LINKS = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
_HEADERS = (
    "ATen/Parallel.h",
    "ATen/native/CPUBlas.h",
    "algorithm",
    "atomic",
    "bit",
    "cmath",
    "memory",
    "string",
    "vector",
)
_FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", "-w")
# Of fast mathematics what vector code and sums in any order need: infinities and NaN keep their meaning.
_FAST = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
# Named one by one where `-march=native` would do, as folders of caches are shared between machines.
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the source is made from.

    mask        a C++ expression that is true where query position `i` sees key position `j` (int64_t), for batch row
                `b` and head `h`; `i` is aligned at the end: row + kv_len - q_len. Read in the partial blocks only
    score       a C++ expression for the new score, from the scaled one `s` (float) and the same four
    keyed       C++ expressions of `j` alone, integers, computed once for all queries of a block: `mask` and `score`
                read the first as `keyed0`
    captures    (name, dtype as torch prints it, rank from 1) of tensors that both may read, as in `padding(b, j)`
    parts       so many parts of the queries of a block have lists of their own. Products are of all parts from the
                first to the last that visit a key, so what a list leaves out `mask` must hide, too
    ordered     tokens stand in another order than they lie in: a call says where each lies
    width       how many scores of a query are held at a time
    wide        products of matrices take float32 in place of a narrower `dtype`, as `load` has it on CPUs without one

    Both may also read `q_len` and `kv_len` and call exp, exp2, tanh, sigmoid and abs, which become vector code.
    """

    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    mask: str | None = None
    score: str | None = None
    keyed: tuple[str, ...] = ()
    normaliser: str = "softmax"
    captures: tuple[tuple[str, str, int], ...] = ()
    block_m: int = 64
    block_n: int = 64
    parts: int = 1
    width: int = 512
    wide: bool = False
    ordered: bool = False

    @property
    def listed(self) -> int:
        """Queries that share a list of keys."""
        return self.block_m // self.parts

    def refusal(self) -> Refusal | None:
        """What there is no source for."""
        reason = ""
        if self.dtype not in _ELEMENTS:
            reason = f"generated C++ is for {' and '.join(_ELEMENTS)}, and this is {self.dtype}"
        elif self.normaliser not in _NORMALISERS:
            reason = f"the normaliser {self.normaliser!r} is none of {', '.join(_NORMALISERS)}"
        elif not (1 <= self.head_dim <= 256 and 1 <= self.v_head_dim <= 256):
            reason = f"heads of {self.head_dim} and {self.v_head_dim} are outside of 1 to 256"
        elif self.block_m < 1 or self.block_n < 16 or self.block_n % 16 or self.width < 1 or self.width % self.block_n:
            reason = f"blocks of {self.block_m} x {self.block_n} in {self.width} scores do not fit vectors of 16"
        elif self.parts < 1 or self.block_m % self.parts:
            reason = f"{self.block_m} queries cannot be divided in {self.parts} equal parts"
        for name, dtype, rank in self.captures:
            if not name.isidentifier() or dtype not in _CAPTURED or rank < 1:
                reason = f"a captured tensor {name!r} of {dtype} and rank {rank} has no form in C++"
        return Refusal(reason) if reason else None


def source(spec: Spec) -> str:
    """The translation unit, readable."""
    values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["title"] = ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ()))
    values["head_dim"] = _padded(spec)
    values["dtype"] = _ELEMENTS[spec.dtype]
    values["captures"] = [(name, _CAPTURED[dtype], rank) for name, dtype, rank in spec.captures]
    return rendered("softmax.cpp.jinja", **values, floating=[*_FLOATING.values()])


def compiler() -> str | None:
    """The path of the C++ compiler that would be used, if there is one."""
    named = os.environ.get("CXX")
    return next((found for word in ([named] if named else ["g++", "clang++"]) if (found := shutil.which(word))), None)


def build(text: str) -> Path | Refusal:
    """The shared library of a source text, from the cache where it is there."""
    cxx = compiler()
    if cxx is None:
        return Refusal("there is no C++ compiler (g++, clang++ or $CXX), so no kernel can be generated in C++")
    flags = [*_FLAGS, *_FAST, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    name = sha256("\n".join([text, cxx, *flags, torch.__version__]).encode()).hexdigest()[:24]
    folder = cache_dir("native")
    library = folder / f"{name}.so"
    if library.exists():
        return library
    try:
        unit, command = stored(text, "native", ".cpp"), [cxx, *flags, f"-I{_TORCH / 'include'}"]
        refused = _built(library, [*command, *_headers(command), str(unit), *_LINKS])
    except OSError as cause:
        return Refusal(f"no kernel can be kept in {folder}: {cause.strerror}")
    return library if refused is None else refused


def _built(made: Path, command: list[str]) -> Refusal | None:
    with TemporaryDirectory(dir=cache_dir("native")) as scratch:  # others may be building the same
        fresh = Path(scratch) / made.name
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return Refusal(f"{command[0]} could not build {made}: {lines[0].strip() if lines else 'no message'}")
        fresh.replace(made)
    return None


def _headers(command: list[str]) -> list[str]:
    """The option by which a compiler finds the headers of all kernels, read already if it is g++."""
    header = stored("".join(f"#include <{name}>\n" for name in _HEADERS), "native", ".h")
    folder = header.with_suffix(".h.gch")  # g++ takes what suits its options from a folder of this name
    read = folder / sha256("\n".join([*command, torch.__version__]).encode()).hexdigest()[:24]
    if not read.exists():
        folder.mkdir(exist_ok=True)
        _built(read, [*command, "-x", "c++-header", str(header)])
    return ["-include", str(header)]


@cache
def load(spec: Spec) -> Kernel | Refusal:
    """The kernel of a spec, built if need be. A refusal says what is missing, or what the compiler did not take."""
    if (refusal := spec.refusal()) is not None:
        return refusal
    if spec.dtype != "float32" and not multiplies(spec.dtype):
        spec = replace(spec, wide=True)
    loaded = _loaded(spec)
    if isinstance(loaded, Refusal):
        return loaded
    if not loaded.rewriter_supported():
        return Refusal(f"this CPU, as oneDNN sees it, has no product of matrices in {spec.dtype}")
    entry = loaded.rewriter_attend
    entry.restype = ctypes.c_char_p
    entry.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64), ctypes.c_float]
    return Kernel(spec, entry)


def _loaded(spec: Spec) -> ctypes.CDLL | Refusal:
    return opened(source(spec))


def opened(text: str) -> ctypes.CDLL | Refusal:
    """The library of a source text, built if need be, in this process."""
    library = build(text)
    if isinstance(library, Refusal):
        return library
    try:
        return ctypes.CDLL(str(library))
    except OSError as cause:
        return Refusal(f"{library} cannot be loaded: {cause}")


def called(text: str, name: str) -> ctypes._NamedFuncPointer | Refusal:
    """A function of such a library that takes a list of pointers and one of numbers, and returns what went wrong."""
    library = opened(text)
    if isinstance(library, Refusal):
        return library
    entry: ctypes._NamedFuncPointer = getattr(library, name)
    entry.restype = ctypes.c_char_p
    entry.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64)]
    return entry


@cache
def multiplies(dtype: str) -> bool:
    """Has this CPU products of matrices in this type? A small kernel is built to ask: oneDNN has no other answer."""
    asked = _loaded(Spec(head_dim=16, v_head_dim=16, dtype=dtype))
    return isinstance(asked, Refusal) or bool(asked.rewriter_supported())


@dataclass(frozen=True)
class Kernel:
    """A built kernel, to be called on tensors."""

    spec: Spec
    entry: ctypes._NamedFuncPointer

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        runs: Tensor,
        *,
        scale: float,
        sink: Tensor | None = None,
        captures: Sequence[Tensor] = (),
        lse: Tensor | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, H, Sq, Dv).

        query (B, H, Sq, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv), H a multiple of Hkv
        first       int32 (1 or B, 1 or H, ceil(Sq / spec.listed) + 1): the runs of part m are first[m] to first[m + 1]
        runs        int32 (n, 3): first key block, one past the last, and whether `mask` has to be read. No key twice
        sink        float32 (H,): one more logit in the sum, without a value
        captures    in the order of `spec.captures`, with all of their axes as long as their indices go
        lse         float32 (B, H, Sq), contiguous: takes the logarithm of the sum of each softmax, -inf for nothing
        places      of an `ordered` spec: where the queries, and where the keys, lie that the masks, the scores and the
                    lists of blocks speak of, int32; -1 for one that is zeros and lies nowhere. Each query once
        """
        spec = self.spec
        self._check(query, key, value, first, runs, sink, captures, lse, places)
        if scale <= 0:  # the kernel takes the maximum before it scales
            query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
        if lacking := _padded(spec) - spec.head_dim:
            query, key = (torch.nn.functional.pad(t, (0, lacking)) for t in (query, key))
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        captures = [t if t.stride(-1) == 1 else t.contiguous() for t in captures]
        (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
        first, runs = first.expand(batch, heads, -1), runs.contiguous()
        # Rows of (B, S, H, D), as the projection that follows reads them.
        out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
        if 0 in (batch, heads, q_len, kv_len):
            raise OptionError("a kernel needs queries and keys, at least one of each")
        sink = None if sink is None else sink.contiguous()
        if places is not None:
            q_len, kv_len = map(len, places)
        tensors = [query, key, value, out, lse, sink, first, runs, *(places or (None, None)), *captures]
        sizes = [batch, heads, kv_heads, q_len, kv_len]
        for t in (query, key, value, out):
            sizes += t.stride()[:3]
        sizes += first.stride()[:2]
        for t in captures:
            sizes += [0 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)]
            sizes += t.shape
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        error = self.entry(
            (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_float(scale)
        )
        if error:
            raise RuntimeError(error.decode())
        return out

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        runs: Tensor,
        sink: Tensor | None,
        captures: Sequence[Tensor],
        lse: Tensor | None,
        places: tuple[Tensor, Tensor] | None,
    ) -> None:
        """What would otherwise be read outside of its memory."""
        spec = self.spec
        batch, heads, q_len, _ = query.shape
        q_len = len(places[0]) if places else q_len
        blocks = -(-q_len // spec.listed)
        wrong = ""
        dtypes = {str(t.dtype).removeprefix("torch.") for t in (query, key, value)}
        if dtypes != {spec.dtype} or query.device.type != "cpu":
            wrong = f"a kernel for {spec.dtype} on the CPU was given {', '.join(sorted(dtypes))} on {query.device}"
        elif key.shape[0] != batch or heads % key.shape[1] or key.shape[:3] != value.shape[:3]:
            wrong = f"shapes {(*query.shape,)}, {(*key.shape,)} and {(*value.shape,)} are not those of one attention"
        elif (query.shape[3], key.shape[3], value.shape[3]) != (spec.head_dim, spec.head_dim, spec.v_head_dim):
            wrong = f"a kernel for heads of {spec.head_dim} and {spec.v_head_dim} was given others"
        elif first.dtype != torch.int32 or runs.dtype != torch.int32 or runs.shape[1:] != (3,):
            wrong = "lists of blocks are int32, and a run is three numbers"
        elif first.shape[0] not in (1, batch) or first.shape[1] not in (1, heads) or first.shape[2] != blocks + 1:
            wrong = f"{q_len} queries in blocks of {spec.listed} need {blocks + 1} offsets, not {(*first.shape,)}"
        elif first.stride(2) != 1:
            wrong = "the offsets of one head do not lie side by side"
        elif sink is not None and (sink.dtype != torch.float32 or sink.shape != (heads,)):
            wrong = f"a sink is float32, one for each of {heads} heads"
        elif (sink is not None or lse is not None) and spec.normaliser != "softmax":
            wrong = f"sinks and the logarithm of a sum are a softmax's, and not for the normaliser {spec.normaliser}"
        elif lse is not None and not (
            lse.dtype == torch.float32 and lse.shape == query.shape[:3] and lse.is_contiguous()
        ):
            wrong = "the logarithms are float32, one for each query, and contiguous"
        elif spec.ordered != (places is not None) or (spec.ordered and lse is not None):
            wrong = "places are given where the spec is ordered, and then no logarithms"
        elif places and not all(
            at.dtype == torch.int32 and at.is_contiguous() and int(at.max()) < t.shape[2]
            for at, t in zip(places, (query, key), strict=True)
        ):
            wrong = "places are int32, side by side, and inside of their tensor"
        elif [(str(t.dtype).removeprefix("torch."), t.dim()) for t in captures] != [c[1:] for c in spec.captures]:
            wrong = f"the captured tensors are not those of {spec.captures}"
        elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *captures)):
            wrong = "generated C++ has no backward: call it under torch.no_grad()"
        if wrong:
            raise OptionError(wrong)


def _padded(spec: Spec) -> int:
    """The head size that the kernel works on: products in bfloat16 take pairs."""
    return spec.head_dim + spec.head_dim % 2 if spec.dtype == "bfloat16" and not spec.wide else spec.head_dim
