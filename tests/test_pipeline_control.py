"""ControlNets and several references in the diffusers pipeline, against our own stage and diffusers' own pipeline."""

import shutil

import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from p3s_cli import P3SPipeline, stages
from p3s_cli.errors import InputError, P3SError
from p3s_cli.sd import images
from p3s_cli.sd.pipeline import pipeline
from p3s_cli.sd.sample import initial_noise

PROMPT = "a [V] dog on the beach"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_family):
    """A subject with two references, and what the copy learnt of them in two large steps."""
    folder = tmp_path_factory.mktemp("controlled")
    photo = tiny.photo(folder / "photo.png")
    mirrored = Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # in other colours, too: a subject that is its own mirror image would be the same reference twice
    Image.merge("RGB", mirrored.split()[::-1]).save(folder / "mirror.png")
    stages.mask(photo, [(18, 32)], [(46, 32)], folder / "dog", "dog", family=tiny_family)
    stages.mask(folder / "mirror.png", [(45, 32)], [(17, 32)], folder / "dog", family=tiny_family)
    stages.finetune(folder / "dog", steps=2, lr=5e-2, family=tiny_family)
    return folder / "dog"


@pytest.fixture(scope="module")
def nets(tmp_path_factory, tiny_family):
    """Folders of two small ControlNets, of random numbers where they begin at zero and would say nothing."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(tiny_family.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
        for parameter in net.parameters():
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.2)
        folders.append(tmp_path_factory.mktemp(f"net{seed}"))
        net.save_pretrained(folders[-1])
    return [str(f) for f in folders]


@pytest.fixture(scope="module")
def pictures():
    """Two pictures of another size than what is drawn."""
    return [images.to_pil(torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(s))) for s in (5, 6)]


def made(tiny_folder, tuned, **options):
    pipe = P3SPipeline.from_pretrained(tiny_folder, subject=tuned, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt=PROMPT, **options):
    usual = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(prompt, **(usual | {"latents": noise(1)} | options)).images


def noise(count):
    return initial_noise(range(3, 3 + count), (4, 8, 8))[0]


def test_its_latents_are_those_of_generate_with_two_controlnets_and_two_references(
    tiny_folder, tiny_family, tuned, nets, pictures, tmp_path, monkeypatch
):
    decode, seen = images.decode, []
    monkeypatch.setattr(images, "decode", lambda vae, latents, n: (seen.append(latents), decode(vae, latents, n))[1])
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    control = [f"{net}={tmp_path / f'{i}.png'}={s}" for i, (net, s) in enumerate(zip(nets, (1.0, 0.4), strict=True))]
    for references in (1, 2):
        options = {"n": 1, "seed": 3, "steps": 3, "guidance": 3.0, "references": references, "subject_guidance": 2.0}
        stages.generate(tuned, PROMPT, control=control, family=tiny_family, **options)
    pipe = made(tiny_folder, tuned, controlnet=nets)
    options = {"image": pictures, "controlnet_conditioning_scale": [1.0, 0.4], "subject_guidance": 2.0}
    one, two = (drawn(pipe, references=n, **options) for n in (1, 2))
    torch.testing.assert_close(one, seen[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(two, seen[1], rtol=0, atol=1e-4)
    assert (one - two).abs().max() > 1e-2
    apart = drawn(made(tiny_folder, tuned), references=2, subject_guidance=2.0) - two
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize(
    "spans",
    [
        {},
        {"control_guidance_start": 0.3},
        {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.7, 1.0]},
    ],
)
def test_without_the_subject_it_is_diffusers_own_pipeline_with_controlnets(
    tiny_folder, tiny_family, tuned, nets, pictures, spans
):
    pipe = made(tiny_folder, tuned, controlnet=nets)
    arguments = {"image": pictures, "controlnet_conditioning_scale": [0.9, 0.4], "height": 64, "width": 64} | spans
    ours = drawn(pipe, subject_strength=0.0, subject_guidance=1.0, **arguments)
    assert (ours - drawn(pipe, **arguments)).abs().max() > 1e-2  # which the subject would have changed
    theirs = pipeline(StableDiffusionControlNetPipeline, tiny_family, controlnet=pipe.controlnet)
    theirs.set_progress_bar_config(disable=True)
    torch.testing.assert_close(ours, drawn(theirs, "a sks dog on the beach", **arguments), rtol=0, atol=1e-4)


def test_each_prompt_may_have_a_picture_of_its_own(tiny_folder, tuned, nets, pictures):
    """Every image is what its prompt, picture and noise give alone, whatever else is drawn with it."""
    pipe = made(tiny_folder, tuned, controlnet=nets[0])
    prompts = [PROMPT, "a [V] dog in the snow"]
    both = drawn(pipe, prompts, image=pictures, num_images_per_prompt=2, latents=noise(4))
    for i in range(4):
        alone = drawn(pipe, prompts[i // 2], image=pictures[i // 2], latents=noise(4)[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-4)


def test_saved_with_its_controlnets_it_draws_the_same_again(tiny_folder, tuned, nets, pictures, tmp_path):
    pipe = made(tiny_folder, tuned, controlnet=[ControlNetModel.from_pretrained(n) for n in nets])
    before = drawn(pipe, image=pictures)
    pipe.save_pretrained(tmp_path / "saved")
    again = P3SPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, image=pictures), before)
    bare = P3SPipeline.from_pretrained(tmp_path / "saved", controlnet=None)
    bare.set_progress_bar_config(disable=True)
    assert not torch.equal(drawn(bare), before) and bare.components["controlnet"] is None


@pytest.fixture(scope="module")
def other(tuned, tiny_family):
    """A subject with one reference, in other colours."""
    root = tuned.parent / "cat"
    stages.mask(tuned.parent / "mirror.png", [(45, 32)], [(17, 32)], root, "cat", family=tiny_family)
    stages.finetune(root, steps=1, family=tiny_family)
    return root


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_of_a_pipeline_that_was_saved_there_before_nothing_is_left(tiny_folder, tuned, other, nets, tmp_path):
    """A former subject's photo is another one's, a former ControlNet would come back: the folder is as a new one would be."""
    pipe, before = made(tiny_folder, other), made(tiny_folder, [tuned, tuned], controlnet=nets)
    for options in ({}, {"variant": "fp16"}):
        before.save_pretrained(tmp_path / "saved", **options)
    (tmp_path / "saved/notes.txt").write_text("not of p3s")
    assert (tmp_path / "saved/subjects/00/references/01/photo.png").is_file()
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "new")
    assert contents(tmp_path / "saved") == contents(tmp_path / "new") | {"notes.txt": b"not of p3s"}
    again = P3SPipeline.from_pretrained(tmp_path / "saved")
    assert again.components["controlnet"] is None
    again.save_pretrained(tmp_path / "saved")  # where it was loaded from
    assert contents(tmp_path / "saved/subjects") == contents(tmp_path / "new/subjects")
    made(tiny_folder, tuned, controlnet=nets[0]).save_pretrained(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").glob("controlnet*")] == ["controlnet"]


def test_a_folder_that_a_former_p3s_saved_over_has_the_controlnets_of_its_index(
    tiny_folder, tuned, nets, pictures, tmp_path
):
    """Which left the folders of an earlier pipeline's; diffusers goes by the index."""
    made(tiny_folder, tuned).save_pretrained(tmp_path / "saved")
    shutil.copytree(nets[0], tmp_path / "saved/controlnet")
    assert P3SPipeline.from_pretrained(tmp_path / "saved").components["controlnet"] is None


