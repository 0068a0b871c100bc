"""A case: one masked subject, the prompts to draw it from, and the truth its results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from p3s_cli.benches.entries import References
from p3s_cli.benches.finding import Finder
from p3s_cli.errors import InputError
from p3s_cli.evals.truth import Truth
from p3s_cli.methods.photos import mask_tensors, read_originals
from p3s_cli.methods.views import close_view, look
from p3s_cli.sd import images
from p3s_cli.sd.vision import VisionTower
from p3s_cli.subject import Subject

_PORTRAIT = 256  # pixels
_SPECK = 0.1  # of a negative mask: less than that is no look-alike of its own


@dataclass(frozen=True)
class Prompt:
    """Words with [V], and the labels a reader should find in what comes of them."""

    text: str
    labels: frozenset[str] = frozenset()

    @property
    def plain(self) -> str:
        """Without the identifier, as CLIP-T wants it."""
        return " ".join(self.text.replace("[V]", "").split())


@dataclass(frozen=True)
class Case:
    """`subject` is a masked subject directory that a run copies and never writes to.

    `other` makes the like for references that are shown in another way; a case without one knows only its own.
    """

    subject: Path
    prompts: tuple[Prompt, ...]
    truth: Truth
    other: Callable[[References], Path] | None = None

    @property
    def name(self) -> str:
        return self.truth.subject

    def shown(self, references: References) -> Path:
        """The masked subject directory with these references."""
        return self.other(references) if self.other and references != References() else self.subject


def subject_case(directory: Path, tower: VisionTower, prompts: Sequence[str]) -> Case:
    """A user's own subject: what its references show is the truth, and so is a look-alike that was pointed at.

    `prompts` hold [V], and perhaps `{}` for the class word. Raises InputError if the directory holds no
    whole masks, or a prompt has no [V].
    """
    subject = Subject.open(directory)
    subject.check_masks()
    texts = [p.replace("{}", subject.manifest.class_word) for p in prompts]
    for text in texts:
        if "[V]" not in text:
            raise InputError(f'the prompt "{text}" has no [V] in it; put [V] before the class word')
    real, masked, other = [], [], []
    for reference in subject.manifest.references:
        tensors = mask_tensors(subject, reference)
        photo = images.to_tensor(images.load_image(subject.path(reference.photo_file)))
        chosen, negative = tensors["subject"].bool(), tensors["negative"].bool()
        real.append(_portrait(tensors["inpainted"].float() / 255, chosen))
        masked.append(_portrait(photo * chosen, chosen))
        other += [_portrait(photo, one) for one in _lookalikes(negative, chosen)]
    finder = first_finder(directory, tower)
    truth = Truth(directory.resolve().name, tuple(real), tuple(other), tuple(masked), finder=finder)
    return Case(directory, tuple(map(Prompt, texts)), truth)


def first_finder(directory: Path, tower: VisionTower) -> Finder:
    """Finds the subject by what its first reference shows of it."""
    photo = read_originals(Subject.open(directory))[0]
    return Finder(tower, photo.pixels.float() / 255, photo.mask)


def check_photos(directory: Path, photos: Iterable[Image.Image], otherwise: str) -> None:
    """Raises InputError for a case with other photos, which these would be added to: hours of work may hang on it.

    `otherwise` says so, of the directory.
    """
    if not Subject.exists(directory):
        return
    known = {images.pixel_hash(photo) for photo in photos}
    if any(r.photo_sha256 not in known for r in Subject.open(directory).manifest.references):
        raise InputError(
            f"{directory} has {otherwise}; remove that directory to begin the case anew, or name another folder to work in"
        )


def _lookalikes(negative: Tensor, chosen: Tensor) -> list[Tensor]:
    """The masks (H, W) to take a portrait of each: the negative one, if any, or its parts, but for specks, where the subject
    stands between them and would be in the middle of a portrait of all.
    """
    if not negative.any():
        return []
    rows, columns = torch.where(negative)
    between = chosen[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].sum()
    if between < 0.5 * chosen.sum():
        return [negative]
    labels, count = ndimage.label(negative.numpy())
    parts = [torch.from_numpy(labels == k) for k in range(1, count + 1)]
    return [part for part in parts if part.sum() >= _SPECK * negative.sum()]


def _portrait(photo: Tensor, mask: Tensor) -> Image.Image:
    """The square around what is masked."""
    return images.to_pil(look(photo, close_view(mask), _PORTRAIT, "border").clamp(0, 1))
