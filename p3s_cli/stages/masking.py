"""Stage one: points on a photo -> masks and the photo without its look-alike (P3S eq. 1-3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import BaseModel, Field

from p3s_cli import config as settings
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import writing
from p3s_cli.manifest import SEEN_BY, Manifest, Reference, Stage
from p3s_cli.sd import images, text
from p3s_cli.sd.determinism import exact
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.fingerprints import filler_fingerprint
from p3s_cli.sd.profile import located
from p3s_cli.stages import reference as work
from p3s_cli.stages.clicks import PhotoClicks, read_clicks, twice
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import Subject, digest

_UNNAMED = "?"  # the class word of a subject that has none yet; no word that could be given


@dataclass(frozen=True)
class MaskResult:
    """`areas` are shares of the photo; `confidence` in [0, 1] is how well Otsu's threshold parts the photo;
    `filler` is what removed the negative; `pictures` are for the eye."""

    subject: Path
    reference: str
    class_word: str
    class_score: float | None
    areas: dict[str, float]
    confidence: float
    filler: str
    warnings: tuple[str, ...]
    pictures: tuple[Path, ...]
    unchanged: bool


def mask(
    photo: Path | str,
    positive: Sequence[str | tuple[float, float]] = (),
    negative: Sequence[str | tuple[float, float]] = (),
    output: Path | str | None = None,
    class_word: str | None = None,
    box: str | Sequence[float] | None = None,
    model: str | None = None,
    vision: str = "clip",
    inpainter: str | None = None,
    preset: str = "default",
    config: settings.MaskConfig | None = None,
    truth: work.Truth | None = None,
    inpaint: bool = True,
    maps: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    deterministic: bool = False,
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> MaskResult:
    """Points on a photo -> subject and negative masks, and the reference without the negative (P3S eq. 1-3).

    Points are (x, y) pixels of the upright image, or strings "120,88" or "0.3,0.5" (fractions); a box
    (x0, y0, x1, y1) bounds the subject and, without a positive point, stands for one at its middle. Makes
    `output` (default `./<stem>/`) or adds a reference to it; the same photo again replaces its points.
    For comparisons: `config` overrides the preset's settings, `truth` holds masks that are known, and without
    `inpaint` the look-alike stays where it is.
    The base is `model`, sd15 where none is named, and for all references of a subject that of the first.
    `vision` names the tower the masks are read from, `inpainter` another U-Net to remove the negative with; `maps` also writes eq. 1's similarity maps as a picture.
    Raises InputError for an unreadable photo, a point outside it, one place marked both ways, or another `model`.
    """
    report = on_progress or silent
    photo, root = Path(photo), Path(output) if output else Path(Path(photo).stem)
    mask_config = config or settings.preset(preset)[0]
    class_word = text.class_word(class_word) if class_word is not None else None
    picture = images.load_image(photo)
    clicks = work.Clicks.read(positive, negative, box, *picture.size)
    with writing(root, "p3s mask"), exact(deterministic):
        subject = Subject.open(root) if Subject.exists(root) else None
        family = family or load(_base(subject, model), device, dtype, inpainter=inpainter)
        report("loading the vision tower", 0, 3)
        vision = located(vision)
        tower = family.mask_tower(vision)
        if subject is None:
            manifest = Manifest(class_word=_UNNAMED, identifier=family.profile.identifier, model=family.source)
            subject = Subject(root, manifest)
        if model:
            subject.manifest.model = family.source  # where it lies now
        reference = _reference_for(subject, photo, picture, clicks)
        options = settings.as_settings(mask_config) | {
            "preset": preset,
            "vision": vision,
            SEEN_BY: tower.fingerprint,
            "inpainter": family.profile.inpainter,
        }
        if truth is not None:
            options["truth"] = digest(truth.subject.tolist(), truth.negative.tolist())
        if not inpaint:
            options["inpaint"] = False
        if family.inpainter_chosen:
            options["inpainter_chosen"] = True
        fills = inpaint and bool(clicks.negative or truth is not None)
        stage = _stage(subject, reference, options, seed, family if fills else None)
        renamed = _rename(subject, class_word) if class_word else []
        unchanged = not force and subject.holds(reference.mask, stage, _Made, *reference.made)
        with subject.changing() as folder:
            if not unchanged:
                report("finding the masks", 1, 3)
                made = work.make(family, tower, picture, clicks, mask_config, seed, truth, inpaint)
                report("writing", 2, 3)
                # once more, as what fills in may have been fetched only now
                stage = _stage(subject, reference, options, seed, family if fills else None)
                reference.mask = work.write(folder, reference, picture, made, stage)
                _guess(subject, family, picture, made)
        if not (unchanged or maps):  # those of former points
            subject.path(reference.maps_file).unlink(missing_ok=True)
        report("done", 3, 3)
        result = _result(subject, reference, unchanged)
        drawn = (work.write_maps(subject, reference, picture),) if maps else ()
        return replace(result, pictures=(*result.pictures, *drawn), warnings=(*result.warnings, *renamed))


def _base(subject: Subject | None, model: str | None) -> str:
    """The base that is asked for, or the subject's own. Raises InputError if these are two, or it is gone and none is asked for."""
    if subject is None:
        return model or "sd15"
    own = subject.manifest.model
    gone = Path(own).is_absolute() and not Path(own).exists()
    if gone and model is None:
        raise InputError(f"{subject.root} is made on {own}, which is not there any more; name its place with --model")
    if not gone and model is not None and located(model) != own:
        raise InputError(
            f"{subject.root} is made on {own}, and so is every reference of it; leave out --model, or make another "
            "subject with -o"
        )
    return model or own


