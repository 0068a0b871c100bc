"""Stage one: points on a photo -> masks and the photo without its look-alike (P3S eq. 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from p3s_cli import config as settings
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, load
from p3s_cli.stages import reference as reference_work
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import Manifest, Reference, Stage, Subject, resolve_points


@dataclass(frozen=True)
class MaskResult:
    """`areas` are shares of the photo; `filler` is what removed the negative; `pictures` are for the eye."""

    subject: Path
    reference: str
    class_word: str
    class_score: float | None
    areas: dict[str, float]
    filler: str
    warnings: tuple[str, ...]
    pictures: tuple[Path, ...]
    unchanged: bool


def mask(
    photo: Path | str,
    positive: Sequence[str | tuple[float, float]],
    negative: Sequence[str | tuple[float, float]] = (),
    output: Path | str | None = None,
    class_word: str | None = None,
    model: str = "sd15",
    preset: str = "default",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> MaskResult:
    """Points on a photo -> subject and negative masks, and the reference without the negative (P3S eq. 1-3).

    Points are (x, y) pixels of the upright image, or strings "120,88" or "0.3,0.5" (fractions). Makes
    `output` (default `./<stem>/`) or adds a reference to it; the same photo again replaces its points.
    Raises InputError for an unreadable photo, a point outside it, or one place marked both ways.
    """
    report = on_progress or silent
    photo, root = Path(photo), Path(output) if output else Path(Path(photo).stem)
    mask_config, _ = settings.preset(preset)
    picture = images.load_image(photo)
    points = resolve_points(positive, *picture.size), resolve_points(negative, *picture.size)
    reference_work.check_points(*points)
    subject = Subject.open(root) if Subject.exists(root) else None
    family = family or load(subject.manifest.model if subject else model, device, dtype)
    report("loading the vision tower", 0, 3)
    if subject is None:
        subject = Subject(
            root,
            Manifest(
                class_word="?",
                identifier=family.profile.identifier,
                model=family.source,
                vision_fingerprint=family.vision.fingerprint,
            ),
        )
    reference = _reference_for(subject, picture, points)
    options = asdict(mask_config) | {"preset": preset}
    inputs = subject.mask_inputs(reference, options)
    unchanged = bool(
        reference.mask
        and not force
        and reference.mask.inputs == inputs
        and reference.mask.seed == seed
        and subject.intact(reference.mask)
    )
    if not unchanged:
        report("finding the masks", 1, 3)
        made = reference_work.make(family, picture, points, mask_config, seed)
        report("writing", 2, 3)
        reference.mask = reference_work.write(
            subject, reference, picture, made, Stage(inputs=inputs, settings=options, seed=seed, artifacts={})
        )
    if class_word:
        subject.manifest.class_word, subject.manifest.class_score = class_word, None
    elif subject.manifest.class_word == "?":
        subject.manifest.class_word, subject.manifest.class_score = reference_work.guess_class(
            family, picture, subject, reference
        )
    subject.save()
    report("done", 3, 3)
    result = reference.mask.result
    return MaskResult(
        root,
        reference.folder,
        subject.manifest.class_word,
        subject.manifest.class_score,
        result["areas"],
        result["filler"],
        tuple(result["warnings"]),
        tuple(subject.path(n) for n in reference.mask.artifacts if n.endswith(".png")),
        unchanged,
    )


def _reference_for(subject: Subject, picture: Image.Image, points: tuple[list, list]) -> Reference:
    """The reference with this very photo and these points; a new one if the subject does not have the photo yet."""
    sha = images.pixel_hash(picture)
    for reference in subject.manifest.references:
        if reference.photo_sha256 == sha:
            reference.positive, reference.negative = points
            return reference
    folder = f"references/{len(subject.manifest.references):02d}"
    reference = Reference(
        folder=folder,
        photo_sha256=sha,
        width=picture.width,
        height=picture.height,
        positive=points[0],
        negative=points[1],
    )
    subject.manifest.references.append(reference)
    return reference