def test_a_save_that_fails_leaves_the_one_before_as_it_was(tiny_folder, tuned, other, nets, tmp_path, monkeypatch):
    """The last that is written is the subject: by then the base and its index would have been another's."""
    made(tiny_folder, tuned, controlnet=nets).save_pretrained(tmp_path / "saved")
    before = contents(tmp_path / "saved")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(P3SError, match="cannot write .*saved: No space left on device.*nothing was changed"):
        made(tiny_folder, other).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == before


def test_subjects_of_a_saved_pipeline_may_change_places_in_it(tiny_folder, tuned, other, tmp_path):
    """Each is read before another takes its place, and the pipeline goes on drawing its own."""
    made(tiny_folder, [tuned, other]).save_pretrained(tmp_path / "saved")
    places = [tmp_path / "saved/subjects/01", tmp_path / "saved/subjects/00"]
    for chosen, prompt in ((places, "a [V1] cat and a [V2] dog"), (places[:1], "a [V] dog")):
        pipe = made(tiny_folder, chosen)
        before = drawn(pipe, prompt)
        pipe.save_pretrained(tmp_path / "saved")
        assert torch.equal(drawn(pipe, prompt), before)
        again = P3SPipeline.from_pretrained(tmp_path / "saved")
        again.set_progress_bar_config(disable=True)
        assert torch.equal(drawn(again, prompt), before)
    assert [p.name for p in (tmp_path / "saved/subjects").iterdir()] == ["00"]


