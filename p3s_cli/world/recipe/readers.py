"""The readers: what a picture shows, and which individual. Half of what they see went through the autoencoder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetForImageClassification, ResNetModel

from p3s_cli.world.readers import GROUPS, LABELS, build_identity_encoder, build_label_reader, true_labels
from p3s_cli.world.recipe.pool import Pool, as_pixels, at_a_time
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import ACCESSORIES, CATEGORIES, Scene, sample_instance, solo

_DECODED = 4  # one in so many scenes of the pool is also shown as the autoencoder gives it back
_INDIVIDUALS, _PORTRAITS = 4_096, 4  # four pictures each, two of them through the autoencoder
_TEMPERATURE = 0.1


def stage_labels(shop: Workshop) -> None:
    """What a scene of one or two subjects shows, from random weights."""
    torch.manual_seed(shop.seed)
    reader = build_label_reader().to(shop.device, memory_format=torch.channels_last).train()
    truth = true_vectors(shop.pool.scenes).to(shop.device)
    few = torch.tensor([i for i, s in enumerate(shop.pool.scenes) if len(s.subjects) < 3])
    again = few[few < len(shop.pool.scenes) // _DECODED]
    decoded = _decode(shop, shop.pool.bytes(again))

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = shop.length("labels").batch // 2
        plain = few[torch.randint(len(few), (half,), generator=generator)]
        passed = torch.randint(len(again), (half,), generator=generator)
        pixels = torch.cat((shop.pool.bytes(plain), decoded[passed.to(shop.device)]))
        return _jitter(shop, pixels, generator), truth[torch.cat((plain, again[passed])).to(shop.device)]

    def compute(drawn: tuple[Tensor, Tensor], reader: ResNetForImageClassification) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, wanted = drawn
        with shop.autocast():
            logits = reader(pixels).logits.float()
        losses = misread(logits, wanted)
        return losses.mean(0).sum(), by_group(losses)

    shop.fit("labels", reader, draw, compute, weight_decay=0.01, ema=0.0)
    _settle(shop, reader, torch.cat((shop.pool.bytes(again), decoded)))
    reader.save_pretrained(shop.family / "readers/labels")


def stage_identity(shop: Workshop) -> None:
    """Two pictures of one individual are near, others of its category far (NT-Xent, arXiv:2002.05709)."""
    torch.manual_seed(shop.seed)
    encoder = build_identity_encoder().to(shop.device, memory_format=torch.channels_last).train()
    portraits = _portraits(shop)
    n = shop.length("identity").batch // 2
    partner = (torch.arange(2 * n, device=shop.device) + n) % (2 * n)

    def draw(step: int, generator: torch.Generator) -> Tensor:
        kind = int(torch.randint(len(CATEGORIES), (1,), generator=generator))
        who = torch.randperm(_INDIVIDUALS // len(CATEGORIES), generator=generator)[:n] * len(CATEGORIES) + kind
        views = torch.rand(n, _PORTRAITS, generator=generator).argsort(1)[:, :2]
        rows = (_PORTRAITS * who[:, None] + views).T.flatten().to(shop.device)
        return _jitter(shop, portraits[rows], generator)

    def compute(pixels: Tensor, encoder: ResNetModel) -> tuple[Tensor, dict[str, Tensor]]:
        with shop.autocast():
            vectors = encoder(pixels).pooler_output.flatten(1).float()
        similar = F.normalize(vectors, dim=-1) @ F.normalize(vectors, dim=-1).T / _TEMPERATURE
        similar = similar.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=similar.device), float("-inf"))
        return F.cross_entropy(similar, partner), {"found": (similar.argmax(1) == partner).float().mean()}

    shop.fit("identity", encoder, draw, compute, weight_decay=0.01, ema=0.0)
    _settle(shop, encoder, portraits)
    encoder.save_pretrained(shop.family / "readers/identity")


def true_vectors(scenes: Sequence[Scene]) -> Tensor:
    """(N, labels): one for each label that is true of a scene."""
    places = {label: i for i, label in enumerate(LABELS)}
    pairs = torch.tensor([(n, places[label]) for n, scene in enumerate(scenes) for label in true_labels(scene)])
    vectors = torch.zeros(len(scenes), len(LABELS))
    vectors[tuple(pairs.view(-1, 2).long().T)] = 1.0
    return vectors


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


def by_group(losses: Tensor) -> dict[str, Tensor]:
    """The means of what was `misread`, by the groups' names, for the log."""
    return dict(zip(GROUPS, losses.detach().mean(0), strict=True))


def _settle(shop: Workshop, model: torch.nn.Module, images: Tensor) -> None:
    """`settle` over a fixed 4,096 images."""
    generator = torch.Generator().manual_seed(shop.seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:4096].to(images.device)]
    settle(model, (_jitter(shop, batch, generator) for batch in chosen.split(128)))


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
    """(individuals x portraits, 3, 128, 128) in bytes, each individual's in a row: categories in turn, each picture another
    place and pose."""
    rng = random.Random(shop.seed)
    worn = [None, None, None, *ACCESSORIES]
    scenes: list[Scene] = []
    for k in range(_INDIVIDUALS):
        instance = sample_instance(rng, CATEGORIES[k % len(CATEGORIES)])
        scenes += [solo(instance, k * _PORTRAITS + p, accessory=rng.choice(worn)) for p in range(_PORTRAITS)]
    portraits = Pool(scenes, shop.device).images
    passed = (torch.arange(len(portraits)) % _PORTRAITS >= _PORTRAITS // 2).nonzero()[:, 0].to(portraits.device)
    portraits[passed] = _decode(shop, portraits[passed])
    return portraits


@torch.no_grad()
def _decode(shop: Workshop, images: Tensor) -> Tensor:
    """Images in bytes (N, 3, 128, 128) after a round trip through the autoencoder."""
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device).eval()
    back = []
    for batch in images.split(at_a_time(shop.device, 512)):
        with shop.autocast():
            latent = vae.encode(as_pixels(batch)).latent_dist.mean
            decoded = (vae.decode(latent).sample.float() + 1) / 2
        back.append((255 * decoded.clamp(0, 1)).round().to(torch.uint8))
    return torch.cat(back)


def _jitter(shop: Workshop, images: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes to [-1, 1], with a little noise and a shift of up to 6 pixels, so that no reader counts on exact edges."""
    dx, dy = torch.randint(-6, 7, (2,), generator=generator).tolist()
    pixels = F.pad(as_pixels(images), (6, 6, 6, 6), mode="replicate")[..., 6 + dy : 134 + dy, 6 + dx : 134 + dx]
    # channels last doubles the pace of narrow convolutions on a CPU
    return (pixels + 0.03 * shop.noise(pixels.shape, generator)).contiguous(memory_format=torch.channels_last)
