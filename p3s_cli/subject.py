"""The subject directory: a versioned manifest, and who made which file from what. No torch in here.

dog/
  subject.json                     the manifest below
  references/00/photo.png          the upright photo, without its EXIF
  references/00/mask.safetensors   similarity maps, masks, inpainted pixels
  references/00/overlay.png, inpainted.png
  control/control.safetensors      the trained control
  control/references.safetensors   what the base's autoencoder makes of each reference
  outputs/                         generated images and their grids
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from p3s_cli.atomic import committing, read_text, replacing, sha256
from p3s_cli.config import PAPER_CONTROL, as_settings
from p3s_cli.errors import InputError, P3SError, first_reason

SCHEMA = 1
MANIFEST = "subject.json"
CONTROL = "control/control.safetensors"
Told = TypeVar("Told", bound=BaseModel)
_TUNED = ("base", "base_fingerprint")  # settings without which a control is nobody's


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


class Subject:
    """A subject directory that has been read. Paths in the manifest are relative to it."""

    def __init__(self, root: Path, manifest: Manifest, found: bool = False):
        self.root, self.manifest, self.found = root, manifest, found

    @classmethod
    def exists(cls, root: Path) -> bool:
        return (root / MANIFEST).is_file()

    @classmethod
    def open(cls, root: Path) -> Subject:
        """Raises InputError if `root` is no subject directory or its manifest does not hold together."""
        return cls(root, read_manifest(root / MANIFEST), found=True)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Path]:
        """Yield a folder for new artifacts; afterwards they and the manifest replace the old ones, all at once.

        Raises P3SError if they cannot be written, or if the subject was removed in the meantime, and InputError
        rather than write a manifest that could not be read again.
        """
        if self.found and not self.exists(self.root):
            raise P3SError(f"{self.root} was removed while it was worked on; nothing was saved")
        with committing(self.root) as folder:
            yield folder
            text = json.dumps(self.manifest.model_dump(), indent=2, sort_keys=True) + "\n"
            try:
                Manifest.model_validate(_parse(text))
            except ValueError as error:
                raise InputError(
                    f"{self.root} was left as it was, for its new manifest could not be read again ({first_reason(error)})"
                ) from error
            with replacing(folder / MANIFEST) as temporary:
                temporary.write_text(text, "utf-8")
        self.found = True

    def path(self, relative: str) -> Path:
        return self.root / relative

    def intact(self, stage: Stage, *needed: str) -> bool:
        """Whether these artifacts of the stage are there, bit for bit."""
        return all(
            n in stage.artifacts and self.path(n).is_file() and sha256(self.path(n)) == stage.artifacts[n]
            for n in needed
        )

    def holds(self, done: Stage | None, wanted: Stage, kind: type[BaseModel], *needed: str) -> bool:
        """Whether this is what is wanted, with the needed files intact and a record that `kind` describes."""
        if done is None or (done.inputs, done.settings, done.seed) != (wanted.inputs, wanted.settings, wanted.seed):
            return False
        return self.intact(done, *needed) and done.told(kind) is not None

    # What each stage depends on. A hash that differs from the one its record holds makes the record stale.

    def mask_inputs(self, reference: Reference, settings: dict) -> str:
        return digest(reference.photo_sha256, reference.positive, reference.negative, reference.box, settings)

    def finetune_inputs(self, base_fingerprint: str) -> str:
        masks = [r.mask.artifacts if r.mask else None for r in self.manifest.references]
        return digest(masks, self.manifest.class_word, self.manifest.identifier, base_fingerprint)

    def check_masks(self) -> None:
        """Raises InputError with the command to run, if a reference's mask is missing, altered or older than its points."""
        if not self.manifest.references:
            raise InputError(f"{self.root} has no reference yet; add one with: p3s mask PHOTO --pos X,Y -o {self.root}")
        for reference in self.manifest.references:
            stage = reference.mask
            whole = stage is not None and self.intact(stage, *reference.made)
            if stage is None or stage.inputs != self.mask_inputs(reference, stage.settings) or not whole:
                photo = self.path(reference.photo_file)
                if not photo.is_file():  # as in what was imported
                    raise InputError(
                        f"the mask of {reference.folder} in {self.root} is missing or damaged, and so is its photo; import "
                        "the subject again, or make it anew with p3s mask"
                    )
                raise InputError(
                    f"the mask of {reference.folder} does not belong to its points any more; refresh it with: {mask_command(photo, reference, self.root)}"
                )

    def tuned(self) -> Stage:
        """The finetune record. Raises InputError, with the command to run, before there is one."""
        stage = self.manifest.finetune
        if stage is None:
            raise InputError(f"{self.root} has not been tuned yet; run: {self._finetune_command}")
        if not all(isinstance(stage.settings.get(name), str) for name in _TUNED) or CONTROL not in stage.artifacts:
            raise InputError(
                f"the record of {self.root}'s tuning is not one that p3s wrote; run: {self._finetune_command} --force"
            )
        return stage

    def check_control(self, base_fingerprint: str) -> None:
        """Raises InputError unless the control on disk is whole and belongs to these masks and this base."""
        stage, again = self.tuned(), self._finetune_again
        theirs = stage.settings["base_fingerprint"]
        if theirs != base_fingerprint:
            raise InputError(
                f"the control of {self.root} belongs to another base model ({theirs[:12]}, not "
                f"{base_fingerprint[:12]}); name that model with --model, or run: {self._finetune_command}"
            )
        if stage.inputs != self.finetune_inputs(base_fingerprint):
            raise InputError(f"{self.root} has changed since it was tuned (points, masks or words); run: {again}")
        if not self.intact(stage, CONTROL):
            raise InputError(f"the control of {self.root} is missing or damaged; run: {again} --force")

    @property
    def method(self) -> str:
        """What the subject is tuned with; P3S before it is."""
        stage = self.manifest.finetune
        return str(stage.settings.get("method", "p3s")) if stage else "p3s"

    @property
    def as_printed(self) -> bool:
        """Whether it is tuned by the preset `paper`, and is drawn so: the copy at every step, two passes of guidance."""
        config = self.manifest.finetune.settings.get("config") if self.manifest.finetune else None
        return isinstance(config, dict) and config.get("control") == as_settings(PAPER_CONTROL)

    @property
    def _finetune_command(self) -> str:
        stage, options = self.manifest.finetune, []
        if self.method != "p3s":
            options = ["--method", shlex.quote(self.method)]
        if self.as_printed:
            options += ["--preset", "paper"]
        if stage and stage.seed:
            options += ["--seed", str(stage.seed)]
        return " ".join(["p3s", "finetune", shlex.quote(str(self.root)), *options])

    @property
    def _finetune_again(self) -> str:
        """The command that tunes as it was tuned, on that base, for as long and as fast."""
        made = self.tuned().settings
        config = made["config"] if isinstance(made.get("config"), dict) else {}
        options = {"model": made.get("base"), "vision": made.get("vision") if self.method == "p3s" else None}
        options |= {name: config.get(name) for name in ("steps", "lr")}
        usual = {"model": self.manifest.model, "vision": "clip"}
        given = [f"--{n} {shlex.quote(str(v))}" for n, v in options.items() if v and v != usual.get(n)]
        return " ".join([self._finetune_command, *given])


