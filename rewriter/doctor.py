"""Is this machine ready? Versions, device, compilers and caches, one line each."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.cache import cache_dir
from rewriter.codegen import native
from rewriter.convert.checkpoint import cause
from rewriter.target import Target, multiplies_bfloat16
from rewriter.variant import variants


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, whether it is as it should be, and what was found."""

    name: str
    ok: bool
    found: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def examine(compile_probe: bool = True) -> Iterator[Check]:
    """All checks, one by one; the inductor is tried on a real function unless `compile_probe` is off."""
    yield Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package, need in (("torch", True), ("transformers", True), ("triton", torch.cuda.is_available())):
        yield _version(package, need)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    yield Check("device", True, f"{device} ({name})")
    yield Check("capability", True, Target.current(device).capability)
    if device == "cpu" and not multiplies_bfloat16():
        yield Check("bfloat16", True, "emulated by this CPU: models are faster in float32")
    compiler = native.compiler()
    without = "no g++, clang++ or $CXX: kernels in C++ and torch.compile's inductor are out of reach, PyTorch's remain"
    yield Check("C++ compiler", compiler is not None, compiler or without)
    if compile_probe:
        yield _probe("inductor", _inductor_works)
    yield _probe("variants", lambda: ", ".join(variants()))
    for title, folder in caches().items():
        yield Check(title, True, f"{folder} ({size(folder)})")


def caches() -> dict[str, Path]:
    """The folders that fill up with use."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_dir

    triton = os.environ.get("TRITON_CACHE_DIR")
    return {
        "rewriter cache": cache_dir(),
        "inductor cache": Path(inductor_dir()),
        "triton cache": Path(triton) if triton else Path.home() / ".triton" / "cache",
    }


def size(folder: Path) -> str:
    """How much a folder holds, for a person."""
    if not folder.is_dir():
        return "not there yet"
    amount = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _version(package: str, needed: bool) -> Check:
    try:
        return Check(package, True, torch.__version__ if package == "torch" else importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Check(package, not needed, f"not installed: run `pip install {package}`" if needed else "not installed")


def _probe(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, True, work())
    except Exception as error:
        return Check(name, False, f"not usable: {cause(error)}")


def _inductor_works() -> str:
    from torch._dynamo import config as dynamo_config

    with dynamo_config.patch(suppress_errors=False):
        double = torch.compile(lambda x: x * 2 + 1, backend="inductor", dynamic=False)
        if not bool((double(torch.ones(64)) == 3).all()):
            raise RuntimeError("it compiles, but the result is wrong")
    return "compiles, and the result is right"
