"""Pictures a person can judge at a glance: points and masks over the photo, before and after, grids of results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

_GREEN, _RED = (40, 200, 90), (230, 60, 50)
_TILE = 256  # pixels, the longer side of a tile in a sheet
_MARGIN = 8


def overlay(
    photo: Image.Image, subject: np.ndarray, negative: np.ndarray, positive: Sequence[Point], negatives: Sequence[Point]
) -> Image.Image:
    """The subject's mask in green with + at its points, the negative's in red with - at its; masks (H, W) bool."""
    pixels = np.asarray(photo).astype(np.float32)
    for mask, colour in ((subject, _GREEN), (negative, _RED)):
        pixels[mask] = 0.55 * pixels[mask] + 0.45 * np.array(colour, dtype=np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    scale = max(1, round(480 / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    arm = max(5, max(picture.size) // 60)
    for points, colour, plus in ((positive, _GREEN, True), (negatives, _RED, False)):
        for x, y in points:
            _mark(draw, (x + 0.5) * scale, (y + 0.5) * scale, arm, colour, plus)
    return picture


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, arm: int, colour: tuple[int, int, int], plus: bool) -> None:
    width = max(2, arm // 3)
    draw.ellipse(
        (x - 1.6 * arm, y - 1.6 * arm, x + 1.6 * arm, y + 1.6 * arm), fill="white", outline=colour, width=width
    )
    draw.line((x - arm, y, x + arm, y), fill=colour, width=width)
    if plus:
        draw.line((x, y - arm, x, y + arm), fill=colour, width=width)


def coordinate_grid(photo: Image.Image) -> Image.Image:
    """The photo under lines about every tenth of its longer side, labelled in its own pixels."""
    scale = max(1, round(640 / max(photo.size)))
    picture = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.LANCZOS)
    step = max(1, round(max(photo.size) / 100) * 10)
    font = ImageFont.load_default(max(12, max(picture.size) // 60))
    draw = ImageDraw.Draw(picture)
    for value in range(0, photo.width, step):
        _grid_line(draw, (value * scale, 0), (value * scale, picture.height), str(value), font)
    for value in range(step, photo.height, step):
        _grid_line(draw, (0, value * scale), (picture.width, value * scale), str(value), font)
    return picture


def _grid_line(draw: ImageDraw.ImageDraw, start: Point, end: Point, label: str, font: ImageFont.FreeTypeFont) -> None:
    draw.line((*start, *end), fill=(255, 255, 255), width=3)
    draw.line((*start, *end), fill=(0, 0, 0), width=1)
    draw.text((start[0] + 3, start[1] + 2), label, fill="white", font=font, stroke_width=2, stroke_fill="black")


def heatmap(photo: Image.Image, similarity: np.ndarray) -> Image.Image:
    """A similarity map (H_p, W_p) over the photo: dark where low, the photo itself where high."""
    low, high = float(similarity.min()), float(similarity.max())
    share = (similarity - low) / max(high - low, 1e-6)
    light = Image.fromarray((share * 255).astype(np.uint8)).resize(photo.size, Image.Resampling.BILINEAR)
    return Image.composite(photo, Image.new("RGB", photo.size, (20, 20, 60)), light)


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], title: str = "") -> Image.Image:
    """A contact sheet: rows of (heading, [(caption, image), ...]), each image in a tile of its own."""
    font = ImageFont.load_default(14)
    line = 20
    columns = max(len(images) for _, images in rows)
    width = _MARGIN + columns * (_TILE + _MARGIN)
    row_height = line + _TILE + line + _MARGIN
    canvas = Image.new("RGB", (width, (line + _MARGIN if title else 0) + _MARGIN + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    if title:
        draw.text((_MARGIN, y), _fit(title, font, width - 2 * _MARGIN), fill="black", font=font)
        y += line + _MARGIN
    for heading, images in rows:
        draw.text((_MARGIN, y), _fit(heading, font, width - 2 * _MARGIN), fill="black", font=font)
        for i, (caption, image) in enumerate(images):
            x = _MARGIN + i * (_TILE + _MARGIN)
            tile = _tile(image)
            canvas.paste(tile, (x + (_TILE - tile.width) // 2, y + line + (_TILE - tile.height) // 2))
            draw.text((x, y + line + _TILE + 2), _fit(caption, font, _TILE), fill=(90, 90, 90), font=font)
        y += row_height
    return canvas


def _tile(image: Image.Image) -> Image.Image:
    scale = _TILE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
