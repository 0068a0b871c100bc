"""The manifest of a subject directory: its schema, how it is read, and what its records say. No torch in here."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from p3s_cli.atomic import read_text
from p3s_cli.errors import InputError, first_reason

SCHEMA = 1
SEEN_BY = "vision_fingerprint"  # the setting, of a mask or a tuning, that tells the weights of its tower
MANIFEST = "subject.json"
Told = TypeVar("Told", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _inside(name: str) -> str:
    """A relative path that stays inside the subject directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r:.80} is not a path inside the subject directory")
    return name


class Stage(_Strict):
    """A finished stage: what went in (as one hash), the settings and seed, the files that came out, with sha256."""

    inputs: str
    settings: dict[str, Any]
    seed: int
    artifacts: dict[Annotated[str, AfterValidator(_inside)], str]
    result: dict[str, Any] = Field(default_factory=dict)

    def told(self, kind: type[Told]) -> Told | None:
        """The result as `kind` describes it; None for a record that no p3s wrote."""
        try:
            return kind.model_validate(self.result)
        except ValidationError:
            return None


class Reference(_Strict):
    """One photo of the subject; points are (x, y) pixels of the upright image."""

    folder: str = Field(pattern=r"^references/[0-9]{2,6}$")
    photo_sha256: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    positive: list[tuple[float, float]] = Field(min_length=1)
    negative: list[tuple[float, float]] = Field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    mask: Stage | None = None

    @property
    def photo_file(self) -> str:
        return f"{self.folder}/photo.png"

    @property
    def mask_file(self) -> str:
        return f"{self.folder}/mask.safetensors"

    @property
    def maps_file(self) -> str:
        return f"{self.folder}/maps.png"

    @property
    def made(self) -> tuple[str, ...]:
        """What `p3s mask` made of it; the tensors among that, whatever the record says."""
        return (self.mask_file, *(self.mask.artifacts if self.mask else ()))


class Manifest(_Strict):
    schema_version: Literal[1] = SCHEMA
    class_word: str = Field(min_length=1)
    class_score: float | None = None  # CLIP's score of a guessed class word, None for one that was given
    identifier: str = Field(min_length=1)
    model: str
    references: list[Reference] = Field(default_factory=list)
    finetune: Stage | None = None
    generated: list[Stage] = Field(default_factory=list)

    @property
    def name(self) -> str:
        """What a prompt calls the subject."""
        return f"{self.identifier} {self.class_word}"


def read_manifest(path: Path) -> Manifest:
    """Raises InputError if it is missing, of a schema this version does not read, or does not hold together."""
    try:
        data = parse(read_text(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path.parent} is not a subject directory (it has no {path.name}); make one with: p3s mask PHOTO --pos X,Y -o {shlex.quote(str(path.parent))}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or make the subject again") from error
    schema = data.get("schema_version") if isinstance(data, dict) else None
    if type(schema) is int and schema != SCHEMA:
        raise InputError(
            f"{path} is not a manifest this version reads: its schema is {schema!s:.20}, ours {SCHEMA}; use the p3s that wrote it"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise InputError(
            f"{path} is not a manifest this version reads ({first_reason(error)}); restore it or make the subject again"
        ) from error


def parse(text: str) -> Any:
    """JSON as a manifest has it. Raises ValueError for anything else, numbers that are not finite included."""
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(number: str) -> float:
    """Python's JSON reads NaN, Infinity and 1e999, and no JSON that is written back may hold them."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number")
    return value


def mask_command(photo: Path, reference: Reference, root: Path) -> str:
    """The command that makes this reference's mask again."""
    points = [
        f"--{flag} {_written(point, reference)}"
        for flag, group in (("pos", reference.positive), ("neg", reference.negative))
        for point in group
    ]
    corners = (reference.box[:2], reference.box[2:]) if reference.box else ()
    box = [f"--box {','.join(_written(corner, reference) for corner in corners)}"] if corners else []
    made = reference.mask.settings if reference.mask else {}
    usual = {"preset": "default", "vision": "clip"}
    options = [f"--{o} {shlex.quote(str(made[o]))}" for o in usual if o in made and made[o] != usual[o]]
    if made.get("inpainter_chosen") and made.get("inpainter"):
        options.append(f"--inpainter {shlex.quote(str(made['inpainter']))}")
    if reference.mask and reference.mask.seed:
        options.append(f"--seed {reference.mask.seed}")
    return f"p3s mask {shlex.quote(str(photo))} {' '.join([*points, *box, *options])} -o {shlex.quote(str(root))}"


def _written(point: tuple[float, float], reference: Reference) -> str:
    """Pixels as a command takes them, to the last bit, for other points would make another mask; as fractions those of the
    first pixel, whose numbers would be read as that."""
    x, y = point
    if 0 <= x <= 1 and 0 <= y <= 1 and not (x.is_integer() and y.is_integer()):
        return f"{x / (reference.width - 1):.8f},{y / (reference.height - 1):.8f}"
    return ",".join(str(int(v)) if v.is_integer() else repr(v) for v in (x, y))
