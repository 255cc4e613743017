"""An attention as one node in a traced graph: the operator `rewriter::attend`, and what it calls by name."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from rewriter.codegen.formula import Formula

_KNOWN: dict[str, tuple[Formula, Callable[..., Tensor]]] = {}
"""By name. A compiled graph holds names, and caches of such graphs outlive a process: a name says what it computes."""


def registered(said: str, formula: Formula, implementation: Callable[..., Tensor]) -> str:
    """The name of an implementation, made from what is `said` of it."""
    name = sha256(said.encode()).hexdigest()[:16]
    if name in _KNOWN and _KNOWN[name][0] != formula:  # two functions of one name, as in a loop
        name = uuid4().hex
    _KNOWN[name] = formula, implementation
    return name


@torch.library.custom_op("rewriter::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    sink: Tensor | None,
    name: str,
) -> Tensor:
    """An implementation by its name, (B, H, Sq, Dv), in memory (B, Sq, H, Dv)."""
    out = _KNOWN[name][1](query, key, value, mask, padding, *([] if sink is None else [sink]))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any, sink: Any, name: str) -> Tensor:
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)


@torch.library.custom_op("rewriter::attend_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    sink: Tensor | None,
    name: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those operands (query, key, value, mask, padding, sink) that are wanted. Computes forward again:
    what the forward pass kept is not in the graph.
    """
    given = [query, key, value, mask, padding, *([] if sink is None else [sink])]
    leaves = [t if t is None else t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=False)]
    # Below an operator nothing is recorded, but for this.
    recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), recorded:
        out = _KNOWN[name][1](*leaves)
        asked = [t for t in leaves if t is not None and t.requires_grad]
        return [grad.contiguous() for grad in torch.autograd.grad(out, asked, d_out, materialize_grads=True)]


@attend_backward.register_fake
def _(d_out: Tensor, *given: Any) -> list[Tensor]:
    *operands, _, wanted = given
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, want in zip(operands, wanted, strict=True)
        if want
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.name = inputs
    ctx.save_for_backward(*operands)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    grads = iter(attend_backward(d_out, *ctx.saved_tensors, ctx.name, wanted))
    return (*(next(grads) if want else None for want in wanted), None)


attend.register_autograd(_differentiate, setup_context=_keep)
