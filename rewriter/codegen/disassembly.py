"""What is in a disassembled kernel: its instructions by kind, as a whole and in its main loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a listing. `targets` are labels it may jump to; `falls` says whether the next line may follow."""

    name: str
    text: str
    targets: tuple[str, ...]
    falls: bool


@dataclass(frozen=True)
class Counts:
    """What is in a stretch of code, counted as it stands: not how often it runs. One warp executes each once.

    `tensor_core` is keyed by the instruction with its shape; loads by their width in bits a thread, or "bulk" for a
    copy that the tensor memory accelerator makes on its own; spills are bytes a thread to and from local memory.
    """

    instructions: int
    tensor_core: Mapping[str, int]
    exp: int
    global_loads: Mapping[str, int]
    shared_loads: Mapping[str, int]
    spill_stores: int
    spill_loads: int

    @property
    def tensor(self) -> int:
        """All tensor-core instructions."""
        return sum(self.tensor_core.values())


def sass(line: str) -> Instruction | None:
    """A line of nvdisasm's, such as `/*00a0*/  @!P0 BRA `(.L_x_1) ;`."""
    match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);", line)
    if match is None:
        return None
    guard, name, rest = match.groups()
    if guard == "@!PT":  # never runs: the assembler pads some sequences with loads that are switched off
        return Instruction("NOP", "", (), True)
    kind = name.split(".")[0]
    jumps = kind in ("BRA", "BRX", "JMP", "JMX", "CALL")
    targets = tuple(re.findall(r"\.L_x_\d+|(?<=`\()[^)]+", rest)) if jumps else ()
    # A jump without a guard may still have its condition among its operands: `BRA.U UP0, ...`.
    always = kind in ("EXIT", "RET", "BRX", "JMX") or (kind in ("BRA", "JMP") and rest.strip().startswith("`"))
    return Instruction(name, rest, targets, guard is not None or not always)


def gcn(line: str) -> Instruction | None:
    """A line of LLVM's assembly, such as `s_cbranch_scc1 .LBB0_2`."""
    match = re.match(r"\s+([a-z]\w+)(?:\s+(.*))?$", line)
    if match is None:
        return None
    name, rest = match[1], match[2] or ""
    targets = (rest.split()[0],) if re.match(r"s_c?branch", name) else ()
    return Instruction(name, rest, targets, name not in ("s_branch", "s_endpgm", "s_setpc_b64"))


def analysed(name: str, listing: str, read: Callable[[str], Instruction | None]) -> tuple[Counts, tuple[Counts, ...]]:
    """Everything reachable, and the innermost loops that compute."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"([.$\w]+):", line):
            labels[label[1]] = len(code)
        elif (instruction := read(line)) is not None:
            code.append(instruction)
    after: dict[int, set[int]] = {}
    for place, each in enumerate(code):
        after[place] = {labels[target] for target in each.targets if target in labels}
        if each.falls and place + 1 < len(code):
            after[place].add(place + 1)
    reached = _reach(labels[name], after, {*after})
    before: dict[int, set[int]] = {place: set() for place in after}
    for place in reached:
        for following in after[place]:
            before[following].add(place)
    hot = {place for place in reached if _tensor(code[place]) or _exp(code[place])}
    loops = sorted(_innermost(reached, after, before, hot), key=min)
    return _counts(code[place] for place in reached), tuple(_counts(code[i] for i in loop) for loop in loops)


def _innermost(
    inside: set[int], after: Mapping[int, set[int]], before: Mapping[int, set[int]], hot: set[int]
) -> Iterator[set[int]]:
    """The smallest cycles of the flow with something hot in them: without its entry, a loop shows the loops inside."""
    left = set(inside)
    while hot & left:
        start = min(hot & left)
        around = _reach(start, after, left) & _reach(start, before, left)
        left -= around
        if len(around) > 1 or start in after[start]:
            entry = {place for place in around if before[place] - around} or {min(around)}
            yield from list(_innermost(around - entry, after, before, hot)) or [around]


def _reach(start: int, edges: Mapping[int, set[int]], inside: set[int]) -> set[int]:
    found, todo = {start}, [start]
    while todo:
        new = (edges[todo.pop()] & inside) - found
        found |= new
        todo.extend(new)
    return found


def _counts(code: Iterable[Instruction]) -> Counts:
    tensor_core: Counter[str] = Counter()
    loads: dict[str, Counter[str]] = {"global": Counter(), "shared": Counter()}
    spills: Counter[str] = Counter()
    number = exp = 0
    for each in code:
        number += 1
        exp += _exp(each)
        if _tensor(each):
            tensor_core[each.name] += 1
        elif (load := _load(each.name)) is not None:
            loads[load[0]][load[1]] += 1
        for way, size in _spilled(each):
            spills[way] += size
    return Counts(
        number, dict(tensor_core), exp, dict(loads["global"]), dict(loads["shared"]), spills["store"], spills["load"]
    )


def _tensor(each: Instruction) -> bool:
    """HMMA, HGMMA (wgmma), UTCHMMA (tcgen05) and their like; MFMA and WMMA on AMD."""
    return each.name.split(".")[0].endswith("MMA") or each.name.startswith(("v_mfma", "v_smfmac", "v_wmma", "v_swmmac"))


def _exp(each: Instruction) -> bool:
    return each.name.startswith(("MUFU.EX2", "v_exp_f"))


def _load(name: str) -> tuple[str, str] | None:
    """Where a load reads from, and how many bits each thread gets of it."""
    kind, *modifiers = name.split(".")
    if kind in ("LDG", "LDGSTS"):
        return "global", _width(modifiers)
    if kind in ("UTMALDG", "UBLKCP"):
        return "global", "bulk"
    if kind == "LDS":
        return "shared", _width(modifiers)
    if kind == "LDSM":  # matrices of 8 rows of 128 bits: 32 bits of each for each thread
        return "shared", f"{32 * next((int(m) for m in modifiers if m in ('2', '4')), 1)}"
    if match := re.match(
        r"(?:global|buffer|flat)_load_(?:lds_)?(?:(dword)(?:x(\d))?|[a-z](\d+)|[us]?(byte|short))", name
    ):
        dword, many, bits, small = match.groups()
        return "global", f"{32 * int(many or 1)}" if dword else bits or ("8" if small == "byte" else "16")
    if match := re.match(r"ds_(?:read|load)(?:_addtid|(2)(?:st64|addr)?|_2addr(?:_stride64)?)?_[biu](\d+)", name):
        return "shared", f"{int(match[2]) * (2 if match[1] or '2addr' in name else 1)}"
    return None


def _width(modifiers: Iterable[str]) -> str:
    """Of SASS's `LDG.E.LTC128B.64`: whole words only, for LTC128B is a hint to the cache. 32 where none is written."""
    small = (m[1:] if m[0] in "US" else m for m in modifiers)
    return next((m for m in small if m in ("8", "16", "64", "128", "256")), "32")


def _spilled(each: Instruction) -> Iterator[tuple[str, int]]:
    """Whether a register goes to or comes from local memory, and the bytes."""
    kind, *modifiers = each.name.split(".")
    if kind in ("STL", "LDL"):
        yield ("store" if kind == "STL" else "load"), int(_width(modifiers)) // 8
    elif match := re.search(r"; (\d+)-byte Folded (Spill|Reload)", each.text):
        yield ("store" if match[2] == "Spill" else "load"), int(match[1])
