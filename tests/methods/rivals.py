"""The rivals' names, and how their tests look at a family and at what was learnt."""

import dataclasses

import torch

from p3s_cli import methods
from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Learnt

RIVALS = tuple(n for n in methods.NAMES if n != "p3s")


def bound(name, family, subject, tensors, strength=1.0):
    method = methods.get(name)
    recipe = dataclasses.asdict(method.recipe(family.profile, FinetuneConfig()))
    return method.bind(family, Learnt(subject, tensors, recipe), GenerateConfig(strength=strength))


def state(family):
    parts = {"unet": family.unet, "text": family.text_encoder, "vae": family.vae}
    return {f"{k}.{n}": p for k, m in parts.items() for n, p in m.state_dict().items()}


def looks(family):
    processors = dict(family.unet.attn_processors)
    return processors, [type(m) for m in family.unet.modules()], len(family.tokenizer)


def noise(generator, family, prompt="a [V] dog on the beach", with_subject=True):
    g = torch.Generator().manual_seed(3)
    x_t = torch.randn(1, 4, 16, 16, generator=g)
    with torch.no_grad():
        return generator.eps(x_t, torch.tensor([400]), generator.encode([prompt]), with_subject)
