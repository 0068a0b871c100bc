"""Every rival keeps the contract: the family as found, and nothing trained but what its paper trains."""

import copy
import dataclasses

import diffusers
import pytest
import torch

from p3s_cli import methods, stages
from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.errors import InputError
from p3s_cli.methods import denoising
from p3s_cli.methods.base import Learnt, Lesson, settled
from p3s_cli.methods.break_a_scene import Masked
from p3s_cli.methods.custom_diffusion import rescaled
from p3s_cli.methods.denoising import Bank, Denoising, Part, noise_schedule, training_copy, tuned_copy
from p3s_cli.methods.dreambooth import DreamBooth, DreamBoothRecipe
from p3s_cli.methods.pace import Pace, measure
from p3s_cli.methods.textual_inversion import TEMPLATES
from p3s_cli.methods.words import NewWord
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family
from p3s_cli.sd.train import step_generator
from p3s_cli.subject import Subject

RIVALS = tuple(n for n in methods.NAMES if n != "p3s")
QUICK = {"class_images": 2, "class_steps": 1}


@pytest.fixture(scope="module")
def family(world):
    """The bundled family with a smaller U-Net of random weights; it asks for two quickly drawn class images."""
    table = {n: QUICK for n in ("dreambooth-prior", "custom-diffusion", "break-a-scene")}
    family = Family(world.source, dataclasses.replace(world.profile, methods=table), world.device, world.dtype)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    family.__dict__["unet"] = unet.eval().requires_grad_(False)
    return family


@pytest.fixture(scope="module")
def subject(tmp_path_factory, pair, family):
    root = tmp_path_factory.mktemp("rivals")
    images.save_png(root / "two.png", pair[0])
    left, right = pair[2]
    return Subject.open(stages.mask(root / "two.png", [left], [right], root / "pet", "dog", family=family).subject)


@pytest.fixture(scope="module")
def found(family):
    """The family before anything was learnt: weights, processors, kinds of modules, size of the vocabulary."""
    return {n: p.clone() for n, p in state(family).items()}, looks(family)


@pytest.fixture(scope="module")
def learnt(family, subject, found):
    """What each rival learns in two steps at a high rate, so that every part that can move has moved."""
    config = FinetuneConfig(steps=2, lr=1e-3)
    return {n: methods.get(n).fit(Lesson(family, subject, config)) for n in RIVALS}


def bound(name, family, subject, tensors, strength=1.0):
    method = methods.get(name)
    recipe = dataclasses.asdict(method.recipe(family.profile, FinetuneConfig()))
    return method.bind(family, Learnt(subject, tensors, recipe), GenerateConfig(strength=strength))


def state(family):
    parts = {"unet": family.unet, "text": family.text_encoder, "vae": family.vae}
    return {f"{k}.{n}": p for k, m in parts.items() for n, p in m.state_dict().items()}


def looks(family):
    processors = dict(family.unet.attn_processors)
    return processors, [type(m) for m in family.unet.modules()], len(family.tokenizer)


def noise(generator, family, prompt="a sks dog on the beach", with_subject=True):
    g = torch.Generator().manual_seed(3)
    x_t = torch.randn(1, 4, 16, 16, generator=g)
    with torch.no_grad():
        return generator.eps(x_t, torch.tensor([400]), generator.encode([prompt]), with_subject)


@pytest.mark.parametrize("name", RIVALS)
def test_the_family_is_as_found_after_fit_and_bind(name, family, subject, found, learnt):
    with bound(name, family, subject, learnt[name]) as generator:
        noise(generator, family)
    before, after = found[0], state(family)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert looks(family) == found[1]
    assert not any(p.requires_grad for m in (family.unet, family.text_encoder) for p in m.parameters())


def changed(family, tensors, prefix="unet."):
    """Names of U-Net parameters that differ from the base's once the tensors are in."""
    base = dict(family.unet.named_parameters())
    tuned = tuned_copy(family.unet, tensors, prefix, 1.0).named_parameters()
    return {n for n, p in tuned if not torch.equal(p, base[n])}


