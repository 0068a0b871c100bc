"""The one loop: it descends, resumes bit-equal, skips what is not finite."""

from dataclasses import replace

import pytest
import torch

from p3s_cli.errors import P3SError
from p3s_cli.sd.train import Checkpoint, Recipe, rate_factor, train


def problem():
    """Fit w to a noisy target; the noise comes from the step's generator."""
    w = torch.nn.Parameter(torch.zeros(3))
    target = torch.tensor([1.0, -2.0, 0.5])

    def loss(step, generator):
        return (w - target - 0.01 * torch.randn(3, generator=generator)).square().sum(), {}

    return {"w": w}, loss, target


def test_finds_the_minimum():
    parameters, loss, target = problem()
    weights = train(parameters, loss, Recipe(steps=400, lr=0.05, decay="cosine"))
    torch.testing.assert_close(weights["w"], target, atol=0.02, rtol=0)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_cut_in_pieces_is_bit_equal_to_one_that_was_not(tmp_path, ema):
    recipe = Recipe(steps=30, lr=0.05, warmup=5, decay="cosine", ema=ema)
    whole = train(*problem()[:2], recipe)
    for until in (7, 19, None):
        pieces = train(*problem()[:2], recipe, checkpoint=Checkpoint(tmp_path / "run"), until=until)
    assert torch.equal(whole["w"], pieces["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_one_bad_step_is_skipped_and_many_stop_the_run():
    parameters, loss, _ = problem()

    def sometimes(step, generator):
        value, log = loss(step, generator)
        return (value * float("nan") if step == 3 else value), log

    weights = train(parameters, sometimes, Recipe(steps=50, lr=0.05))
    assert torch.isfinite(weights["w"]).all()
    with pytest.raises(P3SError, match="not finite"):
        train(problem()[0], lambda s, g: (parameters["w"].sum() * float("inf"), {}), Recipe(steps=50, lr=0.05))


def test_a_gradient_that_is_not_finite_moves_nothing():
    """The loss sqrt(|w|) is 0 where its slope is infinite."""
    w = torch.nn.Parameter(torch.tensor([0.0, 4.0]))
    heard = []

    def loss(step, generator):
        return (w.abs().sqrt()[0] if step == 1 else w[1] ** 2), {}

    train({"w": w}, loss, Recipe(steps=2, lr=0.1), lambda step, total, numbers: heard.append((w.tolist(), numbers)))
    (first, before), (second, after) = heard
    assert first == second and (before["skipped"], after["skipped"]) == (0, 1)


def test_learning_rate_warms_up_then_falls_along_a_half_cosine():
    recipe = Recipe(steps=110, lr=1.0, warmup=10, decay="cosine")
    assert [rate_factor(recipe, s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert rate_factor(recipe, 60) == pytest.approx(0.5)
    assert rate_factor(Recipe(steps=10, lr=1.0), 9) == 1.0


def test_named_parameters_may_learn_faster():
    """Adam's first step moves a parameter by its learning rate, whatever the gradient."""
    parameters = {"gates.a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1))}

    def loss(step, generator):
        return sum(p.sum() for p in parameters.values()), {}

    train(parameters, loss, Recipe(steps=1, lr=1e-3, lr_scale=(("gates", 100.0),)))
    assert parameters["gates.a"].item() == pytest.approx(-0.1, rel=1e-3)
    assert parameters["b"].item() == pytest.approx(-1e-3, rel=1e-3)


def test_scaling_for_half_precision_changes_no_bit_where_nothing_would_be_lost(tmp_path):
    """The scale is a power of two, which floats multiply and divide by exactly; a checkpoint keeps it."""
    recipe = Recipe(steps=30, lr=0.05)
    plain, half = (train(*problem()[:2], r)["w"] for r in (recipe, replace(recipe, half=True)))
    assert torch.equal(plain, half)
    for until in (11, None):
        pieces = train(*problem()[:2], replace(recipe, half=True), checkpoint=Checkpoint(tmp_path / "run"), until=until)
    assert torch.equal(plain, pieces["w"])


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_in_another_precision_than_it_began_in(tmp_path, first):
    recipe = Recipe(steps=6, lr=0.1)
    whole, checkpoint = train(*problem()[:2], recipe)["w"], Checkpoint(tmp_path / "run")
    train(*problem()[:2], replace(recipe, half=first), checkpoint=checkpoint, until=3)
    assert torch.equal(train(*problem()[:2], replace(recipe, half=not first), checkpoint=checkpoint)["w"], whole)


def test_masters_in_bfloat16_learn_beside_a_float16_forward_pass():
    """Which GradScaler refuses on CUDA: there is no kernel to unscale their gradients. One step of Adam is lr."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    recipe = Recipe(1, 0.5, half=True, optimizer="adamw8")
    made = train({"w": w}, lambda *_: (w.half().float().sum() * 2**-10, {}), recipe)["w"]
    assert made.item() == pytest.approx(-0.5, rel=2**-7)


def test_gradients_too_small_for_half_precision_are_not_lost():
    """2^-26 is a quarter of fp16's smallest number, 2^-24, and rounds to nothing; 2^16 times it does not.

    Adam's first step is lr g / (g + 1e-8).
    """

    def learnt(half: bool) -> float:
        w = torch.nn.Parameter(torch.zeros(1))
        return float(train({"w": w}, lambda *_: (w.half().float().sum() * 2**-26, {}), Recipe(1, 0.1, half=half))["w"])

    first = -0.1 * 2**-26 / (2**-26 + 1e-8)
    assert learnt(half=False) == 0 and learnt(half=True) == pytest.approx(first, rel=1e-2)


def test_a_gradient_that_overflows_when_scaled_is_skipped_until_the_scale_suits_it():
    """1 times 2^16 is beyond fp16's 65504, half of it is not: one step is skipped."""
    w = torch.nn.Parameter(torch.zeros(1))
    seen = []
    train({"w": w}, lambda *_: (w.half().float().sum(), {}), Recipe(3, 0.1, half=True), lambda *a: seen.append(a[2]))
    assert [s["skipped"] for s in seen] == [1, 1, 1] and w.item() == pytest.approx(-0.2, rel=1e-3)


def test_no_gradient_outlives_its_step():
    """The next forward pass needs the memory they are in."""
    w, found = torch.nn.Parameter(torch.zeros(2)), []

    def loss(step, generator):
        found.append(w.grad)
        return (w - 1).square().sum() * (torch.inf if step == 1 else 1), {}

    train({"w": w}, loss, Recipe(steps=4, lr=0.1))
    assert found == [None] * 4 and w.grad is None


@pytest.mark.parametrize("last", [True, False])
def test_the_state_at_the_end_is_kept_where_someone_comes_back_for_it(tmp_path, last):
    checkpoint, recipe = Checkpoint(tmp_path / "run", last=last), Recipe(steps=5, lr=0.1)
    for until, kept in ((3, ["step-00000003"]), (None, ["step-00000005" if last else "step-00000003"])):
        train(*problem()[:2], recipe, checkpoint=checkpoint, until=until)
        assert [p.name for p in checkpoint.path.iterdir()] == kept
