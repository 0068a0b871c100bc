"""The vision tower alone, towards the text tower as it is, which the U-Net reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from p3s_cli.sd.train import step_generator
from p3s_cli.world.recipe.contrast import Pairs, before_last, class_token, contrast
from p3s_cli.world.recipe.pool import AT_ONCE, Pool, as_pixels, at_a_time, captions
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import BACKGROUNDS, Scene, Wording, sample_scene
from p3s_cli.world.shapes import CATEGORIES

_FRESH = 1_000_000  # the first seed of scenes that are shown once; a pool's are below
_MOSTLY_KINDS: tuple[Wording, ...] = ("kind", "kind", "kind", "full", "place")
_ALIKE = 0.5  # of the batches that do not ask for the place, those that share one
_PATCHES_COUNT = 0.5  # of the patches' term against the contrast
_MISTAKEN = ("dog", "cat", "vase", "teapot")  # seven in eight of the scenes whose kind it had wrong
_MOSTLY_ALONE = (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3)  # subjects of a fresh scene


def stage_vision(shop: Workshop) -> None:
    """The vision tower goes on alone, towards the locked text tower (LiT, arXiv:2111.07991).

    All patches are shown: from a quarter of them no outline can be learnt. Scenes are shifted and mirrored.
    """

    def draw(step: int, generator: torch.Generator, plan: Plan) -> tuple[Tensor, Tensor, list[Scene]]:
        pool, n = shop.pool, shop.length("vision").batch
        tries = pool.draw_at(plan.place, n + n // 2, generator) if plan.place else pool.draw(n + n // 2, generator)
        index = torch.tensor(sorted(tries.tolist(), key=lambda i: _is_easy(pool.scenes[i]))[:n])
        shares = F.interpolate(pool.shares(index), scale_factor=8)
        moved = _moved(torch.cat((pool.bytes(index).float(), shares), 1), generator)
        scenes = [pool.scenes[i] for i in index.tolist()]
        return moved[:, :3].to(torch.uint8), F.avg_pool2d(moved[:, 3:], 8), scenes

    _towards_text(shop, "vision", draw)


def stage_vision_fresh(shop: Workshop) -> None:
    """It goes on, on scenes that are drawn for one step and not kept: scenes are wanted, not steps.

    Four seeds of a run in a row have scenes of their own, so that a second round sees others.
    """
    n, first = shop.length("vision_fresh").batch, _FRESH * (1 + shop.seed % 4)
    tries, together = n + n // 2, max(1, at_a_time(shop.device, AT_ONCE) // n)
    painted: dict[int, Pool] = {}

    def scenes(step: int) -> list[Scene]:
        found = [sample_scene(first + tries * step + i, _MOSTLY_ALONE) for i in range(tries)]
        place = _planned(shop, step).place
        kept = sorted(found, key=_is_easy)[:n]
        return [replace(scene, background=place) for scene in kept] if place else kept

    def draw(step: int, generator: torch.Generator, plan: Plan) -> tuple[Tensor, Tensor, list[Scene]]:
        row = step // together
        if row not in painted:
            painted.clear()
            steps = range(together * row, together * (row + 1))
            painted[row] = Pool([scene for s in steps for scene in scenes(s)], shop.device)
        pool, index = painted[row], torch.arange(n) + n * (step % together)
        return pool.bytes(index), pool.shares(index), [pool.scenes[i] for i in index.tolist()]

    _towards_text(shop, "vision_fresh", draw)


@dataclass(frozen=True)
class Plan:
    """What captions of a step say, and the place all its scenes share, if they do."""

    wording: Wording
    place: str | None


def _planned(shop: Workshop, step: int) -> Plan:
    """Known before the step comes, since scenes are painted for several."""
    generator = step_generator(shop.seed, step)
    wording, place = (int(torch.randint(len(x), (1,), generator=generator)) for x in (_MOSTLY_KINDS, BACKGROUNDS))
    shared = _MOSTLY_KINDS[wording] != "place" and torch.rand(1, generator=generator).item() < _ALIKE
    return Plan(_MOSTLY_KINDS[wording], list(BACKGROUNDS)[place] if shared else None)


@dataclass(frozen=True)
class Kinds:
    """Of each image the kind (B,) and how much of each patch is of it (B, P): none where there are several kinds."""

    which: Tensor
    share: Tensor


class Pupil(nn.Module):
    """A CLIP pair of which all but the text tower is trained, and a head that tells a patch's kind, which is thrown away."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        width = clip.config.vision_config.hidden_size
        self.clip = clip
        clip.text_model.requires_grad_(False)
        self.kinds = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CATEGORIES)))