def test_dreambooth_trains_the_u_net_and_nothing_else(family, learnt):
    names = {n for n, _ in family.unet.named_parameters()}
    for name in ("dreambooth", "dreambooth-prior"):
        assert learnt[name].keys() == {f"unet.{n}" for n in names}
        assert changed(family, learnt[name]) == names


def test_lora_trains_adapters_of_every_attention_layer(family, learnt):
    layers = {n.removesuffix(".to_q") for n, _ in family.unet.named_modules() if n.endswith(".to_q")}
    expected = {
        f"{layer}.{part}.lora_{side}.default.weight"
        for layer in layers
        for part in ("to_q", "to_k", "to_v", "to_out.0")
        for side in "AB"
    }
    assert learnt["lora"].keys() == expected
    assert all(t.any() for n, t in learnt["lora"].items() if "lora_B" in n)


def test_textual_inversion_trains_one_row(family, subject, learnt):
    assert learnt["textual-inversion"].keys() == {"word"}
    row, first = learnt["textual-inversion"]["word"], NewWord(family, subject.manifest, True).first
    assert row.shape == (family.text_encoder.config.hidden_size,) and (row != first).all()


def test_custom_diffusion_trains_keys_and_values_of_cross_attention_and_one_row(family, learnt):
    expected = {n for n, _ in family.unet.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert learnt["custom-diffusion"].keys() == {"word"} | {f"unet.{n}" for n in expected}
    assert changed(family, learnt["custom-diffusion"]) == expected


def test_break_a_scene_trains_u_net_text_encoder_and_of_the_vocabulary_one_row(family, learnt):
    names = learnt["break-a-scene"].keys()
    text_names = {n for n, _ in family.text_encoder.named_parameters()}
    vocabulary = {n for n in text_names if "token_embedding" in n}
    expected = {f"text.{n}" for n in text_names - vocabulary} | {"text.embeddings.token_embedding.row"}
    assert {n for n in names if n.startswith("text.")} == expected
    assert changed(family, learnt["break-a-scene"]) == {n for n, _ in family.unet.named_parameters()}


@pytest.mark.parametrize("name", [n for n in RIVALS if n != "untuned"])
def test_strength_zero_and_the_half_without_the_subject_are_the_base(name, family, subject, learnt):
    """Everything learnt is a difference to the base, which strength multiplies; at 1 it is there in full."""
    prompt = "a dog on the beach"
    with bound("untuned", family, subject, {}) as generator:
        base = noise(generator, family, prompt)
    with bound(name, family, subject, learnt[name], strength=0.0) as generator:
        torch.testing.assert_close(noise(generator, family, prompt), base, atol=1e-6, rtol=0)
    with bound(name, family, subject, learnt[name]) as generator:
        prompt = "a sks dog on the beach"  # says the new word of methods that have one
        tuned, without = (noise(generator, family, prompt, with_subject) for with_subject in (True, False))
    assert (tuned - base).abs().max() > 1e-4
    if name in ("dreambooth", "dreambooth-prior", "lora"):
        states = text.encode(family.tokenizer, family.text_encoder, [prompt])
        x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        assert torch.equal(without, family.unet(x_t, torch.tensor([400]), states).sample)


def test_lora_equals_the_base_before_training(family, subject):
    tensors = methods.get("lora").fit(Lesson(family, subject, FinetuneConfig(steps=1, lr=1e-30)))
    prompt = "a sks dog on the beach"
    states = text.encode(family.tokenizer, family.text_encoder, [prompt])
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with bound("lora", family, subject, tensors) as generator:
        plain = family.unet(x_t, torch.tensor([400]), states).sample
        torch.testing.assert_close(noise(generator, family, prompt), plain, atol=1e-6, rtol=0)


def test_untuned_is_the_plain_diffusers_pipeline_without_the_identifier(family, subject):
    pipeline = diffusers.StableDiffusionPipeline(
        vae=family.vae,
        text_encoder=family.text_encoder,
        tokenizer=family.tokenizer,
        unet=family.unet,
        scheduler=diffusers.DDIMScheduler.from_config(family.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    start, _ = sample.initial_noise([5], (4, 16, 16))
    theirs = pipeline("a dog on the beach", latents=start, num_inference_steps=3, guidance_scale=4.0, output_type="pt")
    with bound("untuned", family, subject, {}) as generator:
        states, empty = generator.encode(["a sks dog on the beach", ""]).split(1)
        scheduler = sample.build_scheduler("ddim", family.scheduler_config)
        latents = sample.sample(generator.eps, states, empty, scheduler, [5], (4, 16, 16), 3, 4.0)
    torch.testing.assert_close(images.decode(family.vae, latents), theirs.images, atol=1e-4, rtol=0)


def test_prior_preservation_is_the_sum_of_two_means(family):
    """DreamBooth eq. 2 on a fixed batch: the same draws, the U-Net asked for each part by itself."""
    g = torch.Generator().manual_seed(0)
    own, others = torch.randn(2, 4, 16, 16, generator=g), torch.randn(3, 4, 16, 16, generator=g)
    one, two = text.encode(family.tokenizer, family.text_encoder, ["a photo of a sks dog", "a photo of a dog"]).split(1)
    loss = Denoising(family, family.unet, [Bank(own, one, 2), Bank(others, two, 3, weight=0.7)])
    value, _ = loss(0, step_generator(0, 4))
    g = step_generator(0, 4)
    i, j = torch.randint(2, (2,), generator=g), torch.randint(3, (3,), generator=g)
    t = torch.randint(1000, (5,), generator=g)
    noise = torch.randn(5, 4, 16, 16, generator=g)
    a = noise_schedule(family)[t].view(-1, 1, 1, 1)
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
    masked = Masked(torch.zeros(1, 4, 16, 16), inside, word, "a photo of a sks dog", 1)
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


def test_a_new_word_begins_as_its_class_word_and_stands_for_the_identifier(family, subject):
    noun, modifier = (NewWord(family, subject.manifest, instead_of_class=n) for n in (True, False))
    prompt = "a sks dog, sksy dogs and SKS Dogs"
    assert noun.spell(prompt) == "a <sks>, sksy dogs and <sks> Dogs"
    assert modifier.spell(prompt) == "a <sks> dog, sksy dogs and <sks> Dogs"
    ids = modifier.tokenizer(modifier.spell("a sks dog")).input_ids
    assert ids[2] == len(family.tokenizer) and len(ids) == 5  # start, a, the word, dog, end
    theirs = text.encode(family.tokenizer, family.text_encoder, ["a dog on the beach", "a dog dog"])
    torch.testing.assert_close(noun.states(["a sks dog on the beach"]), theirs[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(modifier.states(["a sks dog"]), theirs[1:], atol=1e-5, rtol=0)


def test_a_new_word_never_makes_a_prompt_longer(family, subject):
    """So an identifier that the family's own tokenizer keeps (`check_identifier_survives`) is kept here too."""
    word = NewWord(family, subject.manifest, instead_of_class=False)
    for prompt in ("a sks dog", "a photo of a sks dog in the snow", "on the beach sks"):
        text.check_identifier_survives(family.tokenizer, prompt, "sks")
        assert len(word.tokenizer(word.spell(prompt)).input_ids) <= len(family.tokenizer(prompt).input_ids)


def test_the_class_word_may_have_several_tokens(family, subject):
    manifest = subject.manifest.model_copy(update={"class_word": "pet"})
    ids = family.tokenizer("pet", add_special_tokens=False).input_ids
    assert len(ids) > 1
    rows = family.text_encoder.get_input_embeddings().weight[ids]
    torch.testing.assert_close(NewWord(family, manifest, True).first, rows.mean(0))


def test_templates_are_as_many_as_published_and_all_different():
    assert len(set(TEMPLATES)) == 27 and all(t.count("{}") == 1 for t in TEMPLATES)


def test_rescaled_views_are_as_large_as_they_say():
    crop, g = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    views = [rescaled(crop, g) for _ in range(200)]
    shares = [v.inside.mean().item() ** 0.5 for v in views]
    for view, share in zip(views, shares, strict=True):
        assert view.pixels.shape == crop.shape and share >= 0.33
        assert (view.pixels[(view.inside == 0).expand_as(view.pixels)] == 0.5).all()
        assert (view.prefix in ("far away ", "very small ")) == (share < 0.599)
        assert view.prefix not in ("zoomed in ", "close up ") or share == 1
    enlarged = sum(v.prefix in ("zoomed in ", "close up ") for v in views)
    assert 45 <= enlarged <= 90  # a third of 200, give or take three deviations


def test_recipes_are_the_papers_then_the_familys_then_the_users(family):
    published = DreamBoothRecipe()
    profile = dataclasses.replace(family.profile, methods={"dreambooth": {"lr": 1.0, "steps": 7}})
    assert settled(published, "dreambooth", family.profile, FinetuneConfig()) == published
    assert settled(published, "dreambooth", profile, FinetuneConfig(lr=2.0)) == dataclasses.replace(
        published, steps=7, lr=2.0
    )


def test_what_the_bundled_family_recommends_is_for_methods_that_exist_and_settings_they_have(world):
    for name, recommended in world.profile.methods.items():
        recipe = dataclasses.asdict(methods.get(name).recipe(world.profile, FinetuneConfig()))
        assert {n: recipe[n] for n in recommended} == recommended


def test_class_images_depend_on_the_seed_alone(family):
    from p3s_cli.methods.prior import class_images

    first, again, other = (class_images(family, "a photo of a dog", 1, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (1, 4, 16, 16)


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


def test_break_a_scene_resumes_in_either_half(family, subject, tmp_path, learnt):
    from p3s_cli.sd.train import Checkpoint

    config, checkpoint = FinetuneConfig(steps=2, lr=1e-3), Checkpoint(tmp_path / "c", every=0.0)

    for stop in (1, 2):

        def killed(step, total, numbers, stop=stop):
            assert total == 2
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            methods.get("break-a-scene").fit(Lesson(family, subject, config, killed, checkpoint))
    resumed = methods.get("break-a-scene").fit(Lesson(family, subject, config, None, checkpoint))
    assert all(torch.equal(t, learnt["break-a-scene"][n]) for n, t in resumed.items())
    assert {p.name for p in tmp_path.iterdir()} == {"c", "c-word"}  # which `finetune` removes by the first name


def test_pace_counts_set_up_apart_and_divides_a_budget(family, subject):
    assert Pace(setup=4.0, step=0.5).steps(10.0) == 12 and Pace(4.0, 0.5).steps(1.0) == 1
    pace = measure("textual-inversion", family, subject, warmup=1, steps=2)
    assert pace.step > 0 and pace.setup >= 0
    with pytest.raises(InputError, match="does not train"):
        measure("untuned", family, subject)


def test_unknown_methods_are_named_with_those_that_exist():
    with pytest.raises(InputError, match="no method is called 'hyper'; choose one of: p3s, dreambooth, .*untuned"):
        methods.get("hyper")


def test_parts_without_a_mask_and_with_a_full_one_are_the_same(family):
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, 128, generator=g)
    parts = Part(latents, states), Part(latents, states, torch.ones(1, 1, 16, 16))
    plain, full = (denoising.Denoising(family, family.unet, [lambda g, p=p: p])(0, step_generator(0, 0)) for p in parts)
    torch.testing.assert_close(plain[0], full[0])
