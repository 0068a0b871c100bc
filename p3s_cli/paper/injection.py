"""P3S eq. 7-8 and 13: the attention seam between the copy and the frozen U-Net.

Features travel as an argument (`cross_attention_kwargs={"p3s": ...}`), never on a module, and the
processors live inside `attention_seam`, which hands the U-Net back with the ones it came with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Recording:
    """What one forward pass of the copy leaves behind, by the copy's layer names.

    `self_inputs` and `cross_outputs`: (B, N, C). `maps`: eq. 13's softmax (B, heads, N, M), fp32, only
    for the layers named in `wanted`.
    """

    wanted: frozenset[str] = frozenset()
    self_inputs: dict[str, Tensor] = field(default_factory=dict)
    cross_outputs: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Injection:
    """What the frozen U-Net receives, by its own layer names.

    `features`: f_i of eq. 6 (B, N, C) for self-attention. `cross`: the enhancement of cross-attention
    (B, N, C). `weight`: eps_t of eq. 9, (B,). `gates`: b_i of the gated form, None for the literal one.
    `active` (B,) bool: samples that are not gets the plain layer, extra keys skipped. `share`: this injection's
    part of its subject, 1/K where K references of one subject are injected side by side. `maps` as above.
    """

    features: dict[str, Tensor]
    cross: dict[str, Tensor]
    weight: Tensor
    lam: float
    gates: dict[str, Tensor] | None = None
    active: Tensor | None = None
    share: float = 1.0
    wanted: frozenset[str] = frozenset()
    maps: dict[str, Tensor] = field(default_factory=dict)


class TextKeys:
    """One layer's keys and values of the text. While sampling the same states come at every step: projected once.

    Two are known at a time, because guidance has passes with the subject and without.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def __call__(self, attn: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
        """states (B, 77, D), recognised as the very same tensor, unchanged -> keys, values (B, heads, 77, d)."""
        # training draws other texts at every step; a graph, compiled or recorded, would not notice that another tensor came
        keeps = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _capturing(states))
        version = 0 if not keeps or states.is_inference() else states._version
        for known, its_version, keys, values in self._known if keeps else ():
            if known is states and its_version == version:
                return keys, values
        keys, values = _heads(attn, attn.to_k, states), _heads(attn, attn.to_v, states)
        if keeps:
            self._known = [*self._known[-1:], (states, version, keys, values)]
        return keys, values


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which would take what is kept for what comes later."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _heads(attn: Attention, projection: torch.nn.Module, x: Tensor) -> Tensor:
    return projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, d)


def attend(
    attn: Attention,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    explicit: bool,
    text: TextKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One attention layer with its own projections: (B, N, C) queries over (B, M, *) keys and values.

    `bias` broadcasts to (B, heads, N, M). With `explicit`, P3S eq. 13's softmax is computed in fp32 and
    returned as well; otherwise scaled_dot_product_attention does the work. `text` takes the projections of `keys`
    and `values`, which are text states then, from the steps before.
    """
    q = _heads(attn, attn.to_q, query)
    k, v = text(attn, keys) if text else (_heads(attn, attn.to_k, keys), _heads(attn, attn.to_v, values))
    weights = None
    if explicit:
        weights = _map(q, k, bias)
        out = weights.to(v.dtype) @ v
    elif bias is not None and (bias.requires_grad or bias.is_cuda):  # flash attention on CUDA takes no mask either
        out = _learnt_bias_attention(q, k, v, bias)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return attn.to_out[0](out.transpose(1, 2).flatten(2)), weights


def _map(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """P3S eq. 13: softmax(q k^T / sqrt(d) + bias), (B, heads, N, M), in fp32 under autocast, too."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def _learnt_bias_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for a bias that needs a gradient, (B, 1, 1, M).

    No fused kernel returns a mask's gradient without a tensor as large as the logits. So the bias stands in the
    keys, as one more entry that every query multiplies by one; all are widened by 8, as kernels on CUDA ask for.
    """
    width, (batch, heads, queries, _) = q.shape[-1], q.shape
    # minus infinity times the zeros beside it would be no number; this far down a key weighs exactly nothing
    column = (bias * width**0.5).clamp(min=-6e4).to(k.dtype).transpose(-1, -2).expand(batch, heads, -1, 1)
    q = torch.cat(
        [q, q.new_ones(1).expand(batch, heads, queries, 1), q.new_zeros(1).expand(batch, heads, queries, 7)], -1
    )
    k = torch.cat([k, column, k.new_zeros(1).expand(batch, heads, k.shape[2], 7)], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=width**-0.5)[..., :width]


class _Recorder:
    """The copy's processor: plain attention that also writes down what eq. 6 and eq. 13 ask for."""

    def __init__(self, name: str):
        self.name, self.text = name, TextKeys()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        p3s: Recording | None = None,
    ) -> Tensor:
        context, text = (hidden_states, None) if encoder_hidden_states is None else (encoder_hidden_states, self.text)
        explicit = p3s is not None and self.name in p3s.wanted
        out, weights = attend(attn, hidden_states, context, context, None, explicit, text)
        if p3s is not None:
            if encoder_hidden_states is None:
                p3s.self_inputs[self.name] = hidden_states
            else:
                p3s.cross_outputs[self.name] = out
            if weights is not None:
                p3s.maps[self.name] = weights
        return out


