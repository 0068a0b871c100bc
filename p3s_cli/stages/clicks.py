"""Points as they are written, on the command line or in a file, for one photo or for many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p3s_cli.atomic import read_text
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

    Raises InputError if the file is neither, or says nothing of one of the photos, or two have one name.
    """
    try:
        data = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object; write points by file name, or those of the one photo")
    if again := twice(photo.name for photo in photos):
        raise InputError(f"two photos are called {again}, by which {path} knows them; rename one")
    single = len(photos) == 1 and photos[0].name not in data
    found = []
    for photo in photos:
        entry = data if single else data.get(photo.name)
        if entry is None:
            raise InputError(f"{path} says nothing of {photo.name}; add its points under that name")
        try:
            found.append(PhotoClicks.model_validate(entry))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"][:2]))
            raise InputError(
                f'{path}: {photo.name}: {where} is not as it should be; write {{"positive": [[120, 88]], "negative": '
                '[[300, 90]], "box": [40, 60, 210, 300], "class": "dog"}, of which only one of the first and the third is needed'
            ) from error
    return found


def twice(names: Iterable[str]) -> str | None:
    """The first name that comes a second time."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def parse_point(text: str) -> tuple[str, float, float]:
    """Read `X,Y`: ("pixels", x, y), or ("fraction", x, y) where both are written with a point and lie in [0, 1]."""
    try:
        first, second = text.split(",")
        x, y = float(first), float(second)
    except ValueError as error:
        raise InputError(
            f"{text!r:.80} is not a point; write X,Y in pixels, such as 120,88, or as fractions, such as 0.3,0.5"
        ) from error
    if 0 <= x <= 1 and 0 <= y <= 1 and ("." in first or "." in second):
        if not ("." in first and "." in second):
            raise InputError(
                f"{text!r:.80} may be pixels or fractions; write both numbers with a decimal point, or neither"
            )
        return "fraction", x, y
    return "pixels", x, y


def resolve_points(points: Sequence[str | tuple[float, float]], width: int, height: int) -> list[tuple[float, float]]:
    """Points as pixels of the upright image. Raises InputError for one that lies outside, naming the size."""
    resolved = []
    for point in points:
        if isinstance(point, str):
            kind, x, y = parse_point(point)
            x, y = (x * (width - 1), y * (height - 1)) if kind == "fraction" else (x, y)
        else:
            x, y = _pixels(point, 2, "a point; give (x, y)")
        resolved.append(_inside(x, y, width, height))
    return resolved


def _inside(x: float, y: float, width: int, height: int) -> tuple[float, float]:
    if not (0 <= x < width and 0 <= y < height):
        near = [
            str(min(max(round(v), 0), n - 1)) if abs(v) < 1e9 else str(n // 2) for v, n in ((x, width), (y, height))
        ]
        raise InputError(
            f"the point {x:g},{y:g} lies outside the image, which is {width} wide and {height} high; give x in 0-{width - 1}, y in 0-{height - 1}, such as {','.join(near)}"
        )
    return x, y


def resolve_box(box: str | Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """`X0,Y0,X1,Y1`, two corners written like points -> pixels. Raises InputError if it is no box of the image."""
    wanted = "a box; write X0,Y0,X1,Y1, such as 40,60,210,300"
    if isinstance(box, str):
        parts = box.split(",")
        if len(parts) != 4:
            raise InputError(f"{box!r:.80} is not {wanted}")
        (x0, y0), (x1, y1) = resolve_points([",".join(parts[:2]), ",".join(parts[2:])], width, height)
    else:
        numbers = _pixels(box, 4, wanted)
        (x0, y0), (x1, y1) = (_inside(*corner, width, height) for corner in (numbers[:2], numbers[2:]))
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"the box {box} is empty; give its left top corner first, then its right bottom one")
    return x0, y0, x1, y1


def _pixels(values: Sequence[float], count: int, what: str) -> list[float]:
    """Numbers that are no text. Raises InputError for fractions, which as numbers would be pixels of the corner."""
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count:
        raise InputError(f"{values!r:.80} is not {what}")
    if all(0 <= v <= 1 for v in numbers) and not all(v.is_integer() for v in numbers):
        written = ",".join(map(str, numbers))
        raise InputError(f"numbers are pixels, and {values!r:.80} reads as fractions; write those as text, '{written}'")
    return numbers