DrawScenes = Callable[[int, torch.Generator, Plan], tuple[Tensor, Tensor, list[Scene]]]


def _towards_text(shop: Workshop, stage: str, draw_scenes: DrawScenes) -> None:
    """Train the vision tower by contrast with what the locked text tower says.

    Beside the class token each patch of a subject has to tell its kind (token labelling, arXiv:2104.10858): one scene then
    teaches in as many places as its subject reaches. `draw_scenes` gives images in bytes, the share of each patch that is
    subject (B, 1, h, w), and the scenes.
    """
    torch.manual_seed(shop.seed)
    pupil = Pupil(CLIPModel.from_pretrained(shop.family / "clip")).to(shop.device)
    text_model = pupil.clip.text_model

    def draw(step: int, generator: torch.Generator) -> tuple[Pairs, Kinds]:
        plan = _planned(shop, step)
        images, shares, scenes = draw_scenes(step, generator, plan)
        said = captions(scenes, generator, plan.wording)
        once = {text: i for i, text in enumerate(dict.fromkeys(said))}
        with torch.no_grad():
            text = text_model(shop.tokens(list(once)).to(shop.device).long()).pooler_output
        whose = torch.tensor([once[text] for text in said]).to(shop.device)
        return Pairs(images, text[whose], whose[:, None] == whose), kinds_of(scenes, shares.flatten(1))

    def compute(drawn: tuple[Pairs, Kinds], pupil: Pupil) -> tuple[Tensor, dict[str, Tensor]]:
        (pairs, kinds), clip = drawn, pupil.clip
        with shop.autocast():
            hidden = before_last(clip.vision_model, clip.vision_model.embeddings(as_pixels(pairs.images)))
            image = clip.visual_projection(class_token(clip.vision_model, hidden))
            text, told = clip.text_projection(pairs.text), pupil.kinds(hidden[:, 1:])
        value, numbers = contrast(image, text, clip.logit_scale, pairs.equal)
        aside = _PATCHES_COUNT * of_patches(told, kinds)
        return value + aside, numbers | {"aside": aside.detach()}

    shop.fit(stage, pupil, draw, compute, weight_decay=0.05, ema=0.0)
    pupil.clip.save_pretrained(shop.family / "clip")


def _is_easy(scene: Scene) -> bool:
    """Whether the tower does not mistake its kinds: of what is drawn a third is left out, of these."""
    return all(subject.instance.category not in _MISTAKEN for subject in scene.subjects)


def kinds_of(scenes: list[Scene], shares: Tensor) -> Kinds:
    """What patches have to tell, where of each the share (B, P) is subject.

    Scenes of several kinds have no share: which of them a patch shows is not kept.
    """
    kinds = [{subject.instance.category for subject in scene.subjects} for scene in scenes]
    alone = torch.tensor([len(k) == 1 for k in kinds], device=shares.device)
    which = torch.tensor([CATEGORIES.index(min(k)) for k in kinds], device=shares.device)
    return Kinds(which, shares * alone[:, None])


def of_patches(logits: Tensor, kinds: Kinds) -> Tensor:
    """Cross-entropy of the kinds (B, P, 8) of patches, each counted by its share of subject."""
    which = kinds.which[:, None].expand_as(kinds.share).flatten()
    # flat, for there is no kernel that repeats its bits for more dimensions
    each = F.cross_entropy(logits.float().flatten(0, 1), which, reduction="none")
    return (each * kinds.share.flatten()).sum() / kinds.share.sum().clamp(min=1.0)


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, C, H, W), all shifted by up to a patch either way, every other time mirrored."""
    dx, dy, mirrored = (int(torch.randint(n, (1,), generator=generator)) for n in (17, 17, 2))
    size = pixels.shape[-1]
    moved = F.pad(pixels, (8, 8, 8, 8), mode="replicate")[..., dy : dy + size, dx : dx + size]
    return moved.flip(-1) if mirrored else moved