def test_what_does_not_go_with_its_controlnets_is_refused(tiny_folder, tuned, nets, pictures, world):
    pipe = made(tiny_folder, tuned, controlnet=nets)
    for options, words in (
        ({}, "needs the picture it reads"),
        ({"image": pictures[:1]}, "there are 2 ControlNets"),
        ({"image": pictures, "controlnet_conditioning_scale": [1.0]}, "one number or one for each"),
        ({"image": [pictures, pictures]}, "2 pictures for 1 prompts"),
        ({"image": pictures, "guess_mode": True}, "takes no guess_mode"),
        ({"image": pictures, "references": 0}, "at least one"),
        ({"image": pictures, "references": 3}, "dog has 2 of 3 references; give no more"),  # as in p3s generate
    ):
        with pytest.raises(InputError, match=words):
            drawn(pipe, **options)
    with pytest.raises(InputError, match="image= is for a ControlNet"):
        drawn(made(tiny_folder, tuned), image=pictures[0])
    with pytest.raises(InputError, match="was made for another base"):
        made(tiny_folder, tuned, controlnet=ControlNetModel.from_unet(world.unet))
    with pytest.raises(InputError, match="no ControlNet is called"):
        made(tiny_folder, tuned, controlnet="fog")


def test_a_folder_that_no_pipeline_was_saved_in_keeps_what_it_has(tiny_folder, tuned, tmp_path):
    """Also where its folders have the names that a saved pipeline's would have."""
    project = tmp_path / "project"
    shutil.copytree(tuned, project / "subjects/00")
    (project / "clip").mkdir()
    (project / "clip/video.mp4").write_bytes(b"mine")
    before = contents(project)
    with pytest.raises(InputError, match="no saved pipeline wrote it; save into another folder"):
        made(tiny_folder, tuned).save_pretrained(project)
    assert contents(project) == before
    (project / "subjects/00").rename(project / "subjects/dog")
    made(tiny_folder, tuned).save_pretrained(project)
    assert (project / "clip/video.mp4").read_bytes() == b"mine" and (project / "subjects/dog/subject.json").is_file()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_net_that_is_given_stays_as_it_was(tiny_folder, tuned, nets, pictures, dtypes):
    """Another pipeline may share it, or a training go on with it; it need not be in the base's precision."""
    theirs, ours = dtypes
    net = ControlNetModel.from_pretrained(nets[0]).to(theirs).train()
    latents = drawn(
        made(tiny_folder, tuned, controlnet=net, torch_dtype=ours), image=pictures[0], latents=noise(1).to(ours)
    )
    assert torch.isfinite(latents).all()
    assert net.dtype == theirs and net.training and all(p.requires_grad for p in net.parameters())


def test_several_nets_kept_off_the_device_are_brought_to_it(tiny_folder, tuned, nets, pictures, monkeypatch):
    pipe = made(tiny_folder, tuned, controlnet=nets)
    before = drawn(pipe, image=pictures)
    pipe.enable_model_cpu_offload(device="cpu")
    brought, hook = [], pipe.controlnet._hf_hook
    whole = hook.pre_forward
    monkeypatch.setattr(hook, "pre_forward", lambda module, *given: brought.append(module) or whole(module, *given))
    torch.testing.assert_close(drawn(pipe, image=pictures), before)
    assert brought == [pipe.controlnet]


def test_a_compiled_unet_draws_what_is_inside_it(tiny_folder, tuned):
    pipe = made(tiny_folder, tuned)
    before = drawn(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.equal(drawn(pipe), before)


def test_a_first_image_in_inference_mode_is_not_the_last(tiny_folder, tuned):
    pipe = made(tiny_folder, tuned)
    with torch.inference_mode():
        first = drawn(pipe)
    assert torch.equal(drawn(pipe), first)
