"""What may join a subject in an image: other subjects, ControlNets and LoRAs, as the user names them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3s_cli import methods
from p3s_cli.atomic import sha256
from p3s_cli.errors import InputError
from p3s_cli.lock import reading
from p3s_cli.methods.base import check_pair
from p3s_cli.sd import controlnet, hub, images
from p3s_cli.subject import CONTROL, Subject, digest

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")  # as peft writes it


@dataclass(frozen=True)
class Composition:
    """Further subjects with their strengths; ControlNets as (name, picture, strength); LoRAs with theirs."""

    also: tuple[tuple[Subject, float], ...] = ()
    control: tuple[tuple[str, Path, float], ...] = ()
    lora: tuple[tuple[Path, float], ...] = ()

    @classmethod
    def read(
        cls,
        also: Sequence[str] | None,
        control: Sequence[str] | None,
        lora: Sequence[str] | None,
        held: Path | None = None,
    ) -> Composition:
        """From `cat=0.8`, `canny=edges.png=0.7` and `style.safetensors=0.6`; a strength left out is 1.

        `held` is the directory that is being written to by whoever asks. Raises InputError for what is not there,
        before any model is loaded, and P3SError for a subject that another process is writing.
        """
        return cls(
            tuple((_opened(Path(name), held), strength) for name, strength in map(_weighted, also or ())),
            tuple(_guide(text) for text in control or ()),
            tuple((_existing(Path(name)), strength) for name, strength in map(_weighted, lora or ())),
        )

    def check(self, subjects: Sequence[Subject]) -> None:
        """Raises InputError if something joins a subject whose method nothing can join, or one of another CLIP pair."""
        other = next((s for s in subjects if "joined" not in methods.get(s.method).heeds), None)
        if other is not None and (self.also or self.control or self.lora):
            raise InputError(
                f"{other.root} is tuned by {other.method}, which nothing can join; leave out --also, --control "
                "and --lora, or tune it with p3s"
            )
        check_pair(subjects)

    def record(self) -> dict[str, Any]:
        """Everything an image depends on, by content; empty if nothing joins."""
        parts = {
            "also": [
                {"control": {CONTROL: s.tuned().artifacts[CONTROL]}, "words": s.manifest.name, "strength": strength}
                for s, strength in self.also
            ],
            "guides": [
                {"net": name, "picture": images.pixel_hash(images.load_image(path)), "strength": strength} | _own(name)
                for name, path, strength in self.control
            ],
            "loras": [{"name": path.stem, "sha256": _hash(path), "strength": strength} for path, strength in self.lora],
        }
        return {name: part for name, part in parts.items() if part}


def _opened(root: Path, held: Path | None) -> Subject:
    if held is not None and Subject.exists(root) and root.resolve() == held.resolve():
        return Subject.open(root)
    with reading(root, what="p3s generate") if Subject.exists(root) else contextlib.nullcontext():
        return Subject.open(root)


def _hash(path: Path) -> str:
    return digest(*(sha256(path / name) for name in _ADAPTER)) if path.is_dir() else sha256(path)


def _own(net: str) -> dict[str, str]:
    """What is in a ControlNet's folder; names and hub ids say it themselves."""
    part = controlnet.part(net)
    inside = hub.folder(part) if Path(part.source).is_dir() else None
    if inside is None:
        return {}
    return {"weights": digest({file.name: sha256(file) for file in hub.loaded(inside, part)})}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    missing = [name for name in _ADAPTER if path.is_dir() and not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} holds no {missing[0]}; give a .safetensors file, or a folder that peft wrote")
    return path


def _weighted(text: str) -> tuple[str, float]:
    """`name=0.8` -> (name, 0.8); a name without a strength, or one that exists as it stands, has strength 1."""
    name, _, strength = str(text).rpartition("=")
    if not name or Path(text).exists():
        return str(text), 1.0
    try:
        value = float(strength)
    except ValueError as error:
        raise InputError(f"{strength!r} in {text!r} is no strength; write a number, such as {name}=0.8") from error
    if not 0 <= value < float("inf"):
        raise InputError(f"the strength {value:g} in {text!r} is not 0 or more; give one such as {name}=0.8")
    return name, value


def _guide(text: str) -> tuple[str, Path, float]:
    name, _, rest = text.partition("=")
    if not rest:
        raise InputError(f"{text!r} names no picture; write NAME=PICTURE, such as canny=edges.png")
    controlnet.check_name(name)
    picture, strength = _weighted(rest)
    images.load_image(Path(picture))
    return name, Path(picture), strength


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`640x448`, width x height -> (448, 640), height first. Raises InputError unless both are multiples of 8."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise InputError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, such as 640x448")
    width, height = int(match[1]), int(match[2])
    if width % 8 or height % 8 or not (64 <= min(width, height) and max(width, height) <= 4096):
        raise InputError(f"the size {text} is not one that can be drawn; give multiples of 8 from 64 to 4096")
    return height, width
