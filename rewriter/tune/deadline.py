"""How long a search may last."""

from __future__ import annotations

import time


class Deadline:
    """A time budget in seconds; None never ends."""

    def __init__(self, budget: float | None) -> None:
        self._end = None if budget is None else time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def over(self, needed: float = 0.0) -> bool:
        """Is there less than this left?"""
        return self.left <= needed

    def stop(self) -> None:
        """It is over now."""
        self._end = time.monotonic()
