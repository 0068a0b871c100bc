"""Scenes to pixels and true masks, in batches, on any device.

Flat shapes with analytic anti-aliasing: a shape's coverage of a pixel is its signed distance there,
in pixels, clamped to one pixel's width. Everything is float32 tensors; no randomness lives here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from p3s_cli.world.scenes import MAX_SUBJECTS, SIZE, Scene
from p3s_cli.world.shapes import ACCESSORIES, ANATOMY, BEAK, BODY, INK, LIGHT, Primitive

_FIXED = {INK: (0.10, 0.10, 0.12), LIGHT: (0.94, 0.95, 0.97), BEAK: (0.98, 0.62, 0.12)}


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu", size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Draw the scenes, `size` pixels wide and high: as a drawing is reproduced larger, with nothing added.

    Returns images (B, 3, size, size) in [0, 1] and visible masks (B, 3, size, size) bool, one channel a
    subject in the scene's order (empty where a scene has fewer).
    """
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (SIZE / size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = _backgrounds(scenes, x / SIZE, y / SIZE)
    masks = torch.zeros(len(scenes), MAX_SUBJECTS, size, size, dtype=torch.bool, device=device)
    for slot in range(MAX_SUBJECTS):
        present = [i for i, s in enumerate(scenes) if len(s.subjects) > slot]
        for category in ANATOMY:
            rows = [i for i in present if scenes[i].subjects[slot].instance.category == category]
            if rows:
                index = torch.tensor(rows, device=device)
                cover, drawn = _draw_subjects([scenes[i].subjects[slot] for i in rows], canvas[index], x, y)
                canvas[index] = drawn
                masks[index, :slot] &= ~(cover > 0.5)[:, None]
                masks[index, slot] = cover > 0.5
    return canvas.clamp_(0, 1), masks


def click(mask: Tensor) -> tuple[float, float]:
    """Where a person would click: the visible pixel nearest to the middle of what is visible."""
    rows, columns = torch.where(mask)
    middle = (rows.float().mean() - rows).square() + (columns.float().mean() - columns).square()
    best = int(middle.argmin())
    return float(columns[best]), float(rows[best])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)


