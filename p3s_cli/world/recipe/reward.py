"""A reward for the U-Net: do its predictions show what the caption says (ReFL, arXiv:2304.05977)?

The denoising loss hardly hears of a pattern, a fiftieth of it, and never sees the states that guidance leads to.
So one network learns to read predictions, as latents, and the U-Net learns, in the states of its own sampling, to
predict what reads as told. That reader is not the one that judges the family: another shape, other weights, other
inputs. It is not shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from p3s_cli.world.readers import LABELS
from p3s_cli.world.recipe.denoiser import Batch, Shelf, Teacher
from p3s_cli.world.recipe.pool import at_a_time
from p3s_cli.world.recipe.readers import by_group, misread, settle, true_vectors
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import Scene, caption

_READ = 98_304  # scenes of either pool, at most, whose predictions are kept, to learn to read
_SAMPLING_STEPS = 20  # of one round of sampling
_ROUND = 25  # training steps on the states of one
_GUIDANCE = (1.0, 6.0)
_FROM = 150  # below this timestep nothing that has a name is decided
_OWN = 2 / 3  # of a batch, states of the U-Net's own sampling; the rest is noised scenes
_WEIGHT = 0.03  # its gradient is then one to three times that of the denoising loss


def stage_reward(shop: Workshop) -> None:
    """Learn to read what the U-Net predicts for noised scenes, half of it without a caption, and clean latents."""
    torch.manual_seed(shop.seed)
    reader = _build_reader().to(shop.device, memory_format=torch.channels_last).train()
    shelves = Shelf(shop, shop.pool, "latents"), Shelf(shop, shop.patterns, "latents_patterns")
    teacher = Teacher(shop, UNet2DConditionModel.from_pretrained(shop.family / "unet").eval())
    pairs = [_predictions(shop, teacher, shelf) for shelf in shelves]
    latents, t, truth = (torch.cat(parts) for parts in zip(*pairs, strict=True))

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(latents), (shop.length("reward").batch,), generator=generator).to(shop.device)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        x = latents[index] + 0.05 * shop.noise(latents[index].shape, generator)
        x = torch.roll(F.pad(x, (1, 1, 1, 1), mode="replicate"), shift, (2, 3))[..., 1:-1, 1:-1]
        return x, t[index], truth[index]

    def compute(
        drawn: tuple[Tensor, Tensor, Tensor], reader: ResNetForImageClassification
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, wanted = drawn
        with shop.autocast():
            logits = _read(reader, x, t)
        losses = misread(logits, wanted)
        return losses.sum(1).mean(), by_group(losses)

    shop.fit("reward", reader, draw, compute, weight_decay=0.01, ema=0.0)
    chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(shop.seed))[:4096]
    settle(reader, (_shown(latents[rows], t[rows]) for rows in chosen.to(shop.device).split(128)))
    reader.save_pretrained(shop.work / "reward")


def stage_unet_reward(shop: Workshop) -> None:
    """The U-Net's last round: the reward in states of its own sampling, beside noise prediction on scenes.

    Of a state x_t the prediction x0 is read without guidance, which would only sharpen what the words do.
    A run that goes on from a checkpoint samples anew: as good, but not the same to the bit.
    """
    teacher = Teacher(shop, UNet2DConditionModel.from_pretrained(shop.family / "unet"))
    shelf = Shelf(shop, shop.pool, "latents")
    reader = ResNetForImageClassification.from_pretrained(shop.work / "reward").to(shop.device).eval()
    reader.requires_grad_(False)
    own_share = int(_OWN * shop.length("unet_reward").batch)
    of = one_or_two_kinds(shelf.pool.scenes)
    own: list[Walks] = []

    def draw(step: int, generator: torch.Generator) -> tuple[Batch, Own]:
        if not own or step % _ROUND == 0:
            own[:] = [Walks(teacher, of, generator, own_share)]
        batch = shelf.draw(shop.length("unet_reward").batch - own_share, 0.5, generator)
        return batch, own[0].draw(own_share, generator)

    def compute(drawn: tuple[Batch, Own], unet: UNet2DConditionModel) -> tuple[Tensor, dict[str, Tensor]]:
        batch, walked = drawn
        x, target = teacher.states(batch)
        states, t, ids = (
            torch.cat((x, walked.states)),
            torch.cat((batch.t, walked.t)),
            torch.cat((batch.ids, walked.ids)),
        )
        eps, own_eps = teacher.predict(unet, states, t, ids).split((len(x), len(walked.states)))
        denoised = teacher.loss(eps, target, batch)
        with shop.autocast():
            logits = _read(reader, clean(teacher, walked.states, own_eps, walked.t), walked.t)
        losses = misread(logits, walked.truth)
        # an x0 moves 1 / sqrt(SNR) times as far as the noise does: noisy states would be all that is heard
        heard = teacher.snr(walked.t).sqrt().clamp(max=1)
        numbers = {"denoised": denoised.detach(), **by_group(losses)}
        return denoised + _WEIGHT * (heard * losses.sum(1)).mean(), numbers

    shop.fit("unet_reward", teacher.unet, draw, compute, weight_decay=0.01, ema=0.99)
    teacher.unet.save_pretrained(shop.family / "unet")


@dataclass(frozen=True)
class Own:
    """States (n, 4, 16, 16) of own sampling, their t (n,), captions as token ids (n, 77), and the labels these name (n, labels)."""

    states: Tensor
    t: Tensor
    ids: Tensor
    truth: Tensor


class Walks:
    """The states of one round of guided sampling (DDIM), from captions that leave nothing out: half of them of the first
    scenes, half of the others."""

    @torch.no_grad()
    def __init__(
        self,
        teacher: Teacher,
        of: tuple[list[Scene], list[Scene]],
        generator: torch.Generator,
        prompts: int,
        steps: int = _SAMPLING_STEPS,
    ):
        device = teacher.shop.device
        told = [s[i] for s in of for i in torch.randint(len(s), (prompts // 2,), generator=generator).tolist()]
        prompts = len(told)
        self.captions = [caption(s, 0, full=True) for s in told]
        self.ids = teacher.shop.tokens(self.captions).to(device)
        silence = teacher.shop.tokens([""]).to(device).expand_as(self.ids)
        self.truth = named_vectors(told).to(device)
        low, high = _GUIDANCE
        self.guidance = (low + (high - low) * torch.rand(prompts, 1, 1, 1, generator=generator)).to(device)
        teacher.scheduler.set_timesteps(steps)
        self.t = teacher.scheduler.timesteps[teacher.scheduler.timesteps >= _FROM].to(device)
        x, states = torch.randn(prompts, 4, 16, 16, generator=generator).to(device), []
        for t in self.t:
            states.append(x)
            both = teacher.predict(
                teacher.unet, torch.cat((x, x)), t.expand(2 * prompts), torch.cat((self.ids, silence))
            )
            words, free = both.chunk(2)
            x = teacher.scheduler.step(free + self.guidance * (words - free), t, x).prev_sample
        self.states = torch.stack(states, 1)

    def draw(self, n: int, generator: torch.Generator) -> Own:
        who = torch.randint(len(self.captions), (n,), generator=generator).to(self.t.device)
        when = torch.randint(len(self.t), (n,), generator=generator).to(self.t.device)
        return Own(self.states[who, when], self.t[when], self.ids[who], self.truth[who])


def one_or_two_kinds(scenes: list[Scene]) -> tuple[list[Scene], list[Scene]]:
    """The scenes of one subject, and those of two kinds."""
    one = [s for s in scenes if len(s.subjects) == 1]
    return one, [s for s in scenes if len(s.subjects) == 2 and len({p.instance.category for p in s.subjects}) == 2]


def named_vectors(scenes: list[Scene]) -> Tensor:
    """(N, labels): what a full caption says. A plain subject's pattern goes unnamed, so none in its scene counts."""
    truth = true_vectors(scenes)
    plain = truth[:, LABELS.index("pattern/plain")].bool()
    patterns = torch.tensor([label.startswith("pattern/") for label in LABELS])
    return truth.masked_fill(plain[:, None] & patterns, 0.0)


