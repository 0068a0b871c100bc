"""The one loop: it descends, resumes bit-equal, skips what is not finite."""

import pytest
import torch

from p3s_cli.errors import P3SError
from p3s_cli.sd.train import Checkpoint, Recipe, learning_rate, train


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
    assert [learning_rate(recipe, s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(recipe, 60) == pytest.approx(0.5)
    assert learning_rate(Recipe(steps=10, lr=1.0), 9) == 1.0


def test_named_parameters_may_learn_faster():
    """Adam's first step moves a parameter by its learning rate, whatever the gradient."""
    parameters = {"gates.a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1))}

    def loss(step, generator):
        return sum(p.sum() for p in parameters.values()), {}

    train(parameters, loss, Recipe(steps=1, lr=1e-3, lr_scale=(("gates", 100.0),)))
    assert parameters["gates.a"].item() == pytest.approx(-0.1, rel=1e-3)
    assert parameters["b"].item() == pytest.approx(-1e-3, rel=1e-3)
