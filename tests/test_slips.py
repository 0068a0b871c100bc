"""What a hand slips into: each ends in one sentence, and takes nothing away from whom it happens to."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import p3s_cli
from p3s_cli import stages
from p3s_cli.benches.evaluate import evaluate_world
from p3s_cli.errors import InputError
from p3s_cli.sd.family import load
from p3s_cli.stages.clicks import parse_point
from p3s_cli.subject import Subject


@pytest.fixture
def photo(tmp_path) -> Path:
    return tiny.photo(tmp_path / "two.png")


@pytest.fixture
def subject(photo, tmp_path, tiny_family) -> Path:
    return stages.mask(photo, ["18,32"], ["46,32"], tmp_path / "thing", "thing", family=tiny_family).subject


def test_an_export_takes_no_place_of_anything_else(subject, tiny_family, tmp_path):
    stages.finetune(subject, steps=1, family=tiny_family)
    manifest = (subject / "subject.json").read_bytes()
    (tmp_path / "mine.png").write_bytes(b"a picture")
    for output, words in (
        (subject / "subject.json", "lies inside the subject"),
        (tmp_path / "mine.png", "is no subject that p3s export wrote"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(InputError, match=words):
            stages.export_subject(subject, output, rank=1, family=tiny_family)
    assert (subject / "subject.json").read_bytes() == manifest and (tmp_path / "mine.png").read_bytes() == b"a picture"
    for _ in range(2):  # over an older export, too
        assert stages.export_subject(subject, tmp_path / "a.p3s.safetensors", rank=1, family=tiny_family).bytes


def test_a_run_that_was_interrupted_outlives_others_on_the_same_masks(subject, photo, tiny_family):
    def killed(what, done, total):
        if what.startswith("tuning") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.finetune(subject, steps=4, family=tiny_family, on_progress=killed)
    (run,) = (subject / "control").glob(".checkpoint-*")
    (run / "state").write_bytes(b"steps")  # a signal waits for the state to be written, this did not
    for _ in range(2):  # made, and found to be there
        (warning,) = stages.finetune(subject, steps=1, family=tiny_family).warnings
        assert run.name in warning and "give its command again" in warning and (run / "state").is_file()
    other = load(tiny_family.source, "cpu")
    other.__dict__["fingerprint"] = "of another base"
    (warning,) = stages.finetune(subject, steps=1, family=other).warnings
    assert run.name in warning and (run / "state").is_file()
    (run / "state").unlink()
    assert stages.finetune(subject, steps=4, family=tiny_family).warnings == ()
    assert not run.exists()
    run.mkdir()
    stages.mask(photo, ["20,32"], ["46,32"], subject, family=tiny_family)  # other masks: nothing goes on with it
    assert stages.finetune(subject, steps=1, family=tiny_family).warnings == () and not run.exists()


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(photo, tmp_path, tiny_folder, monkeypatch):
    (tmp_path / "base").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    stages.mask(photo, ["18,32"], ["46,32"], "thing", "thing", model="base", device="cpu")
    stages.finetune("thing", steps=1, device="cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert stages.generate("../thing", "a [V] thing", n=1, steps=1, device="cpu").images[0].is_file()


def test_another_base_for_a_further_reference_is_refused(subject, photo, tiny_family):
    with pytest.raises(InputError, match="is made on .*family.*; leave out --model"):
        stages.mask(photo, ["18,32"], ["46,32"], subject, model="sd15")
    own = Subject.open(subject).manifest.model
    assert stages.mask(photo, ["18,32"], ["46,32"], subject, model=own, device="cpu").unchanged


def test_a_base_that_has_moved_is_named_anew(photo, tmp_path, tiny_folder):
    """Only --model can say where it lies now; what was made by way of the old place is still what it was."""
    made = [tmp_path / name for name in ("first", "second", "it")]
    shutil.copytree(tiny_folder, made[0])
    given = photo, ["18,32"], ["46,32"], made[2]
    stages.mask(*given, "thing", model=str(made[0]), device="cpu")
    stages.finetune(made[2], steps=1, device="cpu")
    made[0].rename(made[1])
    with pytest.raises(
        InputError, match="is made on .*first, which is not there any more; name its place with --model"
    ):
        stages.mask(*given, device="cpu")
    assert stages.mask(*given, model=str(made[1]), device="cpu").unchanged
    assert stages.mask(*given, device="cpu").unchanged and Subject.open(made[2]).manifest.model == str(made[1])
    assert stages.generate(made[2], "a [V] thing", n=1, steps=1, model=str(made[1]), device="cpu").images


def test_what_is_no_class_word_is_refused(photo, tmp_path, tiny_family):
    for word, words in (("", "'' is no class word"), (" ?", "' [?]' is no class word"), ("[V2] dog", r"says \[V2\]")):
        with pytest.raises(InputError, match=words):
            stages.mask(photo, ["18,32"], [], tmp_path / "it", word, family=tiny_family)
    assert not (tmp_path / "it").exists()
    assert stages.mask(photo, ["18,32"], [], tmp_path / "it", " dog ", family=tiny_family).class_word == "dog"


def test_nothing_is_learnt_or_given_away_in_no_steps_and_no_rank(subject, tiny_family, tmp_path):
    """What was learnt before stays what it is."""
    stages.finetune(subject, steps=1, family=tiny_family)
    control = (subject / "control/control.safetensors").read_bytes()
    for work, words in (
        (lambda: stages.finetune(subject, steps=0, family=tiny_family), "0 steps teach nothing; .*--steps 1"),
        (lambda: stages.export_subject(subject, tmp_path / "x", rank=0, family=tiny_family), "rank 0 .*--rank 1"),
    ):
        with pytest.raises(InputError, match=words):
            work()
    assert (subject / "control/control.safetensors").read_bytes() == control and not (tmp_path / "x").exists()


def test_the_offered_command_keeps_what_was_tuned(subject, tiny_family, tmp_path):
    """Points between pixels, as fractions give them, come back to the last bit; and a lost picture is called one."""
    point = (18 + 1 / 3, 32.25)
    stages.mask(subject / "references/00/photo.png", [point], ["46,32"], subject, family=tiny_family)
    stages.finetune(subject, steps=1, family=tiny_family)
    (subject / "references/00/overlay.png").unlink()
    with pytest.raises(InputError, match="is missing or damaged, or a picture of it is; refresh it with: ") as caught:
        stages.generate(subject, "a [V] thing", n=1, steps=1, family=tiny_family)
    words = shlex.split(str(caught.value).split("refresh it with: ")[1])
    positive, negative = (words[words.index(f"--{flag}") + 1] for flag in ("pos", "neg"))
    stages.mask(words[2], [positive], [negative], words[-1], family=tiny_family)
    assert stages.generate(subject, "a [V] thing", n=1, steps=1, family=tiny_family).images


def test_a_photo_that_was_changed_is_not_offered_as_its_own_original(subject, photo, tiny_family):
    """The changed one would become a second reference, beside a first that is refused as before."""
    there = subject / "references/00/photo.png"
    for other in (tiny.photo(there.parents[3] / "edited.png").read_bytes(), there.read_bytes()[:500]):
        there.write_bytes(other)
        with pytest.raises(
            InputError, match="photo.png is damaged or was changed since .*: p3s mask PHOTO --pos "
        ) as caught:
            stages.finetune(subject, steps=1, family=tiny_family)
        words = shlex.split(str(caught.value).split("PHOTO: ")[1])
        positive, negative = (words[words.index(f"--{flag}") + 1] for flag in ("pos", "neg"))
        stages.mask(photo, [positive], [negative], words[-1], family=tiny_family)
        assert len(Subject.open(subject).manifest.references) == 1
        Subject.open(subject).check_masks()


def test_the_command_that_tunes_again_has_memory_and_a_rate_of_nothing(subject, tiny_family):
    stages.finetune(subject, steps=1, lr=0.0, memory="12", family=tiny_family)
    assert Subject.open(subject).finetune_again().endswith(" --steps 1 --lr 0.0 --memory 12")
    stages.finetune(subject, "untuned", family=tiny_family)
    assert Subject.open(subject).finetune_again().endswith(" --method untuned")


def test_methods_that_learn_from_photos_say_so_where_there_is_none(subject, tiny_family):
    data = json.loads((subject / "subject.json").read_text())
    photo = f"{data['references'][0]['folder']}/photo.png"
    del data["references"][0]["mask"]["artifacts"][photo]  # as an import writes it
    (subject / "subject.json").write_text(json.dumps(data))
    (subject / photo).unlink()
    for method in ("lora", "break-a-scene"):
        with pytest.raises(InputError, match="learns from photos, which no export holds; mask the photo anew"):
            stages.finetune(subject, method, steps=1, family=tiny_family)


@pytest.mark.parametrize("word", ["do\x1b[31mg", "dog\ncat", "?!"])
def test_no_class_word_writes_to_the_screen_what_nobody_sees(photo, tmp_path, tiny_family, word):
    with pytest.raises(InputError, match="is no class word"):
        stages.mask(photo, ["18,32"], ["46,32"], tmp_path / "x", word, family=tiny_family)


def test_another_base_is_told_how_to_tune_on_it(subject, tiny_family):
    stages.finetune(subject, steps=1, lr=0.5, family=tiny_family)
    other = load(tiny_family.source, "cpu")
    other.__dict__["fingerprint"], other.source = "of another base", "/other base"
    with pytest.raises(InputError, match=r"run: p3s finetune \S+ --model '/other base' --steps 1 --lr 0.5$"):
        stages.generate(subject, "a [V] thing", n=1, steps=1, family=other)


def test_another_class_word_is_said(subject, photo, tiny_family):
    stages.finetune(subject, steps=1, family=tiny_family)
    made = stages.mask(photo, ["18,32"], ["46,32"], subject, "puppy", family=tiny_family)
    assert made.warnings[-1] == "the class word was thing and is puppy now; tune the subject again"


def test_of_many_photos_the_one_at_fault_is_named_before_any_is_masked(photo, tmp_path, tiny_family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.photo(tmp_path / "b.png")
    points = tmp_path / "points.json"
    points.write_text(json.dumps({"two.png": {"positive": [[18, 32]]}, "b.png": {"positive": [[600, 32]]}}))
    with pytest.raises(InputError, match=r"b\.png: the point 600,32 lies outside"):
        stages.mask_many(["two.png", "b.png"], points, family=tiny_family)
    assert not (tmp_path / "two").exists()
    clicks = {"positive": [[18, 32]]}
    points.write_text(json.dumps({"two.png": clicks | {"class": "dog"}, "b.png": clicks | {"class": "cat"}}))
    points.write_text(json.dumps({"two.png": clicks, "b.png": clicks | {"class": "[V] cat"}}))
    with pytest.raises(InputError, match=r"b\.png: the class word .* says \[V\]"):
        stages.mask_many(["two.png", "b.png"], points, family=tiny_family)
    assert not (tmp_path / "two").exists()
    points.write_text(json.dumps({"two.png": clicks | {"class": "dog"}, "b.png": clicks | {"class": "cat"}}))
    with pytest.raises(InputError, match="calls one subject cat and dog"):
        stages.mask_many(["two.png", "b.png"], points, output="both", family=tiny_family)


@pytest.mark.parametrize("wrong", [{"positive": [60, 160]}, {"pos": [[60, 160]]}])
def test_points_in_another_form_are_told_the_form(photo, tmp_path, wrong):
    points = tmp_path / "points.json"
    points.write_text(json.dumps({photo.name: wrong}))
    with pytest.raises(InputError, match=r'two\.png: pos.* is not as it should be; write {"positive": \[\[120, 88\]\]'):
        stages.mask_many([photo], points)


def test_a_point_that_may_be_pixels_or_fractions_is_asked_about():
    for text in ("0.25,1", "1,0.5", "0,0.5"):
        with pytest.raises(InputError, match="may be pixels or fractions"):
            parse_point(text)
    assert parse_point("0.25,1.0")[0] == "fraction" and parse_point("0,1")[0] == parse_point("0.5,30")[0] == "pixels"


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_numbers_that_are_none_are_refused_before_anything_is_tuned(subject, tiny_family, tmp_path, number):
    with pytest.raises(InputError, match=f"{number} is no learning rate"):
        stages.finetune(subject, steps=1, lr=number, family=tiny_family)
    with pytest.raises(InputError, match=f"{number} is no strength"):
        evaluate_world(tmp_path / "work", strengths=[0.5, number])


def test_options_that_would_do_nothing_are_refused(subject, tiny_family):
    with pytest.raises(InputError, match="lora has no use for --preset"):
        stages.finetune(subject, "lora", steps=1, preset="paper", family=tiny_family)
    for option in ("memory", "vision"):
        with pytest.raises(InputError, match=f"lora has no use for --{option}"):
            stages.finetune(subject, "lora", steps=1, family=tiny_family, **{option: "12"})
    stages.finetune(subject, steps=1, family=tiny_family)
    with pytest.raises(InputError, match="has 1 of 5 references"):
        stages.generate(subject, "a [V] thing", n=1, steps=1, references=5, family=tiny_family)


def test_a_mask_without_its_photo_is_not_refreshed_from_it(subject, tiny_family):
    for name in ("photo.png", "mask.safetensors"):
        (subject / "references/00" / name).unlink()
    with pytest.raises(InputError, match="missing or damaged, and so is its photo; import"):
        stages.finetune(subject, steps=1, family=tiny_family)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
@pytest.mark.parametrize(
    ("redirection", "code", "said"), [(">&-", 0, ""), (">/dev/full", 1, "could not be printed (No space")]
)
def test_a_result_that_cannot_be_printed_is_no_traceback(redirection, code, said):
    path = {"PYTHONPATH": str(Path(p3s_cli.__file__).parents[1])}
    command = f"{sys.executable} -m p3s_cli.cli doctor world {redirection}"
    made = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | path)
    assert made.returncode == code and said in made.stderr and "Traceback" not in made.stderr