def clean(teacher: Teacher, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The x0 that a prediction of the noise in x_t amounts to (arXiv:2010.02502, eq. 9)."""
    alpha = teacher.alphas[t].view(-1, 1, 1, 1)
    return (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()


def _build_reader() -> ResNetForImageClassification:
    """A ResNet on latents enlarged four times, for its first layers halve twice, and t as a fifth channel."""
    config = ResNetConfig(
        num_channels=5, embedding_size=96, hidden_sizes=[96, 160, 224], depths=[3, 2, 2], layer_type="basic"
    )
    config.num_labels = len(LABELS)
    return ResNetForImageClassification(config)


def _read(reader: ResNetForImageClassification, x0: Tensor, t: Tensor) -> Tensor:
    """Logits (B, labels) of latents predicted at t."""
    return reader(_shown(x0, t)).logits.float()


def _shown(x0: Tensor, t: Tensor) -> Tensor:
    """What the reader is shown of latents predicted at t: (B, 5, 64, 64)."""
    level = (t.float() / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x0.shape[2:])
    shown = F.interpolate(torch.cat((x0, level), 1), scale_factor=4)
    return shown.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _predictions(shop: Workshop, teacher: Teacher, shelf: Shelf) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, 4, 16, 16), their t (N,) and labels (N, L): of scenes with one or two subjects the U-Net's x0, at
    uniform timesteps, and the true one at t = 0, in turn."""
    generator = torch.Generator().manual_seed(shop.seed)
    few = torch.tensor([i for i, s in enumerate(shelf.pool.scenes) if len(s.subjects) < 3])
    index = few[torch.randperm(len(few), generator=generator)[:_READ]]
    n, truth = len(index), true_vectors([shelf.pool.scenes[i] for i in index.tolist()]).to(shop.device)
    t = torch.randint(_FROM, 1000, (n,), generator=generator).to(shop.device)
    silent, index = torch.rand(n, generator=generator) < 0.5, index.to(shop.device)
    ids = shelf.said(index, torch.ones(n, dtype=torch.long), silent)
    true = torch.arange(n, device=shop.device) % 2 == 0
    latents = shelf.latents[index]
    for rows in (~true).nonzero()[:, 0].split(2 * at_a_time(shop.device)):
        x = teacher.scheduler.add_noise(latents[rows], shelf.noise(latents[rows].shape, generator), t[rows])
        latents[rows] = clean(teacher, x, teacher.predict(teacher.unet, x, t[rows], ids[rows]), t[rows])
    return latents, t.masked_fill(true, 0), truth
