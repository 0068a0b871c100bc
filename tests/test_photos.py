"""Real photos, where they are at hand: any shape, any orientation, the mask where the click is."""

import json

import pytest
import tiny
import torch
from PIL import Image, ImageOps

from p3s_cli import stages
from p3s_cli.config import MaskConfig
from p3s_cli.sd import images
from p3s_cli.sd.weights import load_tensors
from p3s_cli.segment import select as segment
from p3s_cli.subject import Subject

# EXIF orientation -> how the stored pixels are turned against what is seen
TURNED = {1: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}


def masks(path, task, root, family):
    made = stages.mask(
        path, [tuple(p) for p in task["positive"]], [tuple(p) for p in task["negative"]], root, "thing", family=family
    )
    tensors, _ = load_tensors(made.subject / "references/00/mask.safetensors")
    return tensors["subject"].bool(), tensors["negative"].bool()


@pytest.mark.parametrize(("number", "orientation"), [(0, 1), (4, 6), (8, 8), (12, 3), (16, 6)])
def test_photos_of_any_orientation(photo_data, world, tmp_path, number, orientation):
    record = json.loads((photo_data / "selective_dev/manifest.json").read_text())[number]
    photo = Image.open(photo_data / "selective_dev" / record["image"]).convert("RGB")
    photo.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNED[orientation]
    (photo.transpose(turn) if turn is not None else photo).save(tmp_path / "turned.png", exif=exif)
    task = record["tasks"][0]
    subject, negative = masks(tmp_path / "turned.png", task, tmp_path / "turned", world)
    assert subject.shape == (record["height"], record["width"])
    for mask, points in ((subject, task["positive"]), (negative, task["negative"])):
        assert all(mask[int(y), int(x)] for x, y in points)
    assert not (subject & negative).any()
    plain = masks(tmp_path / "plain.png", task, tmp_path / "plain", world)
    assert torch.equal(subject, plain[0]) and torch.equal(negative, plain[1])


def test_a_tall_photo(photo_data, world, tmp_path):
    record = json.loads((photo_data / "selective_dev/manifest.json").read_text())[2]
    Image.open(photo_data / "selective_dev" / record["image"]).transpose(Image.Transpose.TRANSPOSE).save(
        tmp_path / "tall.png"
    )
    task = {k: [p[::-1] for p in record["tasks"][0][k]] for k in ("positive", "negative")}
    subject, _ = masks(tmp_path / "tall.png", task, tmp_path / "tall", world)
    assert subject.shape == (record["width"], record["height"])
    assert all(subject[int(y), int(x)] for x, y in task["positive"])


@pytest.mark.parametrize("number", [0, 18])
def test_masks_of_real_photos_follow_swaps_mirrors_sizes_and_ignore_the_order_of_clicks(photo_data, world, number):
    record = json.loads((photo_data / "selective_dev/manifest.json").read_text())[number]
    photo = Image.open(photo_data / "selective_dev" / record["image"]).convert("RGB")
    tower = world.mask_tower(str(photo_data / "vision/vit_tiny_patch16_224"))
    first, second = ([tuple(p) for p in (s["point"], s["extra_points"][0])] for s in record["subjects"][:2])

    def select_in(picture, positive, negative):
        pixels = images.to_tensor(picture)
        fractions = [
            [((x + 0.5) / photo.width, (y + 0.5) / photo.height) for x, y in side] for side in (positive, negative)
        ]
        return segment.select(pixels, tower.patches(pixels), *fractions, MaskConfig())

    made = select_in(photo, first, second)
    swapped, reordered = select_in(photo, second, first), select_in(photo, first[::-1], second[::-1])
    assert torch.equal(made.subject, swapped.negative) and torch.equal(made.negative, swapped.subject)
    assert torch.equal(made.subject, reordered.subject) and torch.equal(made.negative, reordered.negative)
    mirror = [[(photo.width - 1 - x, y) for x, y in side] for side in (first, second)]
    mirrored = select_in(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *mirror)
    # not equal: a ViT's positions know left from right, and its grid another size; seen were 0.94 to 1.00
    assert overlap(mirrored.subject.flip(1), made.subject) > 0.9
    larger = select_in(photo.resize((1152, 768), Image.Resampling.BICUBIC), first, second).subject
    fitted = torch.nn.functional.interpolate(larger[None, None].float(), size=made.subject.shape, mode="area")[0, 0]
    assert overlap(fitted > 0.5, made.subject) > 0.9


def overlap(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def test_a_photo_masked_when_its_colour_profile_was_not_heeded_is_that_photo(tmp_path, tiny_family, monkeypatch):
    """Its mask is made anew, from its true colours; a second look at it would be no second reference."""
    photo, root = tiny.photo(tmp_path / "two.png"), tmp_path / "it"
    mask = lambda: stages.mask(photo, ["18,32"], ["46,32"], root, "thing", family=tiny_family)  # noqa: E731
    monkeypatch.setattr(images, "_managed", lambda image: image)
    mask()
    (before,) = Subject.open(root).manifest.references
    monkeypatch.setattr(images, "_managed", lambda image: ImageOps.invert(image.convert("RGB")))
    assert not mask().unchanged and mask().unchanged
    (after,) = Subject.open(root).manifest.references
    assert after.photo_sha256 != before.photo_sha256 and after.folder == before.folder
    assert images.pixel_hash(images.load_image(photo)) == after.photo_sha256