def _draw_subjects(placed, canvas: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Subjects of one category, one per canvas: coverage (B, H, W) and the new canvas (B, 3, H, W)."""
    angle = _column([math.radians(p.degrees) for p in placed], x)
    scale = _column([p.half_size for p in placed], x)
    dx, dy = x - _column([p.x for p in placed], x), y - _column([p.y for p in placed], x)
    u = (dx * angle.cos() + dy * angle.sin()) / scale * _column([-1.0 if p.flip else 1.0 for p in placed], x)
    v = (dy * angle.cos() - dx * angle.sin()) / scale
    body, second = _materials([p.instance for p in placed], u, v)
    anatomy = ANATOMY[placed[0].instance.category]
    cover = torch.zeros_like(u)
    for primitive in anatomy.primitives:
        if primitive.material == BODY:
            colour = body
        elif primitive.material in _FIXED:
            colour = torch.tensor(_FIXED[primitive.material], device=x.device).view(1, 3, 1, 1)
        else:
            colour = second
        cover, canvas = _paint(primitive, colour, u, v, scale, cover, canvas)
    for name, (where, parts) in ACCESSORIES.items():
        rows = [i for i, p in enumerate(placed) if p.accessory == name]
        if rows:
            index = torch.tensor(rows, device=x.device)
            ax, ay, width = getattr(anatomy, where)
            local = (u[index] - ax) / width, (v[index] - ay) / width
            part_cover, part_canvas = cover[index], canvas[index]
            for primitive, rgb in parts:
                colour = torch.tensor(rgb, device=x.device).view(1, 3, 1, 1)
                part_cover, part_canvas = _paint(
                    primitive, colour, *local, scale[index] * width, part_cover, part_canvas
                )
            cover[index], canvas[index] = part_cover, part_canvas
    return cover, canvas


def _paint(primitive: Primitive, colour: Tensor, u: Tensor, v: Tensor, scale: Tensor, cover: Tensor, canvas: Tensor):
    """Composite one primitive; `scale` (B, 1, 1) turns the local unit into pixels."""
    distance = _signed_distance(primitive, u, v) * scale
    alpha = (0.5 - distance).clamp(0, 1)
    edge = 1 - 0.35 * (alpha * (2.0 + distance).clamp(0, 1))  # a darker rim, so that parts of one colour stay apart
    canvas = torch.lerp(canvas, colour * edge[:, None], alpha[:, None])
    return torch.maximum(cover, alpha), canvas


def _signed_distance(p: Primitive, u: Tensor, v: Tensor) -> Tensor:
    """Distance to the shape's border in local units, negative inside (exact for boxes, close for the rest)."""
    c, s = math.cos(math.radians(p.degrees)), math.sin(math.radians(p.degrees))
    a = (u - p.x) * c + (v - p.y) * s
    b = (v - p.y) * c - (u - p.x) * s
    if p.kind == "ellipse" or p.kind == "ring":
        q = torch.sqrt((a / p.half_width) ** 2 + (b / p.half_height) ** 2)
        # |gradient| of q is between 1/half_width and 1/half_height: the local one keeps the rim's width even
        slope = torch.sqrt((a / p.half_width**2) ** 2 + (b / p.half_height**2) ** 2).clamp(min=1e-4)
        distance = ((q - 1) * q / slope).clamp(min=-min(p.half_width, p.half_height))
        return distance.abs() - p.extra if p.kind == "ring" else distance
    if p.kind == "box":
        qa, qb = a.abs() - (p.half_width - p.extra), b.abs() - (p.half_height - p.extra)
        outside = torch.sqrt(qa.clamp(min=0) ** 2 + qb.clamp(min=0) ** 2)
        return outside + torch.maximum(qa, qb).clamp(max=0) - p.extra
    if p.kind == "wedge":
        top, bottom = p.half_width * p.extra, p.half_width
        lean = (bottom - top) / (2 * p.half_height)
        side = (a.abs() - (top + (b + p.half_height) * lean)) / math.hypot(1, lean)
        return torch.maximum(side, b.abs() - p.half_height)
    raise ValueError(f"no primitive called {p.kind!r}")


def _materials(instances, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Body (B, 3, H, W), with its pattern in the subject's own coordinates, and second colour (B, 3, 1, 1)."""
    body = torch.tensor([i.body for i in instances], device=u.device).view(-1, 3, 1, 1)
    second = torch.tensor([i.second for i in instances], device=u.device).view(-1, 3, 1, 1)
    angle = _column([math.radians(i.pattern_degrees) for i in instances], u)
    period = _column([i.pattern_period for i in instances], u)
    turn = 2 * math.pi
    p = turn * ((u * angle.cos() + v * angle.sin()) / period + _column([i.pattern_phase[0] for i in instances], u))
    q = turn * ((v * angle.cos() - u * angle.sin()) / period + _column([i.pattern_phase[1] for i in instances], u))
    kinds = [i.pattern for i in instances]
    stripe, check, spot = p.sin(), p.sin() * q.sin(), (p.cos() + q.cos()) / 2 - 0.25
    field = sum(
        _column([float(k == name) for k in kinds], u) * f
        for name, f in (("striped", stripe), ("checkered", check), ("spotted", spot))
    )
    share = torch.sigmoid(10 * field) * _column([float(k != "plain") for k in kinds], u)
    shaded = torch.lerp(body, second, share[:, None])
    return shaded * (1.04 - 0.10 * v.clamp(-1, 1))[:, None], second


def _backgrounds(scenes: Sequence[Scene], x: Tensor, y: Tensor) -> Tensor:
    """Paint every scene's background; x, y in [0, 1]. Returns (B, 3, H, W)."""
    out = torch.empty(len(scenes), 3, *x.shape, device=x.device)
    for name, paint in _PAINTERS.items():
        rows = [i for i, s in enumerate(scenes) if s.background == name]
        if rows:
            look = torch.tensor([scenes[i].look for i in rows], device=x.device).T[:, :, None, None]
            out[torch.tensor(rows, device=x.device)] = paint(x, y, *look)
    return out


def _rgb(r: float, g: float, b: float, light: Tensor | float = 1.0) -> Tensor:
    """A colour (B, 3, H, W) or (1, 3, 1, 1), scaled by `light` (B, H, W)."""
    if isinstance(light, float):
        return torch.tensor((r, g, b)).view(1, 3, 1, 1) * light
    return torch.stack((r * light, g * light, b * light), dim=1)


def _over(base: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return torch.lerp(base, colour.to(base.device), alpha.unsqueeze(-3))


def _step(value: Tensor, width: float = 0.012) -> Tensor:
    """0 below, 1 above, over `width`."""
    return (value / width + 0.5).clamp(0, 1)


def _sky(y: Tensor, a: Tensor) -> Tensor:
    return _rgb(0.50, 0.74, 0.95, 0.90 + 0.10 * a + 0.12 * y)


def _beach(x, y, a, b, c, d, e):
    horizon, shore = 0.26 + 0.12 * b, 0.46 + 0.10 * c
    sea = _rgb(0.10, 0.52, 0.72, 0.9 + 0.2 * d + 0 * x)
    sand = _rgb(0.95, 0.84, 0.58, 0.92 + 0.10 * a + 0.04 * torch.sin(40 * (y + 0.3 * x) + 6 * e))
    image = _over(_sky(y, a), sea, _step(y - horizon))
    foam = shore + 0.015 * torch.sin(12 * x + 6 * e)
    image = _over(image, _rgb(0.96, 0.97, 0.97), _step(y - foam + 0.03))
    image = _over(image, sand, _step(y - foam))
    sun = ((x - 0.15 - 0.7 * e) ** 2 + (y - 0.12) ** 2).sqrt()
    return _over(image, _rgb(1.0, 0.93, 0.55), _step(0.07 - sun))


def _snow(x, y, a, b, c, d, e):
    hill = 0.50 + 0.06 * b + 0.05 * torch.sin(5 * x + 6 * c)
    image = _rgb(0.70, 0.78, 0.88, 0.92 + 0.08 * a + 0.08 * y)
    for k in range(2):
        tree = 0.1 + 0.55 * k + 0.25 * (d if k else e)
        height = ((y - 0.18) / 0.36).clamp(0, 1)
        image = _over(
            image, _rgb(0.25, 0.45, 0.42), _step(0.10 * height - (x - tree).abs()) * _step(y - 0.18) * _step(0.56 - y)
        )
    image = _over(image, _rgb(0.95, 0.97, 1.0, 0.97 + 0.03 * a + 0 * x), _step(y - hill))
    u, v = (5 * x + e) % 1 - 0.5, (5 * y + 3 * d + 0.5 * torch.floor(5 * x + e)) % 1 - 0.5
    return _over(image, _rgb(1.0, 1.0, 1.0), _step(0.13 - (u**2 + v**2).sqrt(), 0.14))


def _jungle(x, y, a, b, c, d, e):
    image = _rgb(0.10, 0.34, 0.16, 0.8 + 0.3 * a + 0.5 * (1 - y))
    for k, (shift, tone) in enumerate(((b, 0.85), (c, 1.05), (d, 1.25))):
        u = (x * (3 + k) + 5 * shift + 0.5 * torch.floor(y * 4 + e)) % 1 - 0.5
        v = (y * 4 + e + 0.3 * k) % 1 - 0.5
        leaf = (((u + v) / 0.55) ** 2 + ((u - v) / 0.22) ** 2).sqrt()
        image = _over(image, _rgb(0.13 * tone, 0.42 * tone, 0.16 * tone), _step(1 - leaf, 0.15))
    return _over(image, _rgb(0.16, 0.24, 0.10), _step(y - 0.80 - 0.03 * torch.sin(9 * x + 6 * b), 0.03))


def _wooden_floor(x, y, a, b, c, d, e):
    wall = _rgb(0.86, 0.80, 0.70, 0.92 + 0.12 * a + 0 * x)
    edge = 0.40 + 0.10 * b
    depth = (y - edge).clamp(min=1e-3)
    row = torch.floor(depth / 0.11)
    plank = 0.88 + 0.10 * torch.sin(12.9 * row + 6 * c) + 0.05 * torch.sin(30 * y + 3 * torch.sin(4 * x + 6 * d))
    image = _over(wall, _rgb(0.64, 0.42, 0.22, plank), _step(y - edge))
    seam = torch.minimum((depth / 0.11) % 1, 1 - (depth / 0.11) % 1) * 0.11
    image = _over(image, _rgb(0.36, 0.22, 0.11), _step(0.008 - seam) * _step(y - edge))
    return _over(image, _rgb(0.97, 0.95, 0.92), _step(0.02 - (y - edge).abs()))


def _mountain(x, y, a, b, c, d, e):
    image = _sky(y, a)
    for k, (peak, height, tone) in enumerate(
        ((0.15 + 0.3 * b, 0.20 + 0.1 * c, 0.85), (0.55 + 0.3 * d, 0.10 + 0.12 * e, 1.0))
    ):
        rise = y - height - 0.85 * (x - peak).abs()
        image = _over(image, _rgb(0.46 * tone, 0.48 * tone, 0.58 * tone), _step(rise))
        cap = height + 0.13 + 0.02 * torch.sin(30 * x + 2 * k)
        image = _over(image, _rgb(0.97, 0.98, 1.0), _step(rise) * _step(cap - y))
    return _over(
        image, _rgb(0.42, 0.66, 0.32, 0.92 + 0.16 * a + 0 * x), _step(y - 0.54 - 0.02 * torch.sin(7 * x + 6 * e))
    )


def _city(x, y, a, b, c, d, e):
    image = _rgb(0.72, 0.80, 0.90, 0.90 + 0.12 * a + 0.06 * y)
    column = torch.floor(x * 6 + b)
    roof = 0.10 + 0.22 * (0.5 + 0.5 * torch.sin(2.4 * column + 6 * c)) + 0.05 * d
    tone = 0.80 + 0.20 * torch.sin(4.1 * column + 6 * d)
    image = _over(image, _rgb(0.44, 0.47, 0.55, tone), _step(y - roof))
    u, v = (x * 12 + 2 * b) % 1 - 0.5, (y * 13) % 1 - 0.5
    lit = _step(0.24 - u.abs(), 0.2) * _step(0.24 - v.abs(), 0.2) * _step(y - roof - 0.03)
    image = _over(image, _rgb(0.98, 0.90, 0.55), lit)
    image = _over(image, _rgb(0.40, 0.40, 0.42, 0.9 + 0.2 * a + 0 * x), _step(y - 0.60))
    dash = _step(((x * 4 + e) % 1 - 0.5).abs() - 0.2, 0.1) * _step(0.015 - (y - 0.93).abs())
    return _over(image, _rgb(0.95, 0.95, 0.92), dash)


def _wheat_field(x, y, a, b, c, d, e):
    top = 0.40 + 0.08 * b + 0.02 * torch.sin(30 * x + 6 * c)
    stalks = 0.92 + 0.08 * torch.sin(60 * x + 5 * torch.sin(9 * y + 6 * d)) * (y > top)
    furrow = 0.06 * torch.sin(24 * (y - top) + 6 * e + 2 * x)
    return _over(_sky(y, a), _rgb(0.90, 0.72, 0.26, stalks + furrow), _step(y - top, 0.03))


def _pink_fabric(x, y, a, b, c, d, e):
    fold = torch.sin(9 * (x * (0.6 + 0.4 * b) + y * (0.4 + 0.6 * c)) + 1.2 * torch.sin(6 * y + 6 * d) + 6 * e)
    return _rgb(0.96, 0.62, 0.76, 0.90 + 0.08 * a + 0.07 * fold)


_PAINTERS = {
    "beach": _beach,
    "snow": _snow,
    "jungle": _jungle,
    "wooden floor": _wooden_floor,
    "mountain": _mountain,
    "city": _city,
    "wheat field": _wheat_field,
    "pink fabric": _pink_fabric,
}
