"""Kernels for machines that are not here: one Triton kernel compiled for a named target, and what is in the binary."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.jit import JITFunction

from rewriter.codegen.disassembly import Counts, analysed, gcn, sass
from rewriter.errors import OptionError, RewriterError, brief

# Shared memory that one block may use, in KiB: NVIDIA's table of compute capabilities, AMD's LDS. Other targets are
# refused, because LLVM ends the whole process where it is asked for one that it cannot select instructions for.
SHARED_KIB = {
    **{"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227},
    **{"sm_100": 227, "sm_103": 227, "sm_120": 99, "sm_121": 99},
    **{"gfx90a": 64, "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1101": 64, "gfx1200": 64, "gfx1201": 64},
}
TENSOR_MEMORY_COLUMNS = 512  # of sm_10x
REGISTERS = 255  # of a thread
THREADS = 1024  # of a block, everywhere

log = logging.getLogger(__name__)


class CompileError(RewriterError):
    """A kernel cannot be compiled for a target, or would not fit on it."""


@dataclass(frozen=True)
class Binary:
    """One kernel as compiled for one target.

    `registers` are those of a thread, `shared` and `shared_limit` the bytes of a block. `code` is all that can be
    reached from the entry. `loops` are the innermost loops that hold a tensor-core or an exp instruction, in the order
    of the listing; waits that spin are part of the loop around them. Warp-specialised kernels have one for each role.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    registers: int
    shared: int
    shared_limit: int
    code: Counts
    loops: tuple[Counts, ...]

    @property
    def spills(self) -> int:
        """Bytes a thread, stores and loads together."""
        return self.code.spill_stores + self.code.spill_loads

    @property
    def loop(self) -> Counts | None:
        """The main loop: the one with the most tensor-core instructions, and of equals the shortest: not the masked."""
        return min(self.loops, key=lambda c: (-c.tensor, c.instructions), default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the main loop beside all loops."""
        return {**asdict(self), "loop": None if self.loop is None else asdict(self.loop)}

    def row(self) -> dict[str, str]:
        """One line of a table, column by column. The loop: its instructions, and those on tensor cores among them."""
        loop = "none" if self.loop is None else f"{self.loop.instructions} ({self.loop.tensor} tensor)"
        return {
            "target": self.target,
            "registers": f"{self.registers}",
            "spills": f"{self.spills} B" if self.spills else "none",
            "shared": f"{self.shared / 1024:.4g} of {self.shared_limit / 1024:.4g} KiB",
            "tensor core": _listed(self.code.tensor_core),
            "exp": f"{self.code.exp}",
            "global loads": _listed(self.code.global_loads),
            "shared loads": _listed(self.code.shared_loads),
            "instructions": f"{self.code.instructions}",
            "main loop": loop,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel and what its arguments are, as `compile_ahead` wants to know them."""

    kernel: JITFunction[Any]
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: Collection[str] = ()

    def compiled(self, target: str, **options: Any) -> Binary:
        """What it is on this target; raises as `compile_ahead` does."""
        return compile_ahead(self.kernel, self.signature, self.constants, target, divisible=self.divisible, **options)


def parse_target(name: str) -> GPUTarget:
    """`sm_90` or `gfx942` as Triton's target. OptionError where the name has neither form."""
    if match := re.fullmatch(r"sm_(\d{2,3})", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if match := re.fullmatch(r"gfx(\d{1,2})[0-9a-f]{2}", name):
        return GPUTarget("hip", name, 32 if int(match[1]) >= 10 else 64)  # GCN and CDNA run 64 threads a wave
    raise OptionError(f"The target {name!r} has to be sm_NN or gfxNNN, such as {', '.join(SHARED_KIB)}.")


def compile_ahead(
    kernel: JITFunction[Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: Collection[str] = (),
    **options: Any,
) -> Binary:
    """Compile for `target` without the device.

    `signature` gives the types of what is passed at run time (`*fp16`, `i32`, `fp32`), `constants` the values of all
    other arguments, `divisible` those of the first that are multiples of 16, as a launch would find out by itself.
    `options` are the backend's own, such as maxnreg or waves_per_eu. CompileError in one sentence where it fails or
    where the result would not fit on the target; OptionError where the arguments do not make sense.
    """
    where = parse_target(target)
    if target not in SHARED_KIB:
        raise OptionError(f"The limits of {target} are not known, only those of {', '.join(SHARED_KIB)}.")
    if not isinstance(kernel, JITFunction):
        raise CompileError("Triton runs its interpreter (TRITON_INTERPRET=1), which cannot compile: unset it first.")
    _check(kernel, signature, constants, divisible)
    name = kernel.__name__
    if num_warps * where.warp_size > THREADS:
        raise CompileError(f"{name} for {target}: {num_warps} warps of {where.warp_size} are over {THREADS} threads.")
    index = {argument: place for place, argument in enumerate(kernel.arg_names)}
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    attributes = {(index[argument],): [["tt.divisibility", 16]] for argument in divisible}
    chosen = {"num_warps": num_warps, "num_stages": num_stages, **options}
    with _quiet() as said:
        try:
            unknown = options.keys() - vars(make_backend(where).parse_options({})).keys()
            if not unknown:
                source = ASTSource(kernel, types, dict(constants), attributes)
                compiled = triton.compile(source, target=where, options=chosen)
        except Exception as error:
            raise CompileError(f"{name} for {target} does not compile: {_cause(error, said())}.") from error
    if unknown:
        raise OptionError(f"{target} has no option {', '.join(sorted(unknown))}.")
    limit = SHARED_KIB[target] * 1024
    if compiled.metadata.shared > limit:
        needed = f"{compiled.metadata.shared / 1024:.4g} KiB of shared memory"
        raise CompileError(f"{name} needs {needed} and {target} has {limit // 1024}: smaller blocks or fewer stages.")
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY_COLUMNS:
        needed = f"{columns} columns of tensor memory"
        raise CompileError(f"{name} needs {needed} and {target} has {TENSOR_MEMORY_COLUMNS}: smaller blocks.")
    read = _amd if where.backend == "hip" else _nvidia
    registers, code, loops = read(name, compiled.asm)
    return Binary(name, target, num_warps, num_stages, registers, compiled.metadata.shared, limit, code, loops)


def _check(
    kernel: JITFunction[Any], signature: Mapping[str, str], constants: Mapping[str, Any], divisible: Collection[str]
) -> None:
    """Each argument once, and nothing else."""
    both = signature.keys() & constants.keys()
    missing = [argument for argument in kernel.arg_names if argument not in signature and argument not in constants]
    strange = [*((signature.keys() | constants.keys()) - {*kernel.arg_names}), *({*divisible} - signature.keys())]
    for names, fault in ((both, "typed and constant"), (missing, "neither typed nor constant"), (strange, "unknown")):
        if names:
            raise OptionError(f"Of the arguments of {kernel.__name__}, {', '.join(sorted(names))}: {fault}.")


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Catch what Triton prints, below Python too: where a pass fails, the cause is only there."""
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            if text := said():
                log.debug("Triton said: %s", text)


def _cause(error: Exception, said: str) -> str:
    """The line that says why: the assembler's own, else the first error that a pass named, else the exception's."""
    lines = f"{error}\n{said}".splitlines()
    for pattern in (r"ptxas (?:fatal|error)\s*: (.+)", r"\berror: (?!Failures have been)(.+)", r"Assertion [`']?(.+)"):
        if match := next(filter(None, (re.search(pattern, line) for line in lines)), None):
            return match[1][:200].rstrip(".")
    while isinstance(error, CompilationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # in a function that the kernel calls
    if isinstance(error, CompilationError):  # it begins with the source, and a caret under the place
        return next((line for line in reversed(str(error).splitlines()) if line.strip(" ^")), "no reason given")[:200]
    return brief(error).rstrip(".")


def _nvidia(name: str, assembly: Mapping[str, Any]) -> tuple[int, Counts, tuple[Counts, ...]]:
    """Registers, the whole and the loops, by the disassemblers that come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(assembly["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file)
        listing = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", file)
    registers = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1]), *analysed(name, listing, sass)


def _amd(name: str, assembly: Mapping[str, Any]) -> tuple[int, Counts, tuple[Counts, ...]]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly["amdgcn"])
    assert registers is not None
    return int(registers[1]), *analysed(name, assembly["amdgcn"], gcn)


def _tool(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _listed(counted: Mapping[str, int]) -> str:
    """`16 x 128, 4 x 32`: the most frequent first."""
    ordered = sorted(counted.items(), key=lambda item: -item[1])
    return ", ".join(f"{number} x {key}" for key, number in ordered) or "none"