def _stage(subject: Subject, reference: Reference, options: dict, seed: int, filling: Family | None) -> Stage:
    """The record of a mask that is yet to be made; `filling` is whose models fill in for a look-alike, if there is one."""
    weights = filler_fingerprint(filling.profile) if filling else None
    options = options | ({"inpainter_fingerprint": weights} if weights else {})
    return Stage(inputs=subject.mask_inputs(reference, options), settings=options, seed=seed, artifacts={})


def _rename(subject: Subject, class_word: str) -> list[str]:
    """Set the class word. Returns a sentence if it was another one."""
    before, tuned = subject.manifest.class_word, subject.manifest.finetune
    subject.manifest.class_word, subject.manifest.class_score = class_word, None
    if before in (_UNNAMED, class_word):
        return []
    return [f"the class word was {before} and is {class_word} now" + ("; tune the subject again" if tuned else "")]


class _Made(BaseModel):
    """What a record says of masks that are done."""

    areas: dict[Literal["subject", "negative"], float] = Field(min_length=2)
    confidence: float
    filler: str
    warnings: list[str]


def _reference_for(subject: Subject, photo: Path, picture: Image.Image, clicks: work.Clicks) -> Reference:
    """The reference with this very photo and these clicks; a new one if the subject does not have the photo yet."""
    sha = images.pixel_hash(picture)
    known = [r.photo_sha256 for r in subject.manifest.references]
    # a former p3s threw the photo's colour profile away
    former = images.pixel_hash(images.load_image(photo, managed=False)) if known and sha not in known else sha
    for reference in subject.manifest.references:
        if reference.photo_sha256 in (sha, former):
            reference.photo_sha256 = sha
            reference.positive, reference.negative, reference.box = clicks.positive, clicks.negative, clicks.box
            return reference
    reference = Reference(
        folder=f"references/{len(subject.manifest.references):02d}",
        photo_sha256=sha,
        width=picture.width,
        height=picture.height,
        positive=clicks.positive,
        negative=clicks.negative,
        box=clicks.box,
    )
    subject.manifest.references.append(reference)
    return reference


def _guess(subject: Subject, family: Family, picture: Image.Image, made: work.Masked) -> None:
    """CLIP's guess of the class word, for a subject that has none yet."""
    if subject.manifest.class_word == _UNNAMED:
        guess, score = work.guess_class(family, picture, made.selection.subject)
        subject.manifest.class_word, subject.manifest.class_score = guess, score


def _result(subject: Subject, reference: Reference, unchanged: bool) -> MaskResult:
    assert reference.mask is not None
    made = reference.mask.told(_Made)
    assert made is not None
    return MaskResult(
        subject=subject.root,
        reference=reference.folder,
        class_word=subject.manifest.class_word,
        class_score=subject.manifest.class_score,
        areas=dict(made.areas),
        confidence=made.confidence,
        filler=made.filler,
        warnings=tuple(made.warnings),
        pictures=tuple(subject.path(n) for n in reference.mask.artifacts if n.endswith(".png")),
        unchanged=unchanged,
    )


_LOADING = ("device", "dtype", "inpainter")


def mask_many(
    photos: Sequence[Path | str],
    points: Path | str | None = None,
    output: Path | str | None = None,
    on_progress: Progress | None = None,
    **options,
) -> list[MaskResult]:
    """`mask` for many photos with the clicks of a points file (`clicks.read_clicks`), the models loaded once.

    Without `output` each photo becomes a subject of its own; with it, all are references of one. Other
    options are those of `mask`. Raises InputError for several photos without a points file, for two that would be
    one subject, and for a subject of two class words; for clicks that are wrong, before the first photo is masked.
    """
    photos = [Path(p) for p in photos]
    if points is None:
        raise InputError("several photos need their points in a file; write one and name it with --points")
    if options.get("positive") or options.get("negative") or options.get("box"):
        raise InputError("points are given both in --points and on the command line; choose one")
    clicks = read_clicks(Path(points), photos)
    if output is None and (stem := twice(p.stem for p in photos)):
        raise InputError(f"two of the photos would be the subject {stem}; mask one of them by itself, with -o")
    word, model = options.pop("class_word", None), options.pop("model", None)
    _check_clicks(photos, clicks)
    if output is not None and not word and len(words := sorted({c.class_word for c in clicks if c.class_word})) > 1:
        raise InputError(f"{points} calls one subject {' and '.join(words)}; write one class, or leave out --output")
    for name in ("positive", "negative", "box"):
        options.pop(name, None)
    family, names = options.pop("family", None), {n: options.pop(n) for n in _LOADING if n in options}
    loaded: dict[str, Family] = {}
    results = []
    for photo, click in zip(photos, clicks, strict=True):
        root = Path(output or photo.stem)
        with _naming(photo):
            base = _base(Subject.open(root) if Subject.exists(root) else None, model)
            if family is None and base not in loaded:
                loaded[base] = load(base, **names)
            given = {"positive": click.positive, "negative": click.negative, "box": click.box}
            given |= {"class_word": word or click.class_word, "model": model, "family": family or loaded[base]}
            results.append(mask(photo, output=root, on_progress=on_progress, **given, **options))
    return results


def _check_clicks(photos: Sequence[Path], clicks: Sequence[PhotoClicks]) -> None:
    for photo, click in zip(photos, clicks, strict=True):
        with _naming(photo):
            text.class_word(click.class_word or "thing")
            work.Clicks.read(click.positive, click.negative, click.box, *images.load_image(photo).size)


@contextlib.contextmanager
def _naming(photo: Path) -> Iterator[None]:
    """Of many photos, which one a sentence is about."""
    try:
        yield
    except P3SError as error:
        raise type(error)(str(error) if str(photo) in str(error) else f"{photo}: {error}") from error