class _Receiver:
    """The frozen U-Net's processor: P3S eq. 7-8 in self-attention, the enhancement in cross-attention."""

    def __init__(self, name: str):
        self.name, self.text = name, TextKeys()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        p3s: Sequence[Injection] = (),
    ) -> Tensor:
        context, text = (hidden_states, None) if encoder_hidden_states is None else (encoder_hidden_states, self.text)
        explicit = [i for i in p3s if self.name in i.wanted]
        if p3s and encoder_hidden_states is None:
            keys, values, bias = injected_keys_values(hidden_states, p3s, self.name)
            out, weights = attend(attn, hidden_states, keys, values, bias, bool(explicit))
        else:
            out, weights = attend(attn, hidden_states, context, context, None, bool(explicit), text)
            for injection in p3s:
                # in the layer's own precision: a CPU's layer norm takes no float32 beside bfloat16 weights
                out = out + (_weight(injection) * injection.share * injection.cross[self.name]).to(out.dtype)
        for injection in explicit:
            injection.maps[self.name] = weights
        return out


def _weight(p3s: Injection) -> Tensor:
    """(B, 1, 1), zero where the sample is not active."""
    weight = p3s.weight if p3s.active is None else p3s.weight * p3s.active
    return weight.view(-1, 1, 1)


def injected_keys_values(z: Tensor, p3s: Sequence[Injection], name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """P3S eq. 7: what K' and V' are projected from, and the bias on the logits of eq. 8.

    Literal: K' from [z, eps f], V' from [z + lam eps f, eps f]. Gated: K' from [z, f], V' from
    [z + lam eps f, f], and the extra keys' logits shifted by log(eps) + b_i, so that eps = 0 is the plain
    layer. Inactive samples: extra keys at minus infinity. Of several injections the features are put side by
    side, each with its own eps, and their lam eps f summed; a share s adds log(s), so that K copies of one
    injection with share 1/K are that injection. z (B, N, C) -> (B, M, C), (B, M, C), (B, 1, 1, M) or None.
    """
    keys, values, shifts, base = [z], [z], [z.new_zeros(len(z), 1, z.shape[1], dtype=torch.float32)], z
    for injection in p3s:
        f, weight = injection.features[name].to(z.dtype), _weight(injection).to(z.dtype)
        extra = f if injection.gates is not None else weight * f
        base = base + injection.lam * injection.share * weight * f
        keys, values = [*keys, extra], [*values, extra]
        shifts.append(_shift(injection, name).expand(len(z), 1, f.shape[1]))
    values[0] = base
    neutral = all(i.gates is None and i.active is None and i.share == 1 for i in p3s)
    bias = None if neutral else torch.cat(shifts, dim=-1)[:, None]
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), bias


def _shift(p3s: Injection, name: str) -> Tensor:
    """What is added to the logits of an injection's extra keys, (B, 1, 1), fp32."""
    weight, share = p3s.weight.view(-1, 1, 1).float(), math.log(p3s.share)
    shift = torch.full_like(weight, share) if p3s.gates is None else weight.log() + p3s.gates[name].float() + share
    # filled in, for the logarithm of a weight made zero has no gradient that a learnt weight could use
    return shift if p3s.active is None else shift.masked_fill(~p3s.active.view(-1, 1, 1), float("-inf"))


@contextlib.contextmanager
def attention_seam(unet: UNet2DConditionModel, role: str) -> Iterator[None]:
    """Let `unet` record (`role="copy"`) or receive (`role="frozen"`); its own processors are back on exit."""
    make: Callable = {"copy": _Recorder, "frozen": _Receiver}[role]
    before = unet.attn_processors
    unet.set_attn_processor({name: make(name.removesuffix(".processor")) for name in before})
    try:
        yield
    finally:
        unet.set_attn_processor(before)
