"""The DreamBench folder as published (google/dreambooth, `dataset/`): subjects, classes, prompts, photos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p3s_cli.atomic import read_text
from p3s_cli.errors import InputError

_INDEX = "prompts_and_classes.txt"
_LIVE = {"dog", "cat"}  # the classes that get the live subjects' prompts
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Sitter:
    """One of the benchmark's subjects: its photos sorted by name, its prompts with [V] before the class word."""

    name: str
    class_word: str
    photos: tuple[Path, ...]
    prompts: tuple[str, ...]


def read(folder: Path, subjects: Sequence[str] | None = None) -> list[Sitter]:
    """All subjects of the folder, or those named. Raises InputError if it is not DreamBench, lacks a name, or the photos of one."""
    folder = folder / "dataset" if (folder / "dataset").is_dir() else folder
    index = folder / _INDEX
    if not index.is_file():
        raise InputError(f"{folder} is not the DreamBench folder (it has no {_INDEX}); give its dataset/ folder")
    try:
        text = read_text(index)
    except (OSError, ValueError) as error:
        raise InputError(f"{index} cannot be read ({error}); restore it as it was published") from error
    classes = dict(re.findall(r"^([\w-]+),([\w -]+?)\s*$", text.split("Prompts")[0], re.MULTILINE))
    classes.pop("subject_name", None)
    objects, live = _prompt_lists(text)
    for name in subjects or ():
        if name not in classes:
            raise InputError(f"DreamBench has no subject {name!r}; choose from: {', '.join(classes)}")
    sitters = []
    for name, word in classes.items():
        if subjects is None or name in subjects:
            photos = tuple(sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in _SUFFIXES))
            templates = live if word in _LIVE else objects
            sitters.append(Sitter(name, word, photos, tuple(t.format("[V]", word) for t in templates)))
    # a mean over fewer than are asked for is another benchmark's
    missing = [s.name for s in sitters if not s.photos]
    if missing or not sitters:
        at = folder / (missing or ["SUBJECT"])[0]
        raise InputError(
            f"{folder} holds no photos of {', '.join(missing) or 'any subject'}; put them where {at} should be, "
            f"or take such subjects' lines out of {_INDEX}"
        )
    return sitters


def _prompt_lists(text: str) -> tuple[list[str], list[str]]:
    lists = [re.findall(r"'([^']*)'\.format", block) for block in re.findall(r"prompt_list = \[(.*?)\]", text, re.S)]
    if len(lists) != 2:
        raise InputError(
            f"{_INDEX} should hold two prompt lists, for objects and for live subjects; it holds {len(lists)}"
        )
    return lists[0], lists[1]
