"""One writer per subject directory. No torch in here.

The lock is the operating system's, on `.lock` in the directory, so it dies with its process, however
that ends. The file stays, because removing a lock file lets two processes hold what seems one lock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from p3s_cli.atomic import DECIDED, LOCK, TEMPORARY, finish
from p3s_cli.errors import InputError, P3SError
from p3s_cli.subject import Subject

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def writing(root: Path, what: str) -> Iterator[None]:
    """Hold `root`, made if need be, while the block runs; first bring what a killed writer left into a whole state.

    Raises P3SError at once, naming the holder, if another holds it, InputError for a name that is no text. A directory
    that got nothing from the block is not left behind.
    """
    _check_name(root)
    path, made = root / LOCK, not root.exists()
    lock = FileLock(path, blocking=False)
    with _sentence(root):
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise _held(path) from None
    try:
        with _sentence(root):
            path.write_text(
                f"{what}, process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
        finish(root)
        yield
    finally:
        if not Subject.exists(root):
            _leave_no_trace(root, made)
        lock.release()


def check_free(root: Path) -> None:
    """Raises as `writing` if another holds `root`, for longer than this question takes."""
    if (root / LOCK).exists():
        lock = FileLock(root / LOCK)
        try:
            lock.acquire(timeout=2)
        except Timeout:
            raise _held(root / LOCK) from None
        lock.release()


def _held(path: Path) -> P3SError:
    return P3SError(f"{path.parent} is being written by {_holder(path)}; wait until it is done, or stop it")


@contextlib.contextmanager
def reading(*roots: Path, what: str) -> Iterator[None]:
    """Hold directories while several of their files are read, so that all are of one state.

    One that may not be written is read as it is. Raises as `writing`.
    """
    with contextlib.ExitStack() as held:
        for root in dict.fromkeys(r.resolve() for r in roots):
            if os.access(root, os.W_OK):
                held.enter_context(writing(root, what))
        yield


def _check_name(root: Path) -> None:
    try:
        str(root).encode()
    except UnicodeEncodeError as error:  # safetensors would write there, and could read nothing of it
        raise InputError(
            f"the directory {str(root)!a} is not valid Unicode text; name another one with --output"
        ) from error


def unfinished(root: Path) -> bool:
    """Whether a directory, no subject yet, holds nothing but what a killed writer left (or nothing at all)."""
    names = [p.name for p in root.iterdir()] if root.is_dir() else ["a file"]
    return not Subject.exists(root) and (
        DECIDED in names or all(name == LOCK or name.endswith(TEMPORARY) for name in names)
    )


@contextlib.contextmanager
def _sentence(root: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{root} cannot be a folder, for a file stands in its way; name another place") from error
    except OSError as error:
        raise P3SError(
            f"cannot write {root}: {error.strerror or error}; make room, or work on a copy in a folder you may write to"
        ) from error


def _leave_no_trace(root: Path, made: bool) -> None:
    with contextlib.suppress(OSError):  # gone already, or not empty
        (root / LOCK).unlink()
        if made:
            root.rmdir()


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


def one_writer(
    stage: Callable[Concatenate[Path | str, _Arguments], _Result],
) -> Callable[Concatenate[Path | str, _Arguments], _Result]:
    """For a stage whose first argument is a subject directory: hold it, if it exists, until the stage ends."""

    @functools.wraps(stage)
    def held(subject_dir: Path | str, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not Subject.exists(Path(subject_dir)):
            return stage(subject_dir, *args, **kwargs)  # which says what is missing
        with writing(Path(subject_dir), f"p3s {stage.__name__}"):
            return stage(subject_dir, *args, **kwargs)

    return held
