"""How a stage says where it is."""

from __future__ import annotations

from collections.abc import Callable

# (what is being done, how much of it is done, of how much)
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """For callers who do not ask."""