def read_manifest(path: Path) -> Manifest:
    """Raises InputError if it is missing, of a schema this version does not read, or does not hold together."""
    try:
        data = _parse(read_text(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path.parent} is not a subject directory (it has no {path.name}); make one with: p3s mask PHOTO --pos X,Y -o {path.parent}"
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


def _parse(text: str) -> Any:
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(number: str) -> float:
    """Python's JSON reads NaN, Infinity and 1e999, and no JSON that is written back may hold them."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number")
    return value


def mask_layout(reference: Reference) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """What a reference's mask.safetensors holds: name -> dtype and shape, None for any size."""
    height, width = reference.height, reference.width
    return {
        "positive_map": ("F32", (None, None)),
        "negative_map": ("F32", (None, None)),
        "subject": ("U8", (height, width)),
        "negative": ("U8", (height, width)),
        "inpainted": ("U8", (3, height, width)),
    }


# in a mask.safetensors of before, which held what is a base's and no photo's
FORMER_LATENT: tuple[str, tuple[int | None, ...]] = ("F32", (4, None, None))


def hashes(folder: Path, *names: str) -> dict[str, str]:
    """sha256 of artifacts just written, by relative path."""
    return {name: sha256(folder / name) for name in names}


def mask_command(photo: Path, reference: Reference, root: Path) -> str:
    """The command that makes this reference's mask again."""
    points = [
        f"--{flag} {x:g},{y:g}"
        for flag, group in (("pos", reference.positive), ("neg", reference.negative))
        for x, y in group
    ]
    box = [f"--box {','.join(f'{v:g}' for v in reference.box)}"] if reference.box else []
    made = reference.mask.settings if reference.mask else {}
    usual = {"preset": "default", "vision": "clip"}
    options = [f"--{o} {shlex.quote(str(made[o]))}" for o in usual if o in made and made[o] != usual[o]]
    if made.get("inpainter_chosen") and made.get("inpainter"):
        options.append(f"--inpainter {shlex.quote(str(made['inpainter']))}")
    if reference.mask and reference.mask.seed:
        options.append(f"--seed {reference.mask.seed}")
    return f"p3s mask {shlex.quote(str(photo))} {' '.join([*points, *box, *options])} -o {shlex.quote(str(root))}"


def digest(*parts: Any) -> str:
    """sha256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
