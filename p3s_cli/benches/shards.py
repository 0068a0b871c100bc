"""Parts of a benchmark that processes work off at the same time in one folder; the whole then finds all of it made.

<work>/<tuning>/<case>/     as ever: a shard's cases are nobody else's
<work>/shard-2-of-8/        the rows, measurements and page of one shard
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from p3s_cli.errors import InputError
from p3s_cli.lock import check_free, writing

T = TypeVar("T")


def pick(items: Sequence[T], which: str | None) -> list[T]:
    """`i/n`: every n-th item, beginning with the i-th (from 1); None: all of them.

    Raises InputError for anything else, and for a shard of nothing.
    """
    if which is None:
        return list(items)
    i, n = _numbers(which)
    if i > len(items):
        raise InputError(f"shard {which} is empty, as there are {len(items)} subjects; cut no more shards than that")
    return list(items[i - 1 :: n])


def desk(work: Path, which: str | None) -> Path:
    """Where a shard keeps what only one process may write; the folder itself for the whole."""
    return work / "shard-{}-of-{}".format(*_numbers(which)) if which else work


def desks(work: Path) -> list[Path]:
    """Everybody's, the whole's first."""
    return [work, *sorted(work.glob("shard-*-of-*"))]


@contextlib.contextmanager
def at_work(work: Path, which: str | None, what: str) -> Iterator[None]:
    """Hold a shard's desk; the whole holds all there are, its own last. Raises as `writing`, where the other is at work."""
    with contextlib.ExitStack() as held:
        if which:
            check_free(work)
        for folder in [desk(work, which)] if which else reversed(desks(work)):
            held.enter_context(writing(folder, what))
        yield


def _numbers(which: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", which)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"{which!r} is not a shard; write i/n with i from 1 to n, such as 2/8")
    return int(match[1]), int(match[2])
