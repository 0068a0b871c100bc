"""The main path on the bundled family, with as few steps as show what is claimed."""

import functools
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from p3s_cli import stages
from p3s_cli.config import PACES, GenerateConfig, WeightSchedule
from p3s_cli.errors import InputError, P3SError
from p3s_cli.manifest import mask_command
from p3s_cli.methods.base import Learnt
from p3s_cli.methods.p3s import P3S
from p3s_cli.paper.points import Selection
from p3s_cli.sd import images, text
from p3s_cli.sd.family import load
from p3s_cli.sd.fingerprints import named
from p3s_cli.sd.train import Checkpoint
from p3s_cli.sd.weights import load_tensors
from p3s_cli.segment.select import _warnings
from p3s_cli.stages import generating
from p3s_cli.stages.clicks import parse_point, resolve_points
from p3s_cli.stages.reference import Clicks, _check_apart, _degenerate, guess_class
from p3s_cli.subject import Subject


@pytest.fixture
def photo(tmp_path, pair):
    images.save_png(tmp_path / "two.png", pair[0])
    return tmp_path / "two.png"


@pytest.fixture
def masked(tmp_path, photo, pair, world):
    _, _, (left, right) = pair
    return stages.mask(photo, [left], [right], tmp_path / "pet", "pet", family=world)


@pytest.fixture
def tuned(masked, world):
    stages.finetune(masked.subject, steps=2, family=world)
    return masked.subject


def generate(root, world, prompt="a [V] pet on beach", **options):
    return stages.generate(root, prompt, **({"n": 1, "steps": 2, "family": world} | options))


def test_mask_writes_what_it_says(masked, pair):
    subject = Subject.open(masked.subject)
    tensors, metadata = load_tensors(masked.subject / "references/00/mask.safetensors")
    assert tensors.keys() == {"positive_map", "negative_map", "subject", "negative", "inpainted"}
    assert tensors["subject"].shape == (128, 128)
    assert metadata["stage"] == "mask" and metadata["positive"] == [list(pair[2][0])]
    assert set(subject.manifest.references[0].mask.artifacts) == {
        f"references/00/{n}" for n in ("photo.png", "overlay.png", "inpainted.png", "mask.safetensors")
    }
    assert all(p.is_file() for p in masked.pictures) and not masked.unchanged
    x, y = map(int, pair[2][0])
    assert tensors["subject"][y, x] and masked.areas["subject"] == pytest.approx(
        tensors["subject"].float().mean().item(), abs=1e-3
    )
    # eq. 3 leaves the subject alone
    keep = tensors["subject"].bool()
    assert torch.equal(tensors["inpainted"][:, keep].float() / 255, images.to_tensor(pair[0])[:, keep])


def test_tuning_keeps_what_the_autoencoder_makes_of_the_reference(tuned, world):
    """Decoded, it is the inpainted photo, here the family's square, as far as the autoencoder carries one."""
    latents, metadata = load_tensors(tuned / "control/references.safetensors")
    pixels = load_tensors(tuned / "references/00/mask.safetensors")[0]["inpainted"].float() / 255
    square = images.encode(world.vae, pixels[None])[0]
    assert metadata["stage"] == "finetune" and latents.keys() == {"references/00"}
    assert torch.allclose(latents["references/00"], square, atol=1e-4)
    assert "control/references.safetensors" in Subject.open(tuned).manifest.finetune.artifacts
    (tuned / "control/references.safetensors").unlink()  # no stage reads it, so none misses it
    assert stages.finetune(tuned, steps=2, family=world).unchanged
    generate(tuned, world)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_do_not_move_under_exif_rotation(tmp_path, pair, world, masked, orientation):
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pair[0].transpose(turn).save(tmp_path / "turned.png", exif=exif)
    _, _, (left, right) = pair
    again = stages.mask(tmp_path / "turned.png", [left], [right], tmp_path / "turned", "pet", family=world)
    a, b = (load_tensors(r.subject / "references/00/mask.safetensors")[0] for r in (masked, again))
    assert all(torch.equal(a[n], b[n]) for n in ("subject", "negative", "inpainted"))


