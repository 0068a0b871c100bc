"""States led astray: how many, how far, and that the target is still the picture."""

import torch

from p3s_cli.methods.denoising import add_noise, astray

SCHEDULE = torch.linspace(0.999, 0.005, 1000)


def made(share: float, size: float = 0.7):
    x0 = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x_t, t, noise = add_noise(x0, SCHEDULE, generator)
    alpha = SCHEDULE[t].view(-1, 1, 1, 1)
    return x0, alpha, (x_t, noise), astray(x_t, noise, alpha, generator, size, share)


def test_the_noise_leads_from_the_state_to_the_same_picture():
    x0, alpha, _, (state, noise) = made(share=1.0)
    assert torch.allclose((state - (1 - alpha).sqrt() * noise) / alpha.sqrt(), x0, atol=1e-4)


def test_nothing_moves_at_a_share_of_none():
    _, _, before, after = made(share=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_share_of_the_pictures_moves_as_far_as_asked():
    """The mean over a picture is a channel's shift and 0.7 times the mean of sixteen patches: sqrt(1 + 0.49 / 16) sizes."""
    _, alpha, (x_t, _), (state, _) = made(share=0.5, size=0.2)
    moved = (state - x_t).mean((2, 3)) / torch.minimum(alpha, 1 - alpha).sqrt()[..., 0, 0]
    led = moved[:, 0] != 0
    assert 0.3 < led.float().mean() < 0.7  # 64 coins: four standard deviations are 0.25
    assert abs(moved[led].square().mean().sqrt() / 0.203 - 1) < 0.25  # some 130 draws: four standard deviations
