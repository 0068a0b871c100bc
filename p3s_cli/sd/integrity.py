"""Whether files that came from the hub, or lie in a folder, are whole. No torch in here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from p3s_cli.atomic import sha256


def cached(file: Path) -> bool:
    """Whether the hub's cache keeps this file, under a blob that is named by its hash."""
    return file.resolve().parent.name == "blobs"


def damaged(found: Sequence[Path]) -> list[Path]:
    """Files whose contents are not what the hub said: sha256 for large files, git's sha1 for small ones.

    Of files in a plain folder no hash is known; there a safetensors file must be whole.
    """
    return [f for f in found if not (_as_named(f.resolve()) if cached(f) else _whole(f))]


def _as_named(blob: Path) -> bool:
    if len(blob.name) == 64:
        return sha256(blob) == blob.name
    data = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob.name


def _whole(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return True
    try:
        with safe_open(file, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False