def test_repeating_a_stage_does_nothing_until_forced(masked, photo, pair, world, tuned):
    _, _, (left, right) = pair
    before = {p: p.stat().st_mtime_ns for p in masked.subject.rglob("*.safetensors")}
    assert stages.mask(photo, [left], [right], masked.subject, family=world).unchanged
    assert stages.finetune(tuned, steps=2, family=world).unchanged
    first, second = generate(tuned, world), generate(tuned, world)
    assert not first.unchanged and second.unchanged and first.images == second.images
    assert before == {p: p.stat().st_mtime_ns for p in masked.subject.rglob("*.safetensors")}
    assert not stages.mask(photo, [left], [right], masked.subject, force=True, family=world).unchanged


@pytest.mark.parametrize("method", ["p3s", "textual-inversion"])
def test_another_seed_is_another_run(masked, world, method):
    """Also for the methods whose recipe does not hold the seed."""
    first = stages.finetune(masked.subject, method, steps=1, lr=1e-2, family=world)
    before = first.control.read_bytes()
    assert not stages.finetune(masked.subject, method, steps=1, lr=1e-2, seed=1, family=world).unchanged
    assert first.control.read_bytes() != before


def test_a_moved_point_makes_the_control_stale_and_says_how_to_refresh_it(tuned, photo, pair, world):
    _, _, (left, right) = pair
    stages.mask(photo, [(left[0] + 6, left[1] + 6)], [right], tuned, family=world)
    with pytest.raises(InputError, match="has changed since it was tuned.*p3s finetune"):
        generate(tuned, world)


def test_a_point_edited_in_the_manifest_makes_the_mask_stale(masked, world):
    path = masked.subject / "subject.json"
    data = json.loads(path.read_text())
    data["references"][0]["positive"] = [[3.0, 4.0]]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"p3s mask .*photo.png --pos 3,4 --neg"):
        stages.finetune(masked.subject, steps=1, family=world)


def test_a_damaged_artifact_is_refused(tuned, world):
    control = tuned / "control/control.safetensors"
    control.write_bytes(control.read_bytes()[:-1])
    with pytest.raises(InputError, match="missing or damaged"):
        generate(tuned, world)


def test_generate_before_finetune_and_outside_a_subject(masked, world, tmp_path):
    with pytest.raises(InputError, match="has not been tuned yet; run: p3s finetune"):
        generate(masked.subject, world)
    with pytest.raises(InputError, match="not a subject directory"):
        generate(tmp_path, world)


def test_same_seed_same_image_whatever_n_is_and_metadata_tells_how(tuned, world):
    four = generate(tuned, world, n=4, seed=10)
    pixels = np.asarray(images.load_image(four.images[2])).astype(int)
    meta = images.read_metadata(four.images[2])
    assert meta["seed"] == 12 and meta["prompt"] == "a [V] pet on beach" and meta["text"] == "a sks pet on beach"
    for name in ("guidance", "subject_guidance"):
        assert meta["sampling"][name] == getattr(world.profile, name)
    assert meta["sampling"]["schedule"]["kind"] == world.profile.schedule
    one = generate(tuned, world, n=1, seed=12, force=True)
    assert one.images[0] == four.images[2]
    assert abs(np.asarray(images.load_image(one.images[0])).astype(int) - pixels).max() <= 1
    assert all(p.is_file() for p in (*four.images, four.grid))


def test_what_a_pace_says_holds_where_nothing_else_is_asked_for(tuned, world):
    for asked, wanted in (
        ({"fast": True}, {"scheduler": "dpm++", "reuse": PACES[True].reuse}),
        ({"fast": True, "scheduler": "ddim", "reuse": 1}, {"scheduler": "ddim", "reuse": 1}),
        ({}, {"scheduler": "ddim", "reuse": PACES[False].reuse}),
    ):
        known = images.read_metadata(generate(tuned, world, **asked).images[0])["sampling"]
        assert {name: known[name] for name in wanted} == wanted and known["steps"] == 2


