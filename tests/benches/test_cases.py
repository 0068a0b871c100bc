"""What a picture of a user's own subject is held against."""

import base64
import io

import torch
from PIL import Image

from p3s_cli.benches.cases import _lookalikes
from p3s_cli.evals.report import _picture
from p3s_cli.evals.truth import Result
from p3s_cli.sd import images


def square(*columns):
    mask = torch.zeros(40, 120, dtype=torch.bool)
    for column in columns:
        mask[10:30, column : column + 20] = True
    return mask


def test_look_alikes_on_both_sides_are_shown_apart():
    """One crop around both would have the subject in its middle; a speck is no look-alike."""
    subject, both = square(50), square(5, 95)
    both[0, 60] = True
    assert [part.nonzero()[:, 1].min().item() for part in _lookalikes(both, subject)] == [5, 95]
    (together,) = _lookalikes(square(5, 30), square(80))  # in parts, beside the subject
    assert together.sum() == 2 * 400
    assert _lookalikes(square(), subject) == []


def test_pictures_are_scored_upright(tmp_path):
    """As the photos are that they are held against."""
    picture = images.to_pil(torch.rand(3, 24, 48, generator=torch.Generator().manual_seed(0)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when shown
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert Result(tmp_path / "a.png", "", "", 0).open().tobytes() == picture.tobytes()
    shown = _picture(tmp_path / "a.png", 1000, "shown").split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == picture.size  # on the page as well
