"""What the rivals minimise, on fixed draws and in closed form."""

import copy
import json

import torch
from diffusers import UNet2DConditionModel
from rivals import bound, noise

from p3s_cli.config import FinetuneConfig
from p3s_cli.methods import denoising
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.break_a_scene import Scenes, _Attention, _layers
from p3s_cli.methods.custom_diffusion import _Own
from p3s_cli.methods.denoising import Denoising, LatentBank, SubBatch, alphas_cumprod, partly_trained, training_copy
from p3s_cli.methods.dreambooth import DreamBooth, DreamBoothRecipe
from p3s_cli.methods.words import NewWord
from p3s_cli.paper.injection import attention_seam
from p3s_cli.paper.losses import denoising_loss
from p3s_cli.sd import text
from p3s_cli.sd.family import Family
from p3s_cli.sd.single_file import CONFIGS
from p3s_cli.sd.train import step_generator


def test_prior_preservation_is_the_sum_of_two_means(family):
    """DreamBooth eq. 2 on a fixed batch: the same draws, the U-Net asked for each part by itself."""
    g = torch.Generator().manual_seed(0)
    own, others = torch.randn(2, 4, 16, 16, generator=g), torch.randn(3, 4, 16, 16, generator=g)
    one, two = text.encode(family.tokenizer, family.text_encoder, ["a photo of a sks dog", "a photo of a dog"]).split(1)
    loss = Denoising(family, family.unet, [LatentBank(own, one, 2), LatentBank(others, two, 3, weight=0.7)])
    value, _ = loss(0, step_generator(0, 4))
    g = step_generator(0, 4)
    i, j = torch.randint(2, (2,), generator=g), torch.randint(3, (3,), generator=g)
    t = torch.randint(1000, (5,), generator=g)
    noise = torch.randn(5, 4, 16, 16, generator=g)
    a = alphas_cumprod(family)[t].view(-1, 1, 1, 1)
    x_t = a**0.5 * torch.cat((own[i], others[j])) + (1 - a) ** 0.5 * noise
    error = lambda k, states: (family.unet(x_t[k], t[k], states).sample - noise[k]).square().mean()  # noqa: E731
    expected = error(slice(2), one.expand(2, -1, -1)) + 0.7 * error(slice(2, 5), two.expand(3, -1, -1))
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


class _Answer(torch.nn.Module):
    """A U-Net whose prediction is a parameter, so that the loss can be read as a function of it."""

    def __init__(self, shape):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, x_t, t, states):
        return type("Output", (), {"sample": self.answer})


def test_the_masked_loss_ignores_what_is_outside_the_mask(family, subject):
    """It is mean ||m (noise - predicted)||^2 over all positions: same value and no gradient whatever lies outside."""
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., 4:9, 5:14] = 1
    word = NewWord(family, subject.manifest, instead_of_class=True)
    masked = Scenes(torch.zeros(1, 4, 16, 16), word, "a photo of a sks dog", 1, inside)
    unet = _Answer((1, 4, 16, 16))
    loss = Denoising(family, unet, [masked])
    first, _ = loss(0, step_generator(0, 0))
    first.backward()
    outside = (inside == 0).expand(1, 4, 16, 16)
    assert not unet.answer.grad[outside].any() and unet.answer.grad[~outside].all()
    with torch.no_grad():
        unet.answer[outside] = 100.0
    torch.testing.assert_close(loss(0, step_generator(0, 0))[0], first)
    g = step_generator(0, 0)
    torch.randint(1, (1,), generator=g), torch.randint(1000, (1,), generator=g)
    truth = torch.randn(1, 4, 16, 16, generator=g)
    torch.testing.assert_close(first.detach(), (truth * inside).square().mean())


def test_break_a_scene_keeps_the_text_encoder_that_it_tunes_by_class_images_as_well(family, subject):
    """The authors send both prompts through it at every step: what it has become by then is what is held."""
    word = NewWord(family, subject.manifest, instead_of_class=True)
    kept = Scenes(torch.zeros(2, 4, 16, 16), word, "a photo at the beach", 1)
    before = kept(step_generator(0, 0)).states
    assert torch.equal(before, word.encode(["a photo at the beach"]))
    parameter = next(p for n, p in word.text_encoder.named_parameters() if n.endswith("fc1.weight")).requires_grad_(
        True
    )
    kept(step_generator(0, 0)).states.sum().backward()
    assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        parameter.mul_(1.1)
    assert (kept(step_generator(0, 0)).states - before).abs().max() > 1e-3