def test_the_base_is_bit_identical_afterwards_and_schedule_off_is_the_base_model(tuned, world):
    before = {n: p.clone() for n, p in world.unet.state_dict().items()}
    processors = world.unet.attn_processors
    stages.finetune(tuned, steps=2, lr=1e-2, family=world)
    off = generate(tuned, world, schedule="off", steps=4)
    learnt = Learnt.read(Subject.open(tuned))
    x_t, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with P3S().bind(world, learnt, GenerateConfig(schedule=WeightSchedule("off"))) as bound, torch.no_grad():
        states = text.encode(world.tokenizer, world.text_encoder, ["a sks pet"])
        assert learnt.tensors["word"].abs().max() > 0 and torch.equal(bound.encode(["a [V] pet"]), states)
        torch.testing.assert_close(bound.eps(x_t, t, states, True), world.unet(x_t, t, states).sample)
    assert all(torch.equal(before[n], p) for n, p in world.unet.state_dict().items())
    assert all(world.unet.attn_processors[n] is p for n, p in processors.items())
    on = generate(tuned, world, steps=4, strength=1.2)
    assert (np.asarray(images.load_image(off.images[0])) != np.asarray(images.load_image(on.images[0]))).any()


def test_training_moves_every_part_that_should_and_resumes_to_the_same_control(masked, world, monkeypatch):
    stages.finetune(masked.subject, steps=3, family=world)
    whole, _ = load_tensors(masked.subject / "control/control.safetensors")

    def killed(what, done, total):
        if what.startswith("tuning") and done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("p3s_cli.stages.tuning.Checkpoint", functools.partial(Checkpoint, every=0.0))
    with pytest.raises(KeyboardInterrupt):
        stages.finetune(masked.subject, steps=3, family=world, force=True, on_progress=killed)
    heard = []
    stages.finetune(masked.subject, steps=3, family=world, force=True, on_progress=lambda *a: heard.append(a))
    assert [done for what, done, _ in heard if what.startswith("tuning")] == [2, 3]  # two steps were kept
    resumed, _ = load_tensors(masked.subject / "control/control.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert {p.name for p in (masked.subject / "control").iterdir()} == {"control.safetensors", "references.safetensors"}


def test_paper_preset_runs_the_literal_equations(masked, photo, pair, world):
    _, _, (left, right) = pair
    stages.mask(photo, [left], [right], masked.subject, preset="paper", family=world)
    stages.finetune(masked.subject, steps=2, preset="paper", family=world)
    _, metadata = load_tensors(masked.subject / "control/control.safetensors")
    control = metadata["config"]["control"]
    assert control["injection"] == "literal" and control["attention_loss"] == "printed" and control["augment"] == "none"
    drawn = generate(masked.subject, world).images[0]
    sampling = images.read_metadata(drawn)["sampling"]  # as printed, too: the copy at every step, no third pass
    assert (sampling["reuse"], sampling["subject_guidance"], sampling["schedule"]["kind"]) == (1, 1.0, "quadratic")
    silent = generate(masked.subject, world, guidance=1.0, negative_prompt="blurry").warnings
    assert silent == (
        "the negative prompt says nothing at guidance 1, which has no pass to say it in; raise --guidance",
    )
    asked = images.read_metadata(generate(masked.subject, world, reuse=2, subject_guidance=1.5, seed=1).images[0])
    assert (asked["sampling"]["reuse"], asked["sampling"]["subject_guidance"]) == (2, 1.5)
    moved = f"{left[0] + 1},{left[1]}"  # which makes the control stale: the sentence says how it was made
    stages.mask(photo, [moved], [right], masked.subject, preset="paper", family=world)
    with pytest.raises(InputError, match=r"run: p3s finetune \S+ --preset paper --steps 2 --lr 0.001$"):
        generate(masked.subject, world)
    assert "--preset paper -o" in mask_command(photo, Subject.open(masked.subject).manifest.references[0], photo)


def test_a_control_of_before_a_setting_came_is_still_as_printed(masked, photo, pair, world):
    """Its record leaves unsaid what could not be set then, and what the paper's preset sets to just that."""
    stages.finetune(masked.subject, steps=1, preset="paper", family=world)
    subject = Subject.open(masked.subject)
    for setting in ("decay", "astray", "learned_word"):
        del subject.manifest.finetune.settings["config"]["control"][setting]
        assert subject.as_printed
    subject.manifest.finetune.settings["config"]["control"]["gamma"] = 0.5
    assert not subject.as_printed


def test_a_subject_can_have_several_references(masked, pair, world, tmp_path):
    images.save_png(tmp_path / "mirror.png", pair[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    _, _, (left, right) = pair
    second = stages.mask(
        tmp_path / "mirror.png", [(127 - left[0], left[1])], [(127 - right[0], right[1])], masked.subject, family=world
    )
    assert second.reference == "references/01" and second.class_word == "pet"
    assert len(Subject.open(masked.subject).manifest.references) == 2
    stages.finetune(masked.subject, steps=1, family=world)


def test_class_word_is_guessed_with_a_score_and_can_be_corrected(photo, pair, world, tmp_path):
    guess = stages.mask(photo, [pair[2][0]], output=tmp_path / "g", family=world)
    assert guess.class_word in world.profile.nouns and 0 < guess.class_score <= 1
    corrected = stages.mask(photo, [pair[2][0]], output=tmp_path / "g", class_word="owl", family=world)
    assert corrected.class_word == "owl" and corrected.class_score is None and corrected.unchanged


def test_a_point_outside_is_told_the_nearest_inside():
    with pytest.raises(InputError, match=r"such as 100,0$"):
        resolve_points(["200,-3"], 101, 51)
    for odd in ((1, 2, 3), ("a", "b"), 5):
        with pytest.raises(InputError, match="not a point"):
            resolve_points([odd], 101, 51)


@pytest.mark.parametrize("text", ["12", "a,b", "1,2,3", ""])
def test_points_that_are_none(text):
    with pytest.raises(InputError, match="is not a point"):
        parse_point(text)


def test_points_are_pixels_or_fractions_and_must_lie_inside():
    assert resolve_points(["12,34", "0.5,1.0", (3, 4)], 101, 51) == [(12, 34), (50, 50), (3, 4)]
    for outside in ("101,0", "0,51", "-1,5", "nan,3"):
        with pytest.raises(InputError, match="101 wide and 51 high"):
            resolve_points([outside], 101, 51)


def test_one_place_marked_both_ways_is_refused(photo, world, tmp_path):
    with pytest.raises(InputError, match="both positive and negative"):
        stages.mask(photo, ["20,20"], ["20,20"], tmp_path / "x", family=world)
    assert not (tmp_path / "x").exists()


def test_points_that_tell_nothing_apart_are_refused():
    """By construction: the positive mask is the left half; then a negative point in it, and the other way round."""
    left = torch.zeros(40, 60, dtype=torch.bool)
    left[:, :30] = True
    maps = torch.rand(4, 6), torch.rand(4, 6)
    apart = Clicks([(5, 5)], [(50, 5)], None)
    _check_apart(Selection(*maps, left, ~left, (), 1.0), apart)
    with pytest.raises(InputError, match="negative point 20,30 lies in the same.*60 wide and 40 high.*--box"):
        _check_apart(Selection(*maps, left, ~left, (), 1.0), Clicks([(5, 5)], [(50, 5), (20, 30)], None))
    with pytest.raises(InputError, match="positive point 5,5 lies in the same"):
        _check_apart(Selection(*maps, ~left, left, (), 1.0), Clicks([(5, 5)], [], None))


def test_empty_masks_are_said():
    none = torch.zeros(40, 60, dtype=torch.bool)
    selection = Selection(torch.rand(4, 6), torch.zeros(4, 6), none, none, (), 1.0)
    first, second = (
        _degenerate(selection, Clicks([(5, 5)], [], None)),
        _degenerate(selection, Clicks([], [(5, 5)], None)),
    )
    assert first == ["the mask of the positive point is empty; put the point in the middle of what it marks"]
    assert "no contrast" in second[0] and "negative point is empty" in second[1]


def test_a_mask_of_nothing_still_has_a_class_guessed_and_one_of_everything_is_said(world, pair):
    noun, score = guess_class(world, pair[0], torch.zeros(128, 128, dtype=torch.bool))
    assert noun in world.profile.nouns and 0 < score <= 1
    (said,) = _warnings(np.ones((40, 60), dtype=bool), False, 8.0, 1.0)
    assert "covers nearly the whole photo" in said
    assert not _warnings(np.eye(40, 60, dtype=bool) | (np.arange(60) < 20), True, 8.0, 1.0)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(masked, photo, pair, world, monkeypatch):
    before = (masked.subject / "references/00/mask.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(P3SError, match="No space left on device.*nothing was changed"):
        stages.mask(photo, [(1, 1)], [pair[2][1]], masked.subject, family=world)
    assert (masked.subject / "references/00/mask.safetensors").read_bytes() == before
    assert [p.name for p in masked.subject.rglob(".*")] == [".lock"]


def test_that_the_base_filled_in_for_a_missing_inpainting_model_is_said(tiny_folder, tmp_path):
    family = load(str(tiny_folder), "cpu")
    family.profile = replace(family.profile, inpainter="not/here")
    made = stages.mask(tiny.photo(tmp_path / "p.png"), ["18,32"], ["46,32"], tmp_path / "it", "thing", family=family)
    assert any(f"p3s fetch {tiny_folder} --inpainter not/here" in w and "--force" in w for w in made.warnings)


def shifted(file):
    """Other weights under the same name."""
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("fills", ["the base", "an inpainter"])
def test_masks_are_made_again_once_what_paints_over_the_look_alike_has_changed(tiny_folder, tmp_path, fills):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    own = None if fills == "the base" else str(shutil.copytree(tiny_folder, tmp_path / "inpainter"))
    photo, weights = tiny.photo(tmp_path / "p.png"), Path(own or base) / "unet/diffusion_pytorch_model.safetensors"

    def mask(name, *negative):
        family = load(str(base), "cpu", inpainter=own)
        return stages.mask(photo, ["18,32"], negative, tmp_path / name, "thing", family=family).unchanged

    assert [mask("two", "46,32"), mask("one"), mask("two", "46,32")] == [False, False, True]
    shifted(weights)
    assert [mask("two", "46,32"), mask("one"), mask("two", "46,32")] == [
        False,
        True,
        True,
    ]  # nothing is painted in `one`
    made = Subject.open(tmp_path / "two").manifest.references[0]
    assert (f" --inpainter {own} " in mask_command(photo, made, tmp_path / "two")) == (own is not None)


def test_what_the_hub_keeps_is_known_by_the_sha256_it_is_named_by_and_all_else_by_its_bytes(tmp_path):
    (tmp_path / "blobs").mkdir()
    sha256, sha1 = "5" * 64, "5" * 40  # of a large file and, git's, of a small one
    for name in (sha256, sha1):
        (tmp_path / "blobs" / name).write_bytes(b"abc")
        (tmp_path / f"kept-{name}").symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "own").write_bytes(b"abc")
    assert named(tmp_path / f"kept-{sha256}") == sha256
    assert named(tmp_path / f"kept-{sha1}") == named(tmp_path / "own") == hashlib.sha256(b"abc").hexdigest()


def test_a_tuning_is_done_again_once_the_clip_pair_has_changed_unless_its_record_does_not_tell(tiny_folder, tmp_path):
    base, root = shutil.copytree(tiny_folder, tmp_path / "base"), tmp_path / "it"
    stages.mask(tiny.photo(tmp_path / "p.png"), ["18,32"], [], root, "thing", family=load(str(base), "cpu"))
    tune = functools.partial(stages.finetune, root, steps=1)
    assert (
        not tune(family=load(str(base), "cpu")).unchanged and tune(family=load(str(base), "cpu", "bfloat16")).unchanged
    )
    shifted(base / "clip/model.safetensors")
    assert not tune(family=load(str(base), "cpu")).unchanged
    subject = Subject.open(root)
    del subject.manifest.finetune.settings["vision_fingerprint"]  # as it was before p3s told
    with subject.changing():
        pass
    shifted(base / "clip/model.safetensors")
    assert tune(family=load(str(base), "cpu")).unchanged


def test_what_is_to_be_the_same_every_time_is_not_recorded_as_a_cuda_graph(tiny_family, tmp_path, monkeypatch):
    """Whether a recording counts depends on the clock."""
    root, heard = tmp_path / "it", []
    stages.mask(tiny.photo(tmp_path / "p.png"), ["18,32"], [], root, "thing", family=tiny_family)
    fit, draw = P3S.fit, generating.draw
    monkeypatch.setattr(P3S, "fit", lambda *a: heard.append(a[1].config.captured) or fit(*a))
    monkeypatch.setattr(generating, "draw", lambda *a: heard.append(a[0].sampling.captured) or draw(*a))
    for exactly in (True, False):
        stages.finetune(root, steps=1, deterministic=exactly, force=True, family=tiny_family)
        generate(root, tiny_family, "a [V] thing", steps=1, deterministic=exactly, force=True)
    assert heard == [False, False, True, True]
