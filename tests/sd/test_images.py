"""Files in every odd form become upright RGB, or one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image

from p3s_cli.errors import InputError
from p3s_cli.sd.images import decode, encode, load_image, read_metadata, save_png, to_pil, to_tensor


def picture():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[20:, 30:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


# What a camera stores for each EXIF orientation so that the viewer sees `picture()`.
STORED = {
    1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    stored = picture()
    for step in STORED[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "p.png")), np.asarray(picture()))


def test_transparency_lies_over_white_and_16_bit_is_scaled(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((5, 5)) == (255, 255, 255)
    Image.fromarray(np.full((20, 20), 65535 // 2, dtype=np.uint16)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").getpixel((5, 5)) == (127, 127, 127)
    Image.new("CMYK", (20, 20)).save(tmp_path / "c.jpg")
    assert load_image(tmp_path / "c.jpg").mode == "RGB"


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match="x.png"):
        load_image(tmp_path / "x.png")


def test_truncated_missing_and_tiny_files_are_refused(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "t.jpg")
    (tmp_path / "t.jpg").write_bytes((tmp_path / "t.jpg").read_bytes()[:600])
    Image.new("RGB", (1, 400)).save(tmp_path / "s.png")
    for name, words in (("t.jpg", "cannot be read"), ("gone.jpg", "does not exist"), ("s.png", "1 x 400")):
        with pytest.raises(InputError, match=words):
            load_image(tmp_path / name)


def test_png_carries_its_settings_and_leaves_no_litter(tmp_path):
    save_png(tmp_path / "o.png", picture(), {"prompt": "a dög", "seed": 3})
    assert read_metadata(tmp_path / "o.png") == {"prompt": "a dög", "seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["o.png"]
    assert read_metadata(tmp_path / "nothing.png") is None


def test_pixels_round_trip():
    assert np.array_equal(np.asarray(to_pil(to_tensor(picture()))), np.asarray(picture()))


def test_latents_are_scaled_like_the_pipeline_and_decode_to_the_same_picture(world, pair):
    pixels = to_tensor(pair[0])
    latent = encode(world.vae, pixels[None])
    assert latent.shape == (1, 4, 16, 16)
    raw = world.vae.encode(2 * pixels[None] - 1).latent_dist.mean
    torch.testing.assert_close(latent, raw * world.vae.config.scaling_factor)
    psnr = -10 * torch.log10((decode(world.vae, latent)[0] - pixels).square().mean())
    assert psnr > 20
