"""What methods see of a subject's references: the photo without its look-alike, or the photo itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.manifest import Reference
from p3s_cli.methods.views import View, close_view, look, look_mask
from p3s_cli.sd import images
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import FORMER_LATENT, Subject, mask_layout


@dataclass(frozen=True)
class Photo:
    """A reference: pixels (3, H, W), in bytes, for there may be many large ones, and the subject's mask (H, W) bool."""

    pixels: Tensor
    mask: Tensor

    def seen(self, view: View, size: int | tuple[int, int], beyond: str | None = None) -> Tensor:
        """The photo through the view, (3, size, size) in [0, 1].

        Beyond the photo's edge it is mirrored, or, where a mirror would show the subject twice, its outermost pixels go on;
        unless `beyond` says which (`views.look`).
        """
        if beyond is None:
            mirrored = look(self.mask.float()[None], view, size)
            twin = (mirrored - look_mask(self.mask, view, size)).max() > 0.5
            beyond = "border" if twin else "reflection"
        return look(self.pixels.float() / 255, view, size, beyond)


def mask_tensors(subject: Subject, reference: Reference) -> dict[str, Tensor]:
    """What `p3s mask` wrote of a reference. Raises InputError if it is not whole."""
    sha = reference.mask.artifacts.get(reference.mask_file) if reference.mask else None
    layout, former = mask_layout(reference), {"latent": FORMER_LATENT}
    tensors, _ = load_tensors(subject.path(reference.mask_file), layout, sha, perhaps=former)
    return {name: tensors[name] for name in layout}


def read_photos(subject: Subject, most: int | None = None) -> list[Photo]:
    """The inpainted references, or the first of them, with their masks, as `p3s mask` left them."""
    photos = []
    for reference in subject.manifest.references[:most]:
        tensors = mask_tensors(subject, reference)
        photos.append(Photo(tensors["inpainted"], tensors["subject"].bool()))
    return photos


def read_originals(subject: Subject) -> list[Photo]:
    """The references as they were taken, look-alike and all, with the subject's mask. Raises InputError where they are not here."""
    photos = []
    for reference in subject.manifest.references:
        if not subject.path(reference.photo_file).is_file():
            raise InputError(
                f"{subject.path(reference.photo_file)} is missing, and this method learns from photos, which no export holds; "
                "mask the photo anew with p3s mask, or tune with --method p3s"
            )
        tensors = mask_tensors(subject, reference)
        pixels = images.to_bytes(images.load_image(subject.path(reference.photo_file)))
        photos.append(Photo(pixels, tensors["subject"].bool()))
    return photos


def crops(subject: Subject, size: int) -> Tensor:
    """Square crops (K, 3, size, size) around the subject, one of each original reference.

    What a person would cut out for a method that cannot be told which of two things is meant. Beyond the photo's edge
    its outermost pixels go on: a mirror would show the subject twice.
    """
    return torch.stack([p.seen(close_view(p.mask), size, "border") for p in read_originals(subject)])
