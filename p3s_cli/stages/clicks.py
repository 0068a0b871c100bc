"""Points from a file, for one photo or for many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p3s_cli.errors import InputError


class PhotoClicks(BaseModel):
    """What a points file says of one photo: points as [x, y] pixels or "x,y" strings, perhaps a box and a class word."""

    model_config = ConfigDict(extra="forbid")

    positive: list[str | tuple[float, float]] = Field(default_factory=list)
    negative: list[str | tuple[float, float]] = Field(default_factory=list)
    box: str | tuple[float, float, float, float] | None = None
    class_word: str | None = Field(default=None, alias="class")


def read_clicks(path: Path, photos: Sequence[Path]) -> list[PhotoClicks]:
    """The clicks of each photo from a JSON file: one object for one photo, or objects by file name.

        {"positive": [[120, 88]], "negative": [[300, 90]]}
        {"a.jpg": {"positive": [[120, 88]]}, "b.jpg": {"box": [40, 60, 210, 300], "class": "dog"}}

    Raises InputError if the file is neither, or says nothing of one of the photos.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON that can be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object; write points by file name, or those of the one photo")
    single = len(photos) == 1 and photos[0].name not in data
    found = []
    for photo in photos:
        entry = data if single else data.get(photo.name)
        if entry is None:
            raise InputError(f"{path} says nothing of {photo.name}; add its points under that name")
        try:
            found.append(PhotoClicks.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {photo.name}: {where}: {first['msg']}") from error
    return found
