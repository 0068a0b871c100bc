"""P3S eq. 10 against numbers worked by hand."""

import pytest
import torch

from p3s_cli.config import WeightSchedule
from p3s_cli.paper.model import connected, controlled_noise
from p3s_cli.paper.schedule import LearnedWeight, injection_weight


def test_paper_values_at_both_ends_and_in_the_middle():
    s = WeightSchedule()
    assert injection_weight(1000, s) == pytest.approx(0.7)  # 1 - 0.5 + 0.2
    assert injection_weight(500, s) == pytest.approx(1.075)  # 1 - 0.5 / 4 + 0.2
    assert injection_weight(0, s) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("kind", "early", "late"),
    [("fixed", 1.0, 1.0), ("off", 0.0, 0.0), ("decreasing", 0.7, 1.2), ("increasing", 1.2, 0.7)],
)
def test_variants_early_and_late_in_denoising(kind, early, late):
    s = WeightSchedule(kind=kind)
    assert injection_weight(1000, s) == pytest.approx(early)
    assert injection_weight(0, s) == pytest.approx(late)


def test_decreasing_is_the_straight_line_and_increasing_mirrors_eq_10():
    assert injection_weight(500, WeightSchedule(kind="decreasing")) == pytest.approx(0.95)
    for t in (0, 130, 720, 1000):
        assert injection_weight(t, WeightSchedule(kind="increasing")) == pytest.approx(
            injection_weight(1000 - t, WeightSchedule())
        )


def test_a_learned_weight_is_the_fixed_one_before_training_and_a_function_of_t_after():
    torch.manual_seed(0)
    weight, t = LearnedWeight(), torch.tensor([0, 250, 999])
    assert torch.equal(weight(t), torch.ones(3))  # 2 sigmoid(0)
    torch.nn.init.normal_(weight.mlp[-1].weight)
    hidden = torch.nn.functional.silu(weight.mlp[0](torch.tensor([[0.25]])))
    by_hand = 2 / (1 + torch.exp(-(hidden @ weight.mlp[-1].weight.T)))
    assert weight(t)[1].item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert len(set(weight(t).tolist())) == 3 and ((weight(t) > 0) & (weight(t) < 2)).all()


@pytest.mark.parametrize("active", [None, torch.tensor([True, False])])
def test_the_learned_weight_learns_from_the_loss_in_both_forms_of_injection(unet, make_control, batch, active):
    """With a sample whose injection is dropped, too: it says nothing about the weight, and does not spoil the rest."""
    for form in ("gated", "literal"):
        control = make_control(trained=True, learned_weight=True, injection=form)
        x_t, t, text, latent, vision = batch
        with connected(unet, control):
            injection, _ = control.inject(x_t, t, text, control.see(latent, vision), control.weighting(t), active)
            controlled_noise(unet, x_t, t, text, injection).square().mean().backward()
        gradient = control.weighting.mlp[-1].weight.grad
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