def test_break_a_scene_s_attention_loss_is_nil_where_the_word_attends_to_the_subject_alone(family, subject):
    """||mask - map / max||^2 by hand: nil for the mask's own shape however faint, and the uncovered share for none of it."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 2:9] = 1.0
    part = SubBatch(torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, 8), mask)
    word, attends = torch.eye(77)[5], _Attention(place=5, weight=0.5)

    def maps(shape: torch.Tensor) -> dict[str, torch.Tensor]:  # of two layers with a head each, (1, 1, 256, 77)
        return {name: 0.3 * shape.flatten(1)[:, None, :, None] * word for name in "ab"}

    assert attends([part], maps(mask)) == 0
    outside = maps(1 - mask)
    assert attends([part], outside) == 0.5  # every position is wrong by one


def test_break_a_scene_reads_the_layers_of_16_x_16_of_sd_v1_5_and_changes_no_prediction(family, subject):
    with torch.device("meta"):
        full = UNet2DConditionModel.from_config(json.loads((CONFIGS / "unet" / "config.json").read_text()))
    names = _layers(full, 64)
    assert {".".join(n.split(".")[:2]) for n in names} == {"down_blocks.2", "up_blocks.1"} and len(names) == 2 + 3
    latents, states = torch.zeros(2, 4, 16, 16), torch.zeros(1, 77, 128)
    sources, watched = [LatentBank(latents, states, 2)], _layers(family.unet, 16)
    plain = Denoising(family, family.unet, sources)(0, step_generator(0, 0))[0]
    heard = {}
    with attention_seam(family.unet, "copy"):
        beside = Denoising(family, family.unet, sources, watched, lambda _, maps: heard.update(maps) or torch.ones(()))
        torch.testing.assert_close(beside(0, step_generator(0, 0))[0], plain + 1)
    assert heard.keys() == watched and {m.shape[2:] for m in heard.values()} == {(256, 77)}


def test_a_new_word_knows_its_place(family, subject):
    word = NewWord(family, subject.manifest, instead_of_class=True)
    ids = word.tokenizer(word.spell(f"a photo of a {subject.manifest.name}")).input_ids
    assert word.place(f"a photo of a {subject.manifest.name}") == len(ids) - 2  # the last but the end


def test_custom_diffusion_s_own_loss_is_that_of_diffusers_example(family, subject):
    """mean over views of sum (m error) / sum m, m one channel and the error four, however large each view is."""
    word = NewWord(family, subject.manifest, instead_of_class=False)
    own = _Own(family, subject, word, batch=6, seed=0)
    part = own(step_generator(0, 0))
    assert len({float(m.sum()) for m in (part.inside > 0).float()}) > 1  # else any way to average would do
    predicted, noise = torch.randn(2, 6, 4, 16, 16, generator=step_generator(0, 1))
    mask = (part.inside > 0).float()
    theirs = (((predicted - noise).square() * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    torch.testing.assert_close(part.weight * denoising_loss(predicted, noise, part.inside), theirs)


def test_parts_without_a_mask_and_with_a_full_one_are_the_same(family):
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, 128, generator=g)
    parts = SubBatch(latents, states), SubBatch(latents, states, torch.ones(1, 1, 16, 16))
    plain, full = (denoising.Denoising(family, family.unet, [lambda g, p=p: p])(0, step_generator(0, 0)) for p in parts)
    torch.testing.assert_close(plain[0], full[0])


def test_half_precision_training_keeps_float32_weights(family, subject):
    """A rate of 1e-6 on weights near 1 is nothing in bfloat16; the copy that trains must not be in it."""
    half = Family(family.source, family.profile, "cpu", torch.bfloat16)
    half.__dict__["unet"] = copy.deepcopy(family.unet).to(torch.bfloat16)
    lesson = Lesson(half, subject, FinetuneConfig())
    tensors = DreamBooth("dreambooth", DreamBoothRecipe(steps=1, lr=1e-6)).fit(lesson)
    base = training_copy(half.unet).state_dict()
    moved = [(tensors[f"unet.{n}"] != p).float().mean().item() for n, p in base.items()]
    assert min(moved) > 0.5 and half.unet.dtype == torch.bfloat16
    with bound("dreambooth", half, subject, tensors) as generator:
        assert torch.isfinite(noise(generator, half)).all()


def test_of_what_trains_in_part_the_rest_stays_in_half_precision(family):
    """A U-Net of SD v1-5's size is 1.7 GB in bfloat16 and 3.4 in float32, whether or not it learns."""
    unet = partly_trained(copy.deepcopy(family.unet).to(torch.bfloat16), lambda name: "attn2.to_k" in name)
    kinds = {(("attn2.to_k" in n), p.dtype, p.requires_grad) for n, p in unet.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}
