"""Files and folders written whole or not at all, and text files read if they are no larger than any of ours. No torch.

Everything is first written in a temporary folder beside its target, flushed to the disk, then renamed,
so a reader sees the old state or the new one and nothing else. What a killed process leaves are
temporary folders, which the next writer removes, or a commit it had decided on, which `finish` completes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from p3s_cli.errors import P3SError

TEMPORARY = ".p3s-tmp"  # ends the name of every temporary folder: .<process>-<random>.p3s-tmp
LOCK = ".lock"  # in a folder with a writer of its own
DECIDED = ".p3s-commit"
_TEXT_LIMIT = 50_000_000  # bytes: a manifest of ten thousand images has a fifth of that


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed and renamed to `path`, on failure removed.

    Raises P3SError naming the path and the bytes when the disk is full or the folder cannot be written.
    """
    with _workplace(path) as folder:
        temporary = folder / path.name
        yield temporary
        os.chmod(temporary, 0o666 & folder.stat().st_mode)  # safetensors makes 0600 whatever the umask says
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that on success becomes `path`, which must not exist yet. Raises as `replacing`."""
    with _workplace(path) as folder:
        inside = folder / path.name
        inside.mkdir()
        yield inside
        for made in (inside, *(p for p in inside.rglob("*") if p.is_dir())):
            flush(made)
        os.rename(inside, path)
        flush(path.parent)


@contextlib.contextmanager
def committing(root: Path) -> Iterator[Path]:
    """Yield a folder; what is put there appears under `root`, by the same relative paths, all together or not at all.

    The rename to a decided commit is the instant it happens; a process killed after that leaves the moving
    to the next one's `finish`. For one writer at a time. Raises as `replacing`.
    """
    with new_folder(root / DECIDED) as folder:
        yield folder
    finish(root)


def finish(root: Path) -> None:
    """Complete the commit a killed process had decided, and remove its temporaries. Only for the one writer of `root`.

    Folders below that have a writer of their own are left to that one, who may be at work.
    """
    with _sentence(root):
        decided = root / DECIDED
        if decided.is_dir():
            for file in sorted(p for p in decided.rglob("*") if p.is_file()):
                target = root / file.relative_to(decided)
                target.parent.mkdir(parents=True, exist_ok=True)
                _moved(file, target)
                flush(target.parent)
            shutil.rmtree(decided)
        for folder, names, _ in os.walk(root):
            for stale in (n for n in names if n.startswith(".") and n.endswith(TEMPORARY)):
                shutil.rmtree(Path(folder, stale), ignore_errors=True)
            names[:] = [n for n in names if not (n.endswith(TEMPORARY) or Path(folder, n, LOCK).exists())]


def _moved(file: Path, target: Path) -> None:
    """`os.replace`, also onto another disk, where a folder below is a link: a whole copy first, beside the target."""
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)


def append(path: Path, text: str) -> None:
    """Add text to a file's end and flush it. Raises as `replacing`; what was there before is as it was then."""
    with _sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(text.encode())
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise


def read_text(path: Path) -> str:
    """A file of UTF-8 text. Raises OSError as `open`, ValueError if it is no such text, or larger than any p3s reads."""
    with open(path, "rb") as file:
        content = file.read(_TEXT_LIMIT + 1)
    if len(content) > _TEXT_LIMIT:
        raise ValueError(f"it is larger than {_TEXT_LIMIT // 1_000_000} MB")
    return content.decode("utf-8")


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    folder = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
    with _sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        folder.mkdir()
    try:
        with _sentence(path, folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _sentence(path: Path, folder: Path | None = None) -> Iterator[None]:
    """An OSError becomes one sentence with the path the user knows, what was written and what is free."""
    try:
        yield
    except OSError as error:
        shown = Path(*(p for p in path.parts if not p.endswith(TEMPORARY) and p != DECIDED))
        written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder else 0
        raise P3SError(
            f"cannot write {shown}: {error.strerror or error} ({written:,} bytes were written, "
            f"{_free_bytes(path):,} are free); nothing was changed there"
        ) from error


def _free_bytes(path: Path) -> int:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _remove_stale(folder: Path) -> None:
    """Temporary folders of processes that are no more."""
    for stale in folder.glob(f".*{TEMPORARY}"):
        process = stale.name[1:].split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(stale, ignore_errors=True)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True  # there, signal 0 is no question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def flush(path: Path) -> None:
    """Push a file's bytes, or a folder's names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
