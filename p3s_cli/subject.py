"""The subject directory: who made which file from what, and what is stale. No torch in here.

dog/
  subject.json                     the manifest (`manifest.py`)
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
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from p3s_cli.atomic import committing, replacing, sha256
from p3s_cli.config import PAPER_CONTROL, read_control
from p3s_cli.errors import InputError, P3SError, first_reason
from p3s_cli.manifest import MANIFEST, Manifest, Reference, Stage, mask_command, parse, read_manifest

CONTROL = "control/control.safetensors"
_TUNED = ("base", "base_fingerprint")  # settings without which a control is nobody's


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
                Manifest.model_validate(parse(text))
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
        return digest(self._masks(), self.manifest.class_word, self.manifest.identifier, base_fingerprint)

    def masks(self) -> str:
        """What the masks are, whatever is tuned on them."""
        return digest(self._masks())

    def _masks(self) -> list[dict[str, str] | None]:
        return [r.mask.artifacts if r.mask else None for r in self.manifest.references]

    def check_masks(self) -> None:
        """Raises InputError with the command to run, if a reference's mask is missing, altered or older than its points."""
        if not self.manifest.references:
            raise InputError(
                f"{self.root} has no reference yet; add one with: p3s mask PHOTO --pos X,Y -o {shlex.quote(str(self.root))}"
            )
        for reference in self.manifest.references:
            stage = reference.mask
            whole = stage is not None and self.intact(stage, *reference.made)
            fits = stage is not None and stage.inputs == self.mask_inputs(reference, stage.settings)
            if whole and fits:
                continue
            photo = self.path(reference.photo_file)
            if not photo.is_file():  # as in what was imported
                raise InputError(
                    f"the mask of {reference.folder} in {self.root} is missing or damaged, and so is its photo; import "
                    "the subject again, or make it anew with p3s mask"
                )
            if self._photo_changed(reference):  # which the command below would take for another photo
                raise InputError(
                    f"{photo} is damaged or was changed since its mask was made; give the photo that it was, in the place of PHOTO: "
                    f"{mask_command(Path('PHOTO'), reference, self.root)}"
                )
            wrong = "is missing or damaged, or a picture of it is" if fits else "does not belong to its points any more"
            raise InputError(
                f"the mask of {reference.folder} {wrong}; refresh it with: {mask_command(photo, reference, self.root)}"
            )

    def _photo_changed(self, reference: Reference) -> bool:
        """Whether the photo is there, and is not the one that `p3s mask` left."""
        stage, name = reference.mask, reference.photo_file
        known = stage is not None and name in stage.artifacts and self.path(name).is_file()
        return known and not self.intact(stage, name)

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

    def check_control(self, base_fingerprint: str, base: str | None = None) -> None:
        """Raises InputError unless the control on disk is whole and belongs to these masks and this base, called `base`."""
        stage, again = self.tuned(), self.finetune_again()
        theirs = stage.settings["base_fingerprint"]
        if theirs != base_fingerprint:
            raise InputError(
                f"the control of {self.root} belongs to another base model ({theirs[:12]}, not "
                f"{base_fingerprint[:12]}); name that model with --model, or run: {self.finetune_again(base)}"
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
        try:
            return self.manifest.finetune is not None and read_control(self._config) == PAPER_CONTROL
        except InputError:  # another method's
            return False

    @property
    def _config(self) -> Any:
        return self.manifest.finetune.settings.get("config") if self.manifest.finetune else None

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

    def finetune_again(self, base: str | None = None) -> str:
        """The command that tunes as it was tuned, for as long and as fast, on that base or on another."""
        made = self.tuned().settings
        config = self._config if isinstance(self._config, dict) else {}
        options = {"model": base or made.get("base"), "vision": made.get("vision") if self.method == "p3s" else None}
        if config.get("steps"):  # but for what learns nothing
            options |= {name: config.get(name) for name in ("steps", "lr")}
        options["memory"] = made.get("memory")
        usual = {"model": self.manifest.model, "vision": "clip", "memory": "auto"}
        given = [f"--{n} {shlex.quote(str(v))}" for n, v in options.items() if v not in (None, usual.get(n))]
        return " ".join([self._finetune_command, *given])


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


def digest(*parts: Any) -> str:
    """sha256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
