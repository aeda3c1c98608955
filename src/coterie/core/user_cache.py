"""The user's cache: ``$COTERIE_CACHE`` (default ``coterie`` in the system's folder of caches)."""

from __future__ import annotations

import os
from pathlib import Path

from coterie.core.paths import expanded


def cache_root() -> Path:
    """``$COTERIE_CACHE`` if set, else ``coterie`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    chosen, common = os.environ.get("COTERIE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if not chosen and Path(common).is_absolute():  # a relative one is to be ignored
        return Path(common) / "coterie"
    return expanded(chosen or "~/.cache/coterie", "COTERIE_CACHE")
