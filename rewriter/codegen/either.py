"""Two implementations of which the sizes of a call choose one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rewriter.variant import Implementation


@dataclass(frozen=True)
class Either:
    """`special` for the queries and keys that it `fits`, and `usual` for all others."""

    special: Implementation
    usual: Implementation
    fits: Callable[[Tensor, Tensor], bool]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, Sq, Dv)."""
        if self.fits(query, key):
            return self.special(query, key, value, mask, padding, *sink)
        return self.usual(query, key, value, mask, padding, *sink)

    def pairs(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> int | None:
        """Those of the one that is chosen."""
        chosen = self.special if self.fits(query, key) else self.usual
        return pairs(chosen, query, key, value, mask, padding, *sink)


def pairs(
    implementation: Implementation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *sink: Tensor,
) -> int | None:
    """How many pairs of a query and a key a call shows, over batch and heads; None where an implementation, which is
    one of sums over features or not made from a formula, does not say.
    """
    counted = getattr(implementation, "pairs", None)
    found: int | None = counted(query, key, value, mask, padding, *sink) if counted else None
    return found
