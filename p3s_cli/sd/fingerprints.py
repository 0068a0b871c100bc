"""What the parts of a family are made of, told by their files and without loading them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from p3s_cli.atomic import sha256
from p3s_cli.sd import hub
from p3s_cli.sd.integrity import cached
from p3s_cli.sd.profile import CLASSICAL, Profile

_SHA256 = 64  # hexadecimal digits


def fingerprint(profile: Profile, *names: str) -> str | None:
    """sha256 over the files that these parts are loaded from, the same in every precision; None if one is not on this machine yet."""
    parts = [_files(profile, name) for name in names]
    files = dict.fromkeys(file for part in parts for file in part)  # a single file is a base's every part
    return hashlib.sha256("\n".join(map(named, files)).encode()).hexdigest() if all(parts) else None


def filler_fingerprint(profile: Profile) -> str | None:
    """Of what fills in for a look-alike: the inpainter, or the base where that is not at hand, VAE and text encoder.

    None where no model fills in, or one is not on this machine yet.
    """
    sibling = profile.inpainter
    if sibling == CLASSICAL:
        return None
    own = sibling not in (None, ".") and _files(profile, "inpainter")
    return fingerprint(profile, "inpainter" if own else "unet", "vae", "text_encoder")


def _files(profile: Profile, name: str) -> list[Path]:
    """The files that a part is loaded from; none if they are not on this machine."""
    part = next((p for p in profile.parts if p.name == name), None)
    if part is None:  # it is in a single file
        return [Path(profile.inpainter or "" if name == "inpainter" else profile.base)]
    inside = hub.folder(part)
    return hub.loaded(inside, part) if inside else []


def named(file: Path) -> str:
    """Its sha256; of large ones in the hub's cache, by the name that they have there, for a photo is not worth reading gigabytes again."""
    name = file.resolve().name  # of small ones it is git's sha1, which the same file in a folder has not
    known = cached(file) and len(name) == _SHA256
    return name if known else _hash(file, file.stat().st_size, file.stat().st_mtime_ns)


@functools.cache
def _hash(file: Path, size: int, changed: int) -> str:
    """Of gigabytes that serve many photos: once for as long as the file is this large and this old."""
    return sha256(file)
