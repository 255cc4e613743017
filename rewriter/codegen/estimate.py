"""Which blocks of scores hold one above the threshold of its query, from products of integers, in generated C++.

    kernel = load(rows=64, keys=32)
    if isinstance(kernel, EstimateKernel):  # else a refusal, for example without a compiler
        blocks = kernel(query, key, q_step, k_step, constant, threshold, far)

The scores themselves are never stored.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rewriter.codegen.native import called, multiplies
from rewriter.codegen.source import rendered
from rewriter.errors import OptionError
from rewriter.site import Refusal

PANEL = 64
"""Keys of one product: what a block of queries looks at ends at a multiple."""


@cache
def load(rows: int, keys: int) -> EstimateKernel | Refusal:
    """The kernel for blocks of so many queries and keys, built if need be. A refusal says what is missing."""
    if PANEL % keys:
        return Refusal(f"blocks of {keys} keys do not fill products of {PANEL}")
    wide = not multiplies("bfloat16")
    title = f"{rows} queries x {keys} keys, products in {'float32' if wide else 'bfloat16'}"
    text = rendered("estimate.cpp.jinja", title=title, rows=rows, keys=keys, wide=wide)
    entry = called(text, "rewriter_estimate")
    if isinstance(entry, Refusal):
        return entry
    return EstimateKernel(rows, keys, entry)


@dataclass(frozen=True)
class EstimateKernel:
    """A built kernel, to be called on tensors."""

    rows: int
    keys: int
    entry: ctypes._NamedFuncPointer

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        q_step: Tensor,
        k_step: Tensor,
        constant: Tensor,
        threshold: Tensor,
        far: Tensor,
        *,
        rounded: bool = False,
    ) -> Tensor:
        """bool (B, H, blocks of queries, blocks of keys): is any q_step k_step (q . k) + constant above the threshold?

        query (B, H, Sq, D) and key (B, Hkv, Skv, D), int8 of at most 8 bits in products that add up to 2^24
        q_step, threshold (B, H, Sq), k_step (B, Hkv, Skv) and constant (B, H, Skv), float32; steps are above 0
        far       int64 (blocks of queries,): how many keys each looks at, multiples of PANEL; the rest is False
        rounded   the constant is rounded to a multiple of both steps, as where integers are added up
        """
        (batch, heads, q_len, width), (kv_heads, kv_len) = query.shape, key.shape[1:3]
        q_blocks, k_blocks = -(-q_len // self.rows), -(-kv_len // self.keys)
        floats = {
            "q_step": (q_step, (batch, heads, q_len)),
            "k_step": (k_step, (batch, kv_heads, kv_len)),
            "constant": (constant, (batch, heads, kv_len)),
            "threshold": (threshold, (batch, heads, q_len)),
        }
        wrong = [name for name, (t, shape) in floats.items() if t.dtype != torch.float32 or t.shape != shape]
        if wrong:
            raise OptionError(f"{wrong[0]} is float32 of {floats[wrong[0]][1]}")
        if {query.dtype, key.dtype} != {torch.int8} or key.shape[::3] != (batch, width) or heads % kv_heads:
            raise OptionError(
                "queries and keys are int8 of one batch and width, and heads are a multiple of those of keys"
            )
        if far.dtype != torch.int64 or far.shape != (q_blocks,) or bool(((far % PANEL != 0) | (far > kv_len)).any()):
            raise OptionError(f"{q_blocks} blocks look at keys up to a multiple of {PANEL} each, of {kv_len}")
        out = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.bool)
        if 0 in (*out.shape, width):
            return out
        every = [t.contiguous() for t in (query, key, q_step, threshold, k_step, constant, far)]
        pointers = [t.data_ptr() for t in (*every, out)]
        numbers = [batch, heads, kv_heads, q_len, kv_len, width, int(rounded)]
        error = self.entry((ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(numbers))(*numbers))
        if error:
            raise RuntimeError(error.decode())
        return out
