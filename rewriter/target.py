"""The machine that the code will run on."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import device as Device


@dataclass(frozen=True, kw_only=True)
class Target:
    """Device, its capability and the versions that decide which code is generated and how fast it runs."""

    device: str
    processor: str
    capability: str
    torch: str
    triton: str | None
    threads: int

    @staticmethod
    def current(device: str | Device = "cpu") -> Target:
        """The target that `device` is on this machine."""
        kind, processor = torch.device(device).type, None
        if kind == "cuda" and torch.cuda.is_available():
            processor = torch.cuda.get_device_name(device)
            capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        elif kind == "cpu":
            capability = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
        else:
            capability = kind
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = None
        return Target(
            device=kind,
            processor=processor or _cpu(),
            capability=capability,
            torch=torch.__version__,
            triton=triton,
            threads=torch.get_num_threads(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def multiplies_bfloat16() -> bool:
    """Has this CPU products of matrices in bfloat16? Otherwise PyTorch emulates them, several times slower."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _cpu() -> str:
    """The model, as the system names it: two of one capability differ in speed."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in listed.read_text().splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    return " ".join(named[name] for name in ("model name", "cpu family", "model", "stepping") if name in named)
