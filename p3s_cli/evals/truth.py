"""What is scored, and what it is compared with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image

from p3s_cli.sd import images


@dataclass(frozen=True)
class Truth:
    """What results of one subject are compared with; pictures are PIL images.

    `real`: the chosen subject, the first being the reference that methods were given. `other`: its
    look-alike, empty if it has none. `masked`: `real` with all but the subject black. `other_text`
    describes the look-alike. `finder` tells where the subject is in a result; columns that ask for it
    are left out without one.
    """

    subject: str
    real: tuple[Image.Image, ...]
    other: tuple[Image.Image, ...] = ()
    masked: tuple[Image.Image, ...] = ()
    other_text: str | None = None
    finder: Finder | None = None

    @cached_property
    def digest(self) -> str:
        """Of all pictures: scores against other ones are other scores."""
        made = hashlib.sha256()
        for picture in (*self.real, None, *self.other, None, *self.masked):
            made.update(f"{picture.size}".encode() + picture.tobytes() if picture else b"|")
        return made.hexdigest()[:12]


class Finder(Protocol):
    """Finds one subject in pictures: everything but it black, and its middle as fractions (x, y).

    `digest`: of all that what it finds depends on.
    """

    digest: str

    def blackened(self, picture: Image.Image) -> Image.Image: ...
    def place(self, picture: Image.Image) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Result:
    """One picture to be scored: its prompt without the identifier, and the labels that it asks for."""

    path: Path
    sha256: str
    prompt: str
    seed: int
    labels: frozenset[str] = frozenset()

    def open(self) -> Image.Image:
        return images.load_image(self.path)  # upright, as whatever it is compared with
