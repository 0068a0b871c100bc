"""The readers: what a picture shows, and which individual. Half of what they see went through the autoencoder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetForImageClassification

from p3s_cli.world.readers import GROUPS, LABELS, build_identity_encoder, build_label_reader, true_labels
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.render import render
from p3s_cli.world.scenes import ACCESSORIES, CATEGORIES, Scene, sample_instance, solo

_DECODED = 4  # one in so many scenes of the pool is also shown as the autoencoder gives it back
_INDIVIDUALS, _PORTRAITS = 4_096, 4  # four pictures each, two of them through the autoencoder
_TEMPERATURE = 0.1


def stage_labels(shop: Workshop) -> None:
    """What a scene of one or two subjects shows, from random weights."""
    torch.manual_seed(shop.seed)
    _label(shop, "labels", build_label_reader())


def stage_labels_long(shop: Workshop) -> None:
    """The same reader goes on, for scenes it has not seen: give it more of them than `labels` had (`--scenes`)."""
    _label(shop, "labels_long", ResNetForImageClassification.from_pretrained(shop.family / "readers/labels"))


def _label(shop: Workshop, stage: str, reader: ResNetForImageClassification) -> None:
    reader = reader.to(shop.device, memory_format=torch.channels_last).train()
    truth = true_vectors(shop.pool.scenes)
    few = torch.tensor([i for i, s in enumerate(shop.pool.scenes) if len(s.subjects) < 3])
    again = few[few < len(shop.pool.scenes) // _DECODED]
    decoded = _decode(shop, shop.pool.images[again])

    def loss(step: int, generator: torch.Generator):
        half = shop.length(stage).batch // 2
        plain = few[torch.randint(len(few), (half,), generator=generator)]
        passed = torch.randint(len(again), (half,), generator=generator)
        pixels = torch.cat((shop.pool.images[plain], decoded[passed]))
        with shop.autocast():
            logits = reader(_jitter(pixels, generator)).logits.float()
        wanted = torch.cat((truth[plain], truth[again[passed]])).to(shop.device)
        losses = misread(logits, wanted).mean(0)
        return losses.sum(), dict(zip(GROUPS, losses.tolist(), strict=True))

    shop.fit(stage, reader, loss, weight_decay=0.01, ema=0.0)
    _settle(shop, reader, torch.cat((shop.pool.images[again], decoded)))
    reader.save_pretrained(shop.family / "readers/labels")


def stage_identity(shop: Workshop) -> None:
    """Two pictures of one individual are near, others of its category far (NT-Xent, arXiv:2002.05709)."""
    torch.manual_seed(shop.seed)
    encoder = build_identity_encoder().to(shop.device, memory_format=torch.channels_last).train()
    portraits = _portraits(shop)

    def loss(step: int, generator: torch.Generator):
        n = shop.length("identity").batch // 2
        kind = int(torch.randint(len(CATEGORIES), (1,), generator=generator))
        who = torch.randperm(_INDIVIDUALS // len(CATEGORIES), generator=generator)[:n] * len(CATEGORIES) + kind
        views = torch.rand(n, _PORTRAITS, generator=generator).argsort(1)[:, :2]
        pixels = torch.cat((portraits[who, views[:, 0]], portraits[who, views[:, 1]]))
        with shop.autocast():
            vectors = encoder(_jitter(pixels, generator)).pooler_output.flatten(1).float()
        similar = F.normalize(vectors, dim=-1) @ F.normalize(vectors, dim=-1).T / _TEMPERATURE
        similar.fill_diagonal_(float("-inf"))
        target = (torch.arange(2 * n, device=similar.device) + n) % (2 * n)
        return F.cross_entropy(similar, target), {"found": (similar.argmax(1) == target).float().mean().item()}

    shop.fit("identity", encoder, loss, weight_decay=0.01, ema=0.0)
    _settle(shop, encoder, portraits.flatten(0, 1))
    encoder.save_pretrained(shop.family / "readers/identity")


def true_vectors(scenes: Sequence[Scene]) -> Tensor:
    """(N, labels): one for each label that is true of a scene."""
    found = map(true_labels, scenes)
    return torch.tensor([[float(label in true) for label in LABELS] for true in found]).view(-1, len(LABELS))


def misread(logits: Tensor, truth: Tensor) -> Tensor:
    """(B, groups): in each group, cross-entropy with all that is true of a scene, in equal shares.

    Nothing true in a group: nothing to be misread, 0.
    """
    sizes = [len(values) for values in GROUPS.values()]
    pairs = zip(logits.split(sizes, dim=1), truth.split(sizes, dim=1), strict=True)
    losses = [
        F.cross_entropy(guess, true / true.sum(1, keepdim=True).clamp(min=1), reduction="none") for guess, true in pairs
    ]
    return torch.stack(losses, dim=1)


def _settle(shop: Workshop, model: torch.nn.Module, images: Tensor) -> None:
    """`settle` over a fixed 4,096 images."""
    generator = torch.Generator().manual_seed(shop.seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:4096]]
    settle(model, (_jitter(batch, generator) for batch in chosen.split(128)))


@torch.no_grad()
def settle(model: torch.nn.Module, inputs: Iterable[Tensor]) -> None:
    """Batch norm's statistics for the final weights, over these batches; a checkpoint does not hold any."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what follows
    for batch in inputs:
        model(batch)
    model.eval()


def _portraits(shop: Workshop) -> Tensor:
    """(individuals, portraits, 3, 128, 128) in bytes: categories in turn, each picture another place and pose."""
    rng = random.Random(shop.seed)
    worn = [None, None, None, *ACCESSORIES]
    scenes: list[Scene] = []
    for k in range(_INDIVIDUALS):
        instance = sample_instance(rng, CATEGORIES[k % len(CATEGORIES)])
        scenes += [solo(instance, k * _PORTRAITS + p, accessory=rng.choice(worn)) for p in range(_PORTRAITS)]
    drawn = [_bytes(render(scenes[i : i + 64], shop.device)[0]) for i in range(0, len(scenes), 64)]
    portraits = torch.cat(drawn).unflatten(0, (_INDIVIDUALS, _PORTRAITS))
    half = _PORTRAITS // 2
    portraits[:, half:] = _decode(shop, portraits[:, half:].flatten(0, 1)).unflatten(0, (_INDIVIDUALS, half))
    return portraits


@torch.no_grad()
def _decode(shop: Workshop, pixels: Tensor) -> Tensor:
    """Images in bytes (N, 3, 128, 128) after a round trip through the autoencoder."""
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device).eval()
    back = []
    for batch in pixels.split(64):
        with shop.autocast():
            latent = vae.encode(batch.to(shop.device).float() / 127.5 - 1).latent_dist.mean
            back.append(_bytes((vae.decode(latent).sample.float() + 1) / 2))
    return torch.cat(back)


def _bytes(images: Tensor) -> Tensor:
    return (255 * images.clamp(0, 1)).round().to(torch.uint8)


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes to [-1, 1], with a little noise and a shift of up to 6 pixels, so that no reader counts on exact edges."""
    dx, dy = torch.randint(-6, 7, (2,), generator=generator).tolist()
    shifted = F.pad(pixels.float(), (6, 6, 6, 6), mode="replicate")[..., 6 + dy : 134 + dy, 6 + dx : 134 + dx]
    noise = torch.randn(shifted.shape, generator=generator).to(shifted.device)
    # channels last doubles the pace of narrow convolutions on a CPU
    return (shifted / 127.5 - 1 + 0.03 * noise).contiguous(memory_format=torch.channels_last)
