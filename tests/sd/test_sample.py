"""The sampler against diffusers' own pipeline, and guidance against its formula."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from p3s_cli.errors import InputError
from p3s_cli.paper.injection import attention_seam
from p3s_cli.sd import text
from p3s_cli.sd.sample import SCHEDULERS, Guided, build_scheduler, initial_noise, passes, sample


def toy_eps(calls):
    """u, i, t give 1, 10, 100, recognised by subject flag and text."""

    def eps(x, t, states, with_subject):
        calls.append((len(x), with_subject))
        value = torch.where(states[:, 0, 0] > 0, 100.0, 10.0 if with_subject else 1.0)
        return value.view(-1, 1, 1, 1).expand_as(x)

    return eps


@pytest.mark.parametrize(
    ("s_t", "s_i", "expected"),
    [
        (7.5, 1.0, [(2, True)]),
        (7.5, 7.5, [(1, False), (1, True)]),
        (7.5, 2.0, [(1, False), (2, True)]),
        (1.0, 1.0, [(1, True)]),
    ],
)
def test_guidance_is_its_formula_and_runs_only_the_passes_it_needs(s_t, s_i, expected):
    calls, x = [], torch.zeros(1, 4, 2, 2)
    made = passes(torch.ones(1, 77, 3), torch.zeros(1, 77, 3), s_t, s_i)
    out = Guided(toy_eps(calls))(x, torch.tensor([5]), made)
    torch.testing.assert_close(out, torch.full_like(x, 1 + s_i * (10 - 1) + s_t * (100 - 10)))
    assert calls == expected


@pytest.mark.parametrize(("s_i", "kept"), [(2.0, True), (7.5, False), (1.0, False)])
def test_with_reuse_the_third_pass_is_made_at_every_other_step(s_i, kept):
    """Noise that counts the calls tells which step a term is of: only u of three is an older one."""
    calls, x = [], torch.zeros(1, 4, 2, 2)
    made = passes(torch.ones(1, 77, 3), torch.zeros(1, 77, 3), 7.5, s_i)
    step = 0
    guided = Guided(lambda x, t, states, with_subject: calls.append(with_subject) or torch.full_like(x, step), reuse=2)
    for step in range(4):
        out = guided(x, torch.tensor([5]), made)
        fresh = step - step % 2 if kept else step
        torch.testing.assert_close(out, torch.full_like(x, (1 - s_i) * fresh + s_i * step))
    assert calls.count(False) == (2 if kept else 4 * (s_i != 1)) and calls.count(True) == 4


def test_ddim_with_guidance_equals_the_diffusers_pipeline(world):
    """Same noise, prompt and steps: our sampler over the bare U-Net (inside the seam) is diffusers' pipeline.

    To 1e-5 of the largest latent: guidance multiplies the rounding of float32 by five at each of five steps.
    """
    pipeline = StableDiffusionPipeline(
        vae=world.vae,
        text_encoder=world.text_encoder,
        tokenizer=world.tokenizer,
        unet=world.unet,
        scheduler=DDIMScheduler.from_config(world.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, _ = initial_noise([3, 4], (4, 16, 16))
    theirs = pipeline(
        ["a dog"] * 2,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=noise,
        height=128,
        width=128,
        output_type="latent",
    ).images
    states, empty = text.encode(world.tokenizer, world.text_encoder, ["a dog", ""]).split(1)
    with attention_seam(world.unet, "frozen"):
        ours = sample(
            lambda x, t, s, _: world.unet(x, t, s).sample,
            states.expand(2, -1, -1),
            empty,
            build_scheduler("ddim", world.scheduler_config),
            [3, 4],
            (4, 16, 16),
            steps=5,
            guidance=5.0,
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")  # scipy's integrals in LMS
@pytest.mark.parametrize("name", [*SCHEDULERS, "DDIMScheduler"])
def test_every_scheduler_denoises_and_gives_each_seed_the_same_image_in_any_batch(world, name):
    def run(seeds):
        eps = lambda x, t, s, _: 0.5 * x  # noqa: E731
        states = torch.zeros(len(seeds), 77, 8)
        scheduler = build_scheduler(name, world.scheduler_config)
        return sample(eps, states, states[:1], scheduler, seeds, (4, 8, 8), steps=4, guidance=1.0)

    assert torch.equal(run([5, 6, 7])[1:2], run([6]))


class Noise:
    """What a scheduler asks of torchsde's BrownianInterval: for a seed and a span, always the same noise."""

    def __init__(self, size, entropy, **options):
        self.shape, self.seed = size, entropy

    def __call__(self, start, end):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + round(float(end) * 1e3)))


def test_pndm_by_its_class_is_pndm_as_sd_has_it(world):
    """Without `skip_prk_steps` it starts with four passes a step, which three steps are too few for."""
    by_class, by_name = (build_scheduler(name, world.scheduler_config) for name in ("PNDMScheduler", "pndm"))
    by_class.set_timesteps(3)
    assert by_class.config == by_name.config


def test_a_scheduler_that_draws_its_noise_itself_draws_it_from_the_seeds(world, monkeypatch):
    """DPMSolverSDE takes no generators; torchsde, which it needs, is not a requirement."""
    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianInterval=Noise))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")

    def run(seeds):
        scheduler = module.DPMSolverSDEScheduler.from_config(world.scheduler_config)
        states = torch.zeros(len(seeds), 77, 8)
        options = {"steps": 4, "guidance": 1.0}
        return sample(lambda x, t, s, _: 0.5 * x, states, states[:1], scheduler, seeds, (4, 8, 8), **options)

    assert torch.equal(run([5, 6, 7])[1:2], run([6])) and not torch.equal(run([6]), run([7]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc", "euler", "dpm_single"])
def test_as_many_steps_as_there_are_times_for_are_drawn_and_one_more_is_refused_before_the_first(world, name):
    """998 of 1000, for times begin at 1 and the multistep solvers begin one time above the number of steps."""
    calls = []

    def run(steps):
        eps = lambda x, t, s, _: calls.append(0) or 0.5 * x  # noqa: E731
        states, scheduler = torch.zeros(1, 77, 8), build_scheduler(name, world.scheduler_config)
        return sample(eps, states, states, scheduler, [5], (4, 2, 2), steps=steps, guidance=1.0)

    for steps in (999, 1000, 1001):
        with pytest.raises(InputError, match=f"cannot take {steps} steps; give at most 998"):
            run(steps)
    assert not calls and torch.isfinite(run(998)).all()


def test_unknown_scheduler_is_named_with_the_choices():
    for name in ("plms", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
        with pytest.raises(InputError, match=f"{name}.*ddim.*DEISMultistepScheduler"):
            build_scheduler(name, {})
