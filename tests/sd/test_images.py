"""Files in every odd form become upright RGB, or one sentence."""

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageCms

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
    "content",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n broken",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"PK\3\4" + bytes(99),
    ],
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


def noise(mode="RGB", size=(40, 30)):
    return Image.effect_noise(size, 80).convert(mode)


def test_every_mode_of_the_three_formats_becomes_rgb(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        noise(mode).save(tmp_path / "m.png")
        assert load_image(tmp_path / "m.png").mode == "RGB"
    for mode, name in (("L", "a.jpg"), ("CMYK", "a.jpg"), ("RGBA", "a.webp")):
        noise(mode).save(tmp_path / name)
        assert load_image(tmp_path / name).size == (40, 30)
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    assert load_image(tmp_path / "p.png").getpixel((3, 3)) == (255, 255, 255)


def test_16_bit_colour_is_scaled_not_clipped(tmp_path):
    """Written by hand, as Pillow writes no 16-bit RGB: half of 65535 is half of 255."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">3H", 32768, 65535, 256) * 20
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 20)) + chunk(b"IEND", b"")
    (tmp_path / "h.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert load_image(tmp_path / "h.png").getpixel((9, 9)) == (128, 255, 1)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    """Ten thousand times the limit announced in a header of a few bytes; and just above it, for real."""
    import struct
    import zlib

    for side in (2**30, 10_001):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        (tmp_path / "bomb.png").write_bytes(start + struct.pack(">I", 0) + b"IDAT")
        with pytest.raises(InputError, match="bomb.png"):
            load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_animations_are_refused_and_phones_many_picture_jpegs_are_not(tmp_path, name):
    noise().save(tmp_path / name, save_all=True, append_images=[noise("L").convert("RGB")])
    with pytest.raises(InputError, match=f"{name} is animated"):
        load_image(tmp_path / name)
    noise().save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[noise()])
    assert load_image(tmp_path / "phone.jpg").size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "EPS", "ICO"])
def test_other_formats_under_a_good_name_are_refused(tmp_path, kind):
    noise().save(tmp_path / "x.png", format=kind)
    with pytest.raises(InputError, match="x.png is not a JPEG, PNG or WebP"):
        load_image(tmp_path / "x.png")


def test_only_files_are_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(InputError, match="is not a file"):
            load_image(path)


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


def test_an_autoencoder_kept_off_the_device_is_given_pixels_where_its_hook_brings_it():
    """As diffusers' offloading does; the meta device stands for a card, and takes no tensor of another device."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    accelerate.cpu_offload_with_hook(vae, "meta")
    assert vae.device.type == "cpu"
    assert encode(vae, torch.zeros(1, 3, 16, 16)).device.type == "meta"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_that_an_embedded_profile_says(tmp_path, mode):
    """sRGB with red and blue exchanged, under another name: what its taker sees as red is written as blue."""
    exchanged = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    count = int.from_bytes(exchanged[128:132], "big")
    table, rest = exchanged[: 132 + 12 * count], exchanged[132 + 12 * count :]
    for a, b in ((b"rXYZ", b"?"), (b"bXYZ", b"rXYZ"), (b"?", b"bXYZ")):
        table = table.replace(a, b)
    picture = Image.new("RGB", (20, 30), (40, 60, 200))
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", icc_profile=table + rest, exif=exif)
    seen = load_image(tmp_path / "a.png")
    assert seen.size == (30, 20) and np.abs(np.asarray(seen).astype(int) - (200, 60, 40)).max() <= 2
    for name, profile in (
        ("plain", None),
        ("srgb", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("broken", b"??"),
    ):
        picture.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert load_image(tmp_path / f"{name}.png").getpixel((5, 5)) == (40, 60, 200)


def linear_grey() -> bytes:
    """An ICC profile of grey light itself: 128 is half of white's light."""

    def text(kind: bytes, words: bytes) -> bytes:
        return kind + bytes(4) + words

    white = b"".join(round(65536 * v).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    tags = {
        b"desc": text(b"desc", (5).to_bytes(4, "big") + b"grey\0" + bytes(78)),
        b"cprt": text(b"text", b"none\0\0\0\0"),
        b"wtpt": text(b"XYZ ", white),
        b"kTRC": text(b"curv", bytes(4)),  # no points: the identity
    }
    at, table, body = 128 + 4 + 12 * len(tags), len(tags).to_bytes(4, "big"), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + (at + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content
    head = bytes(4) + bytes(4) + b"\x02\x40\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white + bytes(48)
    return (at + len(body)).to_bytes(4, "big") + head[4:] + table + body


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_greys_are_those_that_an_embedded_profile_says(tmp_path, mode):
    pixels = np.full((20, 20), 257 * 55, dtype=np.uint16)
    grey = Image.fromarray(pixels if mode == "I;16" else (pixels // 257).astype(np.uint8))
    grey = grey.convert("LA") if mode == "LA" else grey
    if mode == "LA":
        grey.putpixel((0, 0), (55, 0))
    grey.save(tmp_path / "a.png", icc_profile=linear_grey())
    seen, wanted = load_image(tmp_path / "a.png"), 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # sRGB's own curve
    assert np.abs(np.array(seen.getpixel((5, 5))) - wanted).max() <= 1
    assert seen.getpixel((0, 0))[0] == (255 if mode == "LA" else seen.getpixel((5, 5))[0])
    grey.save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").getpixel((5, 5)) == (55, 55, 55)
