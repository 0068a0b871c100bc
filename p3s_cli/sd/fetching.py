"""Asking the hub: whether it can be asked, and in a sentence why it did not give something. No torch in here."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from p3s_cli.errors import InputError, P3SError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, or of a user's share of it


class NoRoomError(InputError):
    """There is no room for what is to be fetched. For whoever can do without it, as any other that is not here."""

    exit_code = 1


def offline() -> bool:
    """Whether the user has switched the hub off (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def online(
    get: Callable[[dict], Any],
    tries: Sequence[dict],
    name: str,
    fetch: str = "p3s fetch",
    otherwise: str = "--model world needs neither",
) -> Any:
    """What `get` brings with the first of these options that the hub has.

    `name` is what is asked for, `fetch` the command that brings it, `otherwise` what works without. Raises InputError that
    says why there is none, NoRoomError for a full disk.
    """
    switch = " (HF_HUB_OFFLINE is set)" if offline() else ""
    without = "" if "world" in fetch.split() else f" ({otherwise})"
    if offline() or not _reachable():
        raise InputError(
            f"{name} is not on this machine and cannot be fetched without a network{switch}; "
            f"fetch it with `{fetch}` where there is one{without}"
        )
    error: Exception | None = None
    for given in tries:
        try:
            return get(given)
        except P3SError:
            raise
        except Exception as caught:  # the HTTP library behind the client, and its errors, change with its version
            if any(isinstance(e, OSError) and e.errno in _FULL for e in _causes(caught)):
                raise NoRoomError(_no_room(name, fetch)) from caught
            error = error or caught
    raise InputError(
        f"{name} could not be fetched ({_reason(error)}); mend that, then run `{fetch}`{without}"
    ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_room(name: str, fetch: str) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    return f"no room to fetch {name} into {cache}, where {free:,} bytes are free; make room, then run `{fetch}`"


def _reason(error: Exception | None) -> str:
    """Why the hub did not give it, in a few words."""
    from huggingface_hub import errors

    told = (
        (errors.GatedRepoError, "its owner asks who wants it; accept the terms on its page and log in"),
        (errors.RepositoryNotFoundError, "the hub has no such repository, or shows it only to others"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
    )
    for cause in _causes(error):
        for kind, words in told:
            if isinstance(cause, kind):
                return words
    return first_line(error) or type(error).__name__


def _reachable() -> bool:
    """One short request, because the hub's client asks for half a minute before it gives up."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the HTTP library behind the client, and its errors, change with its version
        return False
    return True


def first_line(error: Exception | None) -> str:
    return str(error).strip().split("\n")[0]
