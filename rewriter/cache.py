"""Where the library keeps what it has computed: generated code, measurements, converted checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder below the cache, made if it is not there: `$REWRITER_CACHE`, else the platform's cache folder."""
    folder = _root().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _root() -> Path:
    if chosen := os.environ.get("REWRITER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rewriter"
    if local := os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"):
        return Path(local) / "rewriter"
    return Path.home() / ".cache" / "rewriter"
