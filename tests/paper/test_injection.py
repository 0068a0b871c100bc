"""P3S eq. 7-9 and 13: the seam, both readings of it, and the guarantee that the U-Net comes back as it was."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from p3s_cli.paper.injection import Injection, attend, attention_seam, injected_keys_values
from p3s_cli.paper.model import connected, controlled_noise

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def attention(unet):
    return unet.get_submodule(LAYER)


def injection(f, gates=None, weight=1.0, active=None, lam=0.2):
    batch = len(f)
    return Injection(
        {LAYER: f},
        {},
        torch.full((batch,), weight),
        lam,
        None if gates is None else {LAYER: torch.tensor(gates)},
        active,
    )


def run(attn, z, injected):
    keys, values, bias = injected_keys_values(z, [injected], LAYER)
    return attend(attn, z, keys, values, bias, explicit=False)[0]


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 9, 128, generator=g), torch.randn(2, 9, 128, generator=g)


def test_literal_form_is_eq_7_and_8_as_printed(unet, states):
    z, f = states
    attn = attention(unet)
    q, k, v = attn.to_q(z), attn.to_k(torch.cat((z, f), 1)), attn.to_v(torch.cat((z + 0.2 * f, f), 1))
    heads = [x.view(2, -1, 4, 32).transpose(1, 2) for x in (q, k, v)]
    out = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(32), -1) @ heads[2]
    expected = attn.to_out[0](out.transpose(1, 2).reshape(2, 9, 128))
    torch.testing.assert_close(run(attn, z, injection(f)), expected, rtol=1e-4, atol=1e-5)


def test_literal_form_without_features_is_attention_over_n_extra_zero_tokens(unet, states):
    z, f = states
    attn = attention(unet)
    padded = torch.cat((z, torch.zeros_like(z)), 1)
    expected = attend(attn, z, padded, padded, None, explicit=False)[0]
    torch.testing.assert_close(run(attn, z, injection(torch.zeros_like(f))), expected)
    plain = attend(attn, z, z, z, None, explicit=False)[0]
    assert not torch.allclose(expected, plain, atol=1e-3)  # so it is not neutral


@pytest.mark.parametrize("gate", [-8.0, -4.0, 0.0])
def test_gate_shrinks_the_untrained_layer_by_exactly_the_extra_keys_share(unet, states, gate):
    """f = 0: extra logits are b, extra values 0, so each head's output is (1 - w) of the plain one, with
    w = N e^b / (N e^b + sum_j e^s_j), which Jensen bounds by 1 / (1 + e^(mean_j s_j - b))."""
    z, f = states
    attn = attention(unet)
    _, weights = attend(attn, z, z, z, None, explicit=True)
    q, k, v = (p(z).view(2, 9, 4, 32).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(32)
    share = 9 * math.exp(gate) / (9 * math.exp(gate) + logits.exp().sum(-1, keepdim=True))
    assert (share <= 1 / (1 + (logits.mean(-1, keepdim=True) - gate).exp()) + 1e-6).all()
    expected = attn.to_out[0](((1 - share) * (weights @ v)).transpose(1, 2).reshape(2, 9, 128))
    torch.testing.assert_close(run(attn, z, injection(torch.zeros_like(f), gates=gate)), expected, rtol=1e-4, atol=1e-5)


def test_gated_form_at_weight_zero_is_the_plain_layer_whatever_was_learnt(unet, states):
    z, f = states
    attn = attention(unet)
    plain = attend(attn, z, z, z, None, explicit=False)[0]
    torch.testing.assert_close(run(attn, z, injection(f, gates=3.0, weight=0.0)), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gates", [None, -1.0])
def test_inactive_samples_skip_the_concatenation(unet, states, gates):
    z, f = states
    attn = attention(unet)
    out = run(attn, z, injection(f, gates=gates, active=torch.tensor([True, False])))
    torch.testing.assert_close(out[1:], attend(attn, z, z, z, None, explicit=False)[0][1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:1], run(attn, z, injection(f, gates=gates))[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gates", [None, -1.0])
def test_references_of_one_subject_share_its_place(unet, states, gates):
    """K copies of an injection with share 1/K: each extra key K times at 1/K of its weight, so nothing changes."""
    z, f = states
    attn = attention(unet)
    thirds = [replace(injection(f, gates=gates, weight=0.7), share=1 / 3)] * 3
    keys, values, bias = injected_keys_values(z, thirds, LAYER)
    assert keys.shape == (2, 4 * 9, 128)
    out = attend(attn, z, keys, values, bias, explicit=False)[0]
    torch.testing.assert_close(out, run(attn, z, injection(f, gates=gates, weight=0.7)), rtol=1e-4, atol=1e-5)


def test_two_subjects_stand_side_by_side_each_with_its_own_strength(unet, states):
    """Keys [z, f, g], values [z + lam (a f + b g), f, g], logits shifted by log a + b_i and log b + b_i."""
    z, f = states
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    both = [injection(f, gates=-1.0, weight=0.5), injection(g, gates=-2.0, weight=1.5)]
    keys, values, bias = injected_keys_values(z, both, LAYER)
    assert torch.equal(keys, torch.cat((z, f, g), 1))
    torch.testing.assert_close(values, torch.cat((z + 0.2 * (0.5 * f + 1.5 * g), f, g), 1))
    expected = torch.tensor([0.0, math.log(0.5) - 1, math.log(1.5) - 2]).repeat_interleave(9).expand(2, 1, 1, 27)
    torch.testing.assert_close(bias, expected)
    # a subject at strength zero is not there
    gone = [both[0], replace(both[1], weight=torch.zeros(2))]
    out = attend(attention(unet), z, *injected_keys_values(z, gone, LAYER), explicit=False)[0]
    torch.testing.assert_close(out, run(attention(unet), z, both[0]), rtol=1e-5, atol=1e-6)


def test_explicit_softmax_and_sdpa_agree_and_rows_sum_to_one(unet, states):
    z, f = states
    keys, values, bias = injected_keys_values(z, [injection(f, gates=-2.0)], LAYER)
    out, weights = attend(attention(unet), z, keys, values, bias, explicit=True)
    torch.testing.assert_close(
        out, attend(attention(unet), z, keys, values, bias, explicit=False)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


@pytest.mark.parametrize("active", [None, torch.tensor([True, False])])
def test_a_gate_that_learns_gives_the_same_output_and_gradients_as_a_mask(unet, states, active):
    """The bias inside the keys against the bias as a mask: outputs, and gradients to z, f and the gate."""
    attn, found = attention(unet), []
    for explicit in (False, True):  # the explicit softmax takes the bias as it is
        z, f = (x.clone().requires_grad_() for x in states)
        gate = torch.tensor(-1.5, requires_grad=True)
        injected = Injection({LAYER: f}, {}, torch.full((2,), 0.8), 0.2, {LAYER: gate}, active)
        out, _ = attend(attn, z, *injected_keys_values(z, [injected], LAYER), explicit)
        found.append((out, *torch.autograd.grad(out.square().sum(), (z, f, gate))))
    assert found[0][3] != 0
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def noise(unet, control, batch, weight):
    x_t, t, text, latent, vision = batch
    with torch.no_grad(), connected(unet, control):
        injected, _ = control.inject(x_t, t, text, control.see(latent, vision), torch.full((2,), weight))
        return controlled_noise(unet, x_t, t, text, injected)


def test_trained_gated_control_at_weight_zero_equals_the_base_unet(unet, make_control, batch):
    base = unet(*batch[:3]).sample
    torch.testing.assert_close(noise(unet, make_control(trained=True), batch, 0.0), base, rtol=0, atol=1e-5)
    assert (noise(unet, make_control(trained=True), batch, 1.0) - base).abs().max() > 1e-2


def test_untrained_gated_control_departs_from_the_base_in_proportion_to_e_to_the_gate(unet, make_control, batch):
    base = unet(*batch[:3]).sample
    far, near = ((noise(unet, make_control(gate_start=b), batch, 1.0) - base).norm() for b in (-6.0, -9.0))
    assert far / near == pytest.approx(math.exp(3), rel=0.05)
    assert far / base.norm() < math.exp(-6)  # every layer keeps at least 1 - e^-6 of itself


def test_untrained_literal_control_does_not_equal_the_base(unet, make_control, batch):
    base = unet(*batch[:3]).sample
    assert (noise(unet, make_control(injection="literal"), batch, 1.0) - base).norm() / base.norm() > 0.02


def test_the_unet_comes_back_with_its_own_processors_and_weights(unet, make_control, batch):
    before = unet.attn_processors
    weights = {n: p.clone() for n, p in unet.state_dict().items()}
    control = make_control(trained=True)
    with pytest.raises(RuntimeError, match="on purpose"), connected(unet, control):
        assert type(next(iter(unet.attn_processors.values()))).__name__ == "_Receiver"
        raise RuntimeError("on purpose")
    assert all(unet.attn_processors[n] is p for n, p in before.items())
    noise(unet, control, batch, 1.0)
    assert all(torch.equal(weights[n], p) for n, p in unet.state_dict().items())


def test_within_the_seam_the_plain_pass_is_diffusers_own(unet, batch):
    base = unet(*batch[:3]).sample
    with attention_seam(unet, "frozen"):
        torch.testing.assert_close(unet(*batch[:3]).sample, base, rtol=1e-5, atol=1e-6)


def test_text_is_projected_once_for_as_long_as_the_same_states_come_back(unet, make_control, batch):
    """Two passes of guidance in turn, over steps: one projection a pass and layer, and the very same noise."""
    x_t, t, text, latent, vision = batch
    control, empty, calls = make_control(trained=True), torch.randn_like(text), []
    layers = [m for u in (unet, control.copy) for n, m in u.named_modules() if n.endswith("attn2")]
    for layer in layers:
        layer.to_k.register_forward_hook(lambda *_: calls.append(1))

    def step(states):
        injected, _ = control.inject(x_t, t, states, control.see(latent, vision), torch.ones(2))
        return controlled_noise(unet, x_t, t, states, injected)

    with torch.no_grad(), connected(unet, control):
        first, second = ([step(text), step(empty)] for _ in range(2))
        assert len(calls) == 2 * len(layers)
        again = step(text.clone())  # equal, but not known to be
        assert len(calls) == 3 * len(layers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(again, first[0])
    with connected(unet, control):  # another seam has forgotten, and training knows nothing
        step(text), step(text)
    assert len(calls) == 5 * len(layers)


def test_gradients_reach_every_trained_part_and_no_frozen_one(unet, make_control, batch):
    control = make_control(trained=True)
    x_t, t, text, latent, vision = batch
    with connected(unet, control):
        injected, maps = control.inject(x_t, t, text, control.see(latent, vision), torch.ones(2), maps=True)
        loss = F.mse_loss(controlled_noise(unet, x_t, t, text, injected), x_t) + sum(
            m.square().sum() for m in maps.values()
        )
    loss.backward()
    for part in ("zero_self", "zero_cross", "gates", "rngr", "copy.down_blocks", "copy.mid_block"):
        grads = [p.grad for n, p in control.named_parameters() if n.startswith(part)]
        assert all(g is not None and g.abs().sum() > 0 for g in grads), part
    assert all(p.grad is None for p in unet.parameters())


def test_maps_are_in_fp32_under_autocast_too(unet, states):
    """Rows of a bfloat16 softmax sum to 1 within 2^-8 each entry; in fp32, of fp32 logits, to rounding."""
    z, _ = states
    attn = attention(unet)
    with torch.autocast("cpu", torch.bfloat16):
        q, k = (projection(z).unflatten(-1, (4, 32)).transpose(1, 2).float() for projection in (attn.to_q, attn.to_k))
        _, weights = attend(attn, z, z, z, None, explicit=True)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(32), -1))


def test_maps_of_the_last_layer_only_or_of_all(unet, make_control, batch):
    x_t, t, text, latent, vision = batch
    for layers, expected in (("last", 1), ("all", 11)):
        control = make_control(attention_layers=layers)
        with torch.no_grad(), connected(unet, control):
            injected, maps = control.inject(x_t, t, text, control.see(latent, vision), torch.ones(2), maps=True)
            controlled_noise(unet, x_t, t, text, injected)
        assert len(maps) == expected and maps.keys() == injected.maps.keys()
    assert maps["up_blocks.1.attentions.2.transformer_blocks.0.attn2"].shape == (2, 4, 256, 77)
