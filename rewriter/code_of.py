"""What a model's forward is written as: a plan whose accuracy was measured on other code says nothing of this one."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_ROOTS = ("__call__", "forward")


def code_of(model: nn.Module) -> dict[str, Any]:
    """{"python", "classes"}: a digest of the compiled code of each class of the model's modules, by its name.

    It covers `forward`, of the class, of its bases or of a single module, and what that reaches by name: methods,
    functions and classes of the same package, and numbers. Comments, names of variables and places in a file do not
    count. Digests are compared between equal versions of Python alone, which compile alike.
    """
    found: dict[str, str] = {}
    for module in model.modules():
        kind, own = type(module), [each for name in _ROOTS for each in _functions(vars(module).get(name))]
        name = f"{kind.__module__}.{kind.__qualname__}"
        patched = own and kind.__module__.startswith("torch.nn.")
        if patched or (_is_others(kind) and (own or name not in found)):
            found[name] = _digest(kind, own)
    return {"python": "{}.{}".format(*sys.version_info), "classes": dict(sorted(found.items()))}


def changes(ours: Any, theirs: Any) -> list[str]:
    """The classes of `ours` whose code is in none of `theirs`, by name; none where they cannot be compared."""
    known = theirs.get("classes") if isinstance(theirs, Mapping) else None
    if not isinstance(known, Mapping) or ours["python"] != theirs.get("python"):
        return []
    return [name for name, digest in ours["classes"].items() if digest not in known.values()]


def _is_others(kind: type) -> bool:
    """Is it neither torch's nor ours, nor Python's own?"""
    return _package(kind.__module__) not in ("torch", "rewriter", "builtins")


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _digest(kind: type, own: Iterable[FunctionType]) -> str:
    package, seen, found = _package(kind.__module__), set[CodeType](), hashlib.sha256()
    left = [*own, *(each for name in _ROOTS for each in _attributes(kind, name))]
    for function in left:  # which grows
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        text = _text(function.__code__, function.__doc__)
        found.update(f"{text} {[each for each in defaults if _is_number(each)]}".encode())
        for cell in function.__closure__ or ():
            left += _functions(_content(cell))
        for name in _names(function.__code__):
            left += _attributes(kind, name)
            value = function.__globals__.get(name)
            if _is_number(value):
                found.update(f"{name}={value!r}".encode())
            elif isinstance(value, type):
                left += _members(value) if _package(value.__module__) == package else []
            else:
                left += [each for each in _functions(value) if _package(each.__module__) == package]
    return found.hexdigest()[:12]


def _attributes(kind: type, name: str) -> Iterator[FunctionType]:
    """What the class and its bases call so: `super()` reaches more than the first."""
    for base in kind.__mro__:
        if _is_others(base):
            yield from _functions(vars(base).get(name))


def _members(kind: type) -> Iterator[FunctionType]:
    """What a class defines that is no module: modules are looked at by themselves."""
    if not issubclass(kind, nn.Module):
        for value in vars(kind).values():
            yield from _functions(value)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions that an attribute or a global name comes to."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (functools.partial, functools.cached_property)):
        value = value.func
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        yield value
        yield from _functions(getattr(value, "__wrapped__", None))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(code: CodeType, doc: str | None = None) -> str:
    """What it does, without where it stands and what is said of it."""

    def plain(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _text(constant)
        if isinstance(constant, frozenset):  # whose order changes from one process to the next
            return sorted(map(repr, constant))
        return None if doc is not None and constant == doc else constant

    return f"{code.co_code.hex()} {code.co_names} {[*map(plain, code.co_consts)]!r}"


def _names(code: CodeType) -> Iterator[str]:
    """Of what it reaches."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)
