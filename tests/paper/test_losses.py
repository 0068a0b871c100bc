"""P3S eq. 11-12, 14-15 against closed forms."""

import pytest
import torch

from p3s_cli.paper.losses import attention_consistency, denoising_loss, total_loss


def one_hot_maps(batch=2, heads=3, queries=5, tokens=7):
    """M_c looks at token 0, M_o at token 1: every row differs by (1, -1), squared 2."""
    copy, frozen = torch.zeros(2, batch, heads, queries, tokens)
    copy[..., 0], frozen[..., 1] = 1, 1
    return copy, frozen


def test_three_readings_of_the_same_maps():
    copy, frozen = one_hot_maps()
    rows, entries = 2 * 3 * 5, 2 * 3 * 5 * 7
    assert attention_consistency(copy, frozen, "printed") == pytest.approx((2 * rows / entries) / rows)
    assert attention_consistency(copy, frozen, "sum") == pytest.approx(2.0)  # squared error per query
    assert attention_consistency(copy, frozen, "relative") == pytest.approx((2 / 7) / (1 / 7) ** 2)


def test_avg_of_softmax_maps_is_a_constant():
    """Rows sum to 1, so eq. 12's avg is B heads N: 32,768 B for SD v1-5's last layer (8 heads, 64 x 64 queries)."""
    g = torch.Generator().manual_seed(0)
    copy, frozen = (torch.randn(2, 8, 16, 77, generator=g).softmax(-1) for _ in range(2))
    expected = (copy - frozen).square().mean() / (2 * 8 * 16)
    assert attention_consistency(copy, frozen, "printed") == pytest.approx(expected.item(), rel=1e-5)


def test_equal_maps_cost_nothing_and_unknown_readings_are_refused():
    copy, _ = one_hot_maps()
    for reading in ("printed", "sum", "relative"):
        assert attention_consistency(copy, copy, reading) == 0
    with pytest.raises(ValueError, match="no reading"):
        attention_consistency(copy, copy, "mean")


def test_denoising_loss_is_the_mean_square_and_weights_are_relative():
    predicted, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    noise[..., 0] = 3.0
    assert denoising_loss(predicted, noise) == pytest.approx(5.0)  # (1 + 9) / 2
    left = torch.zeros(1, 1, 2, 2)
    left[..., 0] = 1
    assert denoising_loss(predicted, noise, left) == pytest.approx(9.0)
    assert denoising_loss(predicted, noise, 7 * torch.ones(1, 1, 2, 2)) == pytest.approx(5.0)


def test_total_adds_gamma_times_the_mean_over_layers():
    copy, frozen = one_hot_maps()
    value, consistency = total_loss(torch.tensor(1.0), {"a": copy, "b": copy}, {"a": frozen, "b": copy}, 0.1, "sum")
    assert consistency == pytest.approx(1.0)  # layers cost 2 and 0
    assert value == pytest.approx(1.1)
    assert total_loss(torch.tensor(1.0), {"a": copy}, {"a": frozen}, 0.1, "off")[0] == 1.0


@pytest.mark.parametrize(("gradient", "flows"), [("copy", False), ("both", True)])
def test_gradient_into_the_frozen_map_is_a_choice(gradient, flows):
    copy, frozen = (m.requires_grad_() for m in one_hot_maps())
    total_loss(torch.tensor(0.0), {"a": copy}, {"a": frozen}, 0.1, "sum", gradient)[0].backward()
    assert copy.grad.abs().sum() > 0
    assert (frozen.grad is not None) == flows
