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
