"""P3S eq. 4-5."""

import torch

from p3s_cli.paper.rngr import RNGREncoder


def test_does_nothing_before_training():
    encoder = RNGREncoder(4, 12)
    latent = torch.randn(2, 4, 8, 6)
    assert torch.equal(encoder(latent, torch.randn(2, 5, 12)), latent)


def test_with_z_at_zero_the_bias_is_the_mean_value_everywhere():
    """Q = 0 makes the softmax uniform, so eq. 4 adds the mean of V to every position."""
    encoder = RNGREncoder(4, 12)
    torch.nn.init.normal_(encoder.to_v.weight)
    latent, vision = torch.randn(1, 4, 8, 6), torch.randn(1, 5, 12)
    expected = latent + encoder.to_v(vision).mean(1).view(1, 4, 1, 1)
    torch.testing.assert_close(encoder(latent, vision), expected)


def test_equals_eq_4_written_position_by_position():
    torch.manual_seed(0)
    encoder = RNGREncoder(4, 12, width=6)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    latent, vision = torch.randn(1, 4, 3, 2), torch.randn(1, 5, 12)
    key, value = vision[0] @ encoder.to_k.weight.T, vision[0] @ encoder.to_v.weight.T
    expected = latent.clone()
    for i in range(3):
        for j in range(2):
            z = encoder.zero_conv.weight[:, :, 0, 0] @ latent[0, :, i, j] + encoder.zero_conv.bias
            weights = torch.softmax(key @ (encoder.to_q.weight @ z) / 6**0.5, dim=0)
            expected[0, :, i, j] += weights @ value
    torch.testing.assert_close(encoder(latent, vision), expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_reaches_w_v():
    encoder = RNGREncoder(4, 12)
    encoder(torch.randn(1, 4, 4, 4), torch.randn(1, 5, 12)).square().sum().backward()
    assert encoder.to_v.weight.grad.abs().sum() > 0
