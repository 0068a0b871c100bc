"""ControlNets through our sampler against diffusers' own pipeline, on a small one made from the bundled U-Net."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from p3s_cli.errors import InputError
from p3s_cli.sd import controlnet, text
from p3s_cli.sd.images import to_pil
from p3s_cli.sd.pipeline import pipeline
from p3s_cli.sd.sample import build_scheduler, initial_noise, sample


def small_net(world, seed, **options) -> ControlNetModel:
    torch.manual_seed(seed)
    options = {"conditioning_embedding_out_channels": (8, 8, 16, 16)} | options
    net = ControlNetModel.from_unet(world.unet, **options)
    for parameter in net.parameters():  # its zero convolutions would hide every mistake
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets(world, tmp_path_factory):
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"net{seed}"))
        small_net(world, seed).save_pretrained(folders[-1])
    return folders


def test_two_controlnets_with_guidance_equal_the_diffusers_pipeline(world, nets):
    pictures = [to_pil(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(s))) for s in (5, 6)]
    guides = [
        controlnet.load_guide(world, str(f), p, strength, (128, 128))
        for f, p, strength in zip(nets, pictures, (1.0, 0.6), strict=True)
    ]
    pipe = pipeline(StableDiffusionControlNetPipeline, world, controlnet=[g.net for g in guides])
    noise, _ = initial_noise([3], (4, 16, 16))
    theirs = pipe(
        "a dog",
        negative_prompt="snow",
        image=pictures,
        controlnet_conditioning_scale=[1.0, 0.6],
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=noise,
        output_type="latent",
    ).images
    states, negative = text.encode(world.tokenizer, world.text_encoder, ["a dog", "snow"]).split(1)

    def eps(x, t, states, _, residuals=None):
        down, middle = residuals or (None, None)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return world.unet(x, t, states, **extra).sample

    given = states, negative, build_scheduler("ddim", world.scheduler_config), [3], (4, 16, 16)
    ours = sample(eps, *given, steps=3, guidance=5.0, control=controlnet.speaker(guides))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (sample(eps, *given, steps=3, guidance=5.0) - ours).abs().max() > 1e-2


def test_a_controlnet_of_another_base_and_an_unknown_name_are_refused(world, tmp_path):
    small_net(world, 0).save_pretrained(tmp_path / "net")
    config = (tmp_path / "net/config.json").read_text().replace('"layers_per_block": 2', '"layers_per_block": 1')
    ControlNetModel.from_config(__import__("json").loads(config)).save_pretrained(tmp_path / "other")
    picture = to_pil(torch.rand(3, 32, 32))
    with pytest.raises(InputError, match="was made for another base .layers_per_block 1, here 2"):
        controlnet.load_guide(world, str(tmp_path / "other"), picture, 1.0, (128, 128))
    with pytest.raises(InputError, match="no ControlNet is called 'fog'; use canny"):
        controlnet.load_guide(world, "fog", picture, 1.0, (128, 128))
