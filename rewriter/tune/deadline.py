"""How long a search may last."""

from __future__ import annotations

import time


class Deadline:
    """A time budget in seconds; None never ends."""

    def __init__(self, budget: float | None) -> None:
        self._end = self._last = None if budget is None else time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def over(self, needed: float = 0.0) -> bool:
        """Is there less than this left?"""
        return self.left <= needed

    def share(self, parts: int) -> None:
        """From now on the first of so many equal parts of what remains of the whole."""
        if self._last is not None:
            now = time.monotonic()
            self._end = now + (self._last - now) / parts

    def stop(self) -> None:
        """All of it is over now."""
        self._end = self._last = time.monotonic()
