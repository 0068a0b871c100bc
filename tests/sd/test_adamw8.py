"""The 8-bit optimiser against the 32-bit one, and its rounding against its mean."""

from dataclasses import replace

import pytest
import torch

from p3s_cli.sd.adamw8 import AdamW8, pack, round_stochastically, unpack
from p3s_cli.sd.train import Checkpoint, Recipe, train


def test_packing_keeps_each_number_to_one_part_in_sixteen_of_its_block():
    """e4m3 has three mantissa bits: half a step is 1/16 of a normal number; below 2^-6 of 448, 2^-10 absolute."""
    values = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 3)[:, None]
    codes, scale = pack(values)
    error = (unpack(codes, scale, values) - values).abs().flatten()
    blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 256)).view(-1, 256)
    largest = blocks.abs().amax(1).repeat_interleave(256)[: values.numel()]
    assert (error <= torch.maximum(values.flatten().abs() / 16, largest / 448 * 2**-10) * 1.001).all()
    assert codes.element_size() == 1 and codes.numel() == scale.numel() * 256


def test_stochastic_rounding_keeps_the_mean_of_what_nearest_rounding_loses():
    """1 + 2^-9 lies a quarter of the way between bfloat16's 1 and 1 + 2^-7: a quarter of the numbers go up."""
    value = torch.full((40_000,), 1 + 2**-9)
    rounded = round_stochastically(value, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 40_000) ** 0.5)
    assert (value.bfloat16() == 1).all()


def problem(dtype=torch.float32):
    w = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
    target = torch.linspace(-2, 2, 300)
    return (
        {"w": w},
        lambda s, g: ((w.float() - target + 0.1 * torch.randn(300, generator=g)).square().sum(), {}),
        target,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_finds_the_minimum_the_32_bit_one_finds(dtype):
    recipe = Recipe(steps=300, lr=0.05, decay="cosine")
    theirs = train(*problem()[:2], recipe)["w"]
    ours = train(*problem(dtype)[:2], replace(recipe, optimizer="adamw8"))["w"].float()
    # either jitters about the target by the noise in its gradients; bfloat16 near 2 is spaced by 2^-6
    assert (ours - theirs).abs().max() < 0.1 and (ours - problem()[2]).abs().mean() < 0.02


def test_its_first_steps_are_adamw_s_to_the_rounding_of_the_moments():
    ours, theirs = (torch.nn.Parameter(torch.ones(512)) for _ in range(2))
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    pair = (
        (ours, AdamW8([{"params": [ours], "lr": 0.01}], **options)),
        (
            theirs,
            torch.optim.AdamW([{"params": [theirs], "lr": 0.01}], **options),
        ),
    )
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        grad = torch.randn(512, generator=g)
        for parameter, optimizer in pair:
            parameter.grad = grad.clone()
            optimizer.step()
    moved = (theirs - 1).norm()
    assert ((ours - theirs).norm() / moved).item() < 0.05


def test_a_run_cut_in_pieces_is_bit_equal_to_one_that_was_not(tmp_path):
    recipe = Recipe(steps=12, lr=0.05, optimizer="adamw8")
    whole = train(*problem(torch.bfloat16)[:2], recipe)
    for until in (5, None):
        pieces = train(
            *problem(torch.bfloat16)[:2], recipe, checkpoint=Checkpoint(tmp_path / "c.safetensors"), until=until
        )
    assert torch.equal(whole["w"], pieces["w"])
