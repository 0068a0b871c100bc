"""The DreamBench folder, as published and as a twin of it."""

import shutil
from dataclasses import replace

import pytest
import tiny
from PIL import Image, ImageOps
from typer.testing import CliRunner

from p3s_cli.benches import shards
from p3s_cli.benches.evaluate import _sitting, self_check
from p3s_cli.cli import app
from p3s_cli.errors import InputError
from p3s_cli.evals import dreambench
from p3s_cli.sd import images
from p3s_cli.stages import PhotoClicks
from p3s_cli.subject import Subject

INDEX = """Classes

subject_name,class
red_ball,ball
old_dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on grass'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} asleep'.format(unique_token, class_token),
]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(INDEX)
    for name in ("red_ball", "old_dog"):
        (tmp_path / name).mkdir()
        for k in (1, 0):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"0{k}.jpg")
    return tmp_path


def test_live_subjects_get_their_own_prompts(folder):
    ball, dog = dreambench.read(folder)
    assert ball.prompts == ("a [V] ball on grass", "a red [V] ball") and ball.class_word == "ball"
    assert dog.prompts == ("a [V] dog asleep",)
    assert [p.name for p in dog.photos] == ["00.jpg", "01.jpg"]


def test_subsets_and_shards_cover_everyone_once(folder):
    everyone = dreambench.read(folder)
    assert [s.name for k in (1, 2) for s in shards.pick(everyone, f"{k}/2")] == ["red_ball", "old_dog"]
    assert [s.name for s in dreambench.read(folder, ["old_dog"])] == ["old_dog"]
    for bad in ("0/2", "3/2", "half"):
        with pytest.raises(InputError, match="i/n"):
            shards.pick(everyone, bad)


def test_shards_without_subjects_and_subjects_without_photos_are_refused(folder):
    result = CliRunner().invoke(app, ["eval", "--bench", "dreambench", str(folder), "--shard", "3/3"])
    assert result.exit_code == 2 and "shard 3/3 is empty, as there are 2 subjects" in result.stderr
    for photo in folder.glob("red_ball/*.jpg"):
        photo.unlink()
    wanted = r"holds no photos of red_ball; put them where .*red_ball should be, or take such subjects' lines out of"
    for subjects in (None, ["old_dog", "red_ball"]):  # a mean over the others would be another benchmark's
        with pytest.raises(InputError, match=wanted):
            dreambench.read(folder, subjects)
    assert [s.name for s in dreambench.read(folder, ["old_dog"])] == ["old_dog"]
    (folder / "prompts_and_classes.txt").write_text(INDEX.replace("red_ball,ball\n", "").replace("old_dog,dog\n", ""))
    with pytest.raises(InputError, match="holds no photos of any subject"):
        dreambench.read(folder)


def test_an_index_that_is_no_text_is_refused(folder):
    (folder / "prompts_and_classes.txt").write_bytes(b"\xff\xfe" + INDEX.encode("utf-16-le"))
    with pytest.raises(InputError, match=r"prompts_and_classes\.txt cannot be read .*; restore it"):
        dreambench.read(folder)


def test_one_photo_has_no_other_to_be_checked_against(folder, tmp_path):
    (folder / "old_dog/01.jpg").unlink()
    with pytest.raises(InputError, match=r"00\.jpg is the one photo of old_dog, with no other to compare it with"):
        self_check(folder, tmp_path / "work")


@pytest.fixture
def sat(tmp_path, tiny_family):
    """A sitter, and what makes a case of it in a folder of work: its first photo is masked by a click on it."""
    photos = tuple(tiny.photo(tmp_path / f"dog/{name}") for name in ("00.png", "01.png"))

    def sit(sitter):
        return _sitting(tmp_path / "cases", sitter, PhotoClicks(positive=["0.3,0.5"]), tiny_family)

    return dreambench.Sitter("dog", "dog", photos, ("a [V] dog",)), sit


def references(case):
    return Subject.open(case.subject).manifest.references


@pytest.mark.parametrize("how", ["encoded anew", "resized", "sorted before"])
def test_a_folder_of_work_is_of_one_first_photo(sat, tmp_path, how):
    """The reference is the first photo and it alone: with a second one, methods would train on what P3S is not shown."""
    sitter, sit = sat
    assert len(references(sit(sitter))) == len(references(sit(sitter))) == 1
    first = tmp_path / "0.jpg"
    with Image.open(sitter.photos[how == "sorted before"]) as photo:
        (photo.resize((96, 96)) if how == "resized" else photo).save(first, quality=60)
    other = replace(sitter, photos=(first, *sitter.photos[how != "sorted before" :]))
    with pytest.raises(InputError, match=r"cases/dog has another photo than .*0\.jpg; remove that directory"):
        sit(other)
    assert len(references(sit(sitter))) == 1
    shutil.rmtree(tmp_path / "cases/dog")
    (reference,) = references(sit(other))
    assert reference.photo_sha256 == images.pixel_hash(images.load_image(first))


def test_a_first_photo_masked_before_its_colour_profile_was_heeded_is_the_same_photo(sat, monkeypatch):
    """`mask` takes it up as the reference that it was, so there is no second one to refuse."""
    sitter, sit = sat
    with monkeypatch.context() as patch:
        patch.setattr(images, "_managed", lambda image: image)
        former = references(sit(sitter))[0].photo_sha256
    monkeypatch.setattr(images, "_managed", lambda image: ImageOps.invert(image.convert("RGB")))
    (reference,) = references(sit(sitter))
    assert reference.photo_sha256 != former


def test_what_is_no_dreambench_is_refused(folder, tmp_path_factory):
    with pytest.raises(InputError, match="prompts_and_classes"):
        dreambench.read(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match="red_ball"):
        dreambench.read(folder, ["blue_ball"])


def test_the_published_folder_has_its_thirty_subjects_and_fifty_prompts(photo_data):
    sitters = dreambench.read(photo_data / "dreambench512")
    assert len(sitters) == 30 and sum(len(s.photos) for s in sitters) == 158
    assert all(len(s.prompts) == 25 for s in sitters)
    assert len({p for s in sitters for p in s.prompts if s.class_word == "dog"}) == 25


def test_names_and_classes_may_have_hyphens(tmp_path):
    """As whoever adds a subject of their own may write; a line that is not read would be a mean over fewer."""
    text = INDEX.replace("old_dog,dog", "old-dog,dog\nshirt,t-shirt")
    (tmp_path / "prompts_and_classes.txt").write_text(text)
    for name in ("red_ball", "old-dog", "shirt"):
        tiny.photo(tmp_path / name / "00.png")
    assert [(s.name, s.class_word) for s in dreambench.read(tmp_path)][1:] == [("old-dog", "dog"), ("shirt", "t-shirt")]
