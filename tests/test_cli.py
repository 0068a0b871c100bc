"""The commands, in a temporary home, as a user runs them."""

import json

import pytest
from typer.testing import CliRunner

from p3s_cli.cli import app
from p3s_cli.config import PACES
from p3s_cli.sd import images
from p3s_cli.sd.weights import load_tensors

runner = CliRunner()


def p3s(*args) -> object:
    return runner.invoke(app, [str(a) for a in args])


@pytest.fixture
def home(tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    images.save_png(tmp_path / "two.png", pair[0])
    return tmp_path


def test_help_says_what_the_paces_are():
    """The command line is read without `config`, whose numbers it repeats in words."""
    page, (usual, fast) = " ".join(p3s("generate", "--help").stdout.split()), (PACES[False], PACES[True])
    assert f"default {usual.steps}, with --fast {fast.steps}." in page and f"{fast.steps} steps of a multistep" in page
    assert f"Default {usual.reuse}, with --fast {fast.reuse}." in page


def test_the_main_path_end_to_end(home, pair):
    _, _, ((x, y), (u, v)) = pair
    result = p3s(
        "mask",
        "two.png",
        "--pos",
        f"{x},{y}",
        "--neg",
        f"{u / 127:.4f},{v / 127:.4f}",
        "--model",
        "world",
        "--class",
        "pet",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["subject"] == "two"
    assert p3s("finetune", "two", "--steps", 2).exit_code == 0
    result = p3s("generate", "two", "a [V] pet on beach", "-n", 2, "--steps", 2, "--json")
    made = json.loads(result.stdout)
    assert len(made["images"]) == 2 and all((home / p).is_file() for p in made["images"])
    again = p3s("generate", "two", "a [V] pet on beach", "-n", 2, "--steps", 2)
    assert "unchanged" in again.stdout


def test_the_first_page_has_a_whole_sentence_for_every_command():
    """On 80 columns; a longer first sentence would be cut off with three dots."""
    page = runner.invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    summaries = [line.strip() for line in page.split("Commands:\n")[1].splitlines()]
    assert len(summaries) == len(app.registered_commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in summaries)


BAD = [
    (["mask", "gone.png", "--pos", "1,1"], "gone.png does not exist"),
    (["mask", "two.png", "--pos", "500,1"], "128 wide and 128 high"),
    (["mask", "two.png", "--pos", "5"], "is not a point"),
    (["mask", "two.png", "--pos", "5,5", "--neg", "5,5"], "both positive and negative"),
    (["mask", "two.png", "--pos", "5,5", "--model", "sd99"], "no model is called"),
    (["mask", "two.png", "--pos", "5,5", "--preset", "fast"], "no preset is called"),
    (["mask", "two.png", "--pos", "5,5", "--model", "world", "--device", "tpu"], "no device is called"),
    (["mask", "two.png", "--grid", "--pos", "1,1", "--class", "dog"], "leave out --pos and --class, or --grid itself"),
    (["mask", "two.png", "b.png", "--grid", "-o", "out.png"], "several photos make several grids"),
    (["mask", "a/two.png", "b/two.png", "--grid"], "two of the photos would be two-grid.png"),
    (["finetune", "nowhere"], "not a subject directory"),
    (["finetune", "no where"], "-o 'no where'"),
    (["demo", "two.png"], "two.png is a file; name a folder for the demo"),
    (["finetune", "nowhere", "--lr", "inf"], "inf is no learning rate"),
    (["finetune", "nowhere", "--method", "lora", "--memory", "12"], "lora has no use for --memory"),
    (["finetune", "nowhere", "--method", "lora", "--vision", "a/b"], "lora has no use for --vision"),
    (["fetch", "dreambooth", "--control", "canny"], "dreambooth names the metric models of a protocol; leave out"),
    (["fetch", "dreambooth", "--vision", "dinov2"], "dreambooth names the metric models of a protocol; leave out"),
    (["eval", "--bench", "world", "--strength", "inf"], "inf is no strength"),
    (["generate", "nowhere", "a [V] dog"], "not a subject directory"),
    (["eval"], "name a subject directory, or a benchmark"),
    (["eval", "nowhere"], "not a subject directory"),
    (["eval", "nowhere", "--protocol", "mine"], "no protocol is called 'mine'; choose one of: dreambooth"),
    (["eval", "nowhere", "--quick"], "--quick belongs to --bench world"),
    (["eval", "--bench", "imagenet"], "choose world or dreambench"),
    (["eval", "--bench", "world", "--protocol", "p3s"], "leave out --protocol"),
    (["eval", "nowhere", "--output", "there"], "scored in its own directory"),
    (["eval", "here", "--bench", "world", "--output", "there"], "two folders to work in"),
    (["eval", "--bench", "world", "--ablate", "--method", "lora"], "leave out --method and --budget"),
    (["eval", "--bench", "world", "--budget", "mine"], "no budget is called 'mine'; choose from: published, equal"),
    (["eval", "nowhere", "--budget", "equal"], "--budget belongs to --bench world"),
    (["eval", ".", "--bench", "dreambench", "--self-check", "--method", "lora"], "leave out --method"),
    (["eval", ".", "--bench", "dreambench", "--self-check", "-n", "3"], "leave out -n, --seed and --dtype"),
    (["eval", ".", "--bench", "dreambench", "--self-check", "--seed", "5"], "leave out -n, --seed and --dtype"),
    (["eval", ".", "--bench", "dreambench", "--self-check", "--dtype", "none"], "leave out -n, --seed and --dtype"),
    (["eval", "--bench", "world", "--method", "lore"], "no method is called 'lore'"),
    (["eval", "--bench", "world", "--ablate", "--only", "nothing"], "nothing here is called 'nothing'"),
    (["eval", "--bench", "dreambench"], "name the DreamBench folder"),
    (["eval", "--bench", "dreambench", "."], "is not the DreamBench folder"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(home, arguments, words):
    before = sorted(home.rglob("*"))
    result = p3s(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1 and not result.stdout
    assert sorted(home.rglob("*")) == before


def test_a_grid_goes_where_it_is_told(home):
    result = p3s("mask", "two.png", "--grid", "-o", "drawn.png", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == ["drawn.png"] and (home / "drawn.png").is_file()
    assert p3s("mask", "two.png", "--grid").stdout == "look at two-grid.png\n"


def test_generate_checks_its_words_before_anything_is_loaded(home, pair):
    (x, y), _ = pair[2]
    p3s("mask", "two.png", "--pos", f"{x},{y}", "--model", "world", "--class", "pet")
    for options, words in (
        (["a dog"], "no [V]"),
        (["a [V] dog", "--scheduler", "plms"], "no scheduler"),
        (["a [V] dog", "--schedule", "up"], "no weight schedule"),
    ):
        result = p3s("generate", "two", *options)
        assert result.exit_code == 2 and words in result.stderr
    assert "p3s finetune two" in p3s("generate", "two", "a [V] dog").stderr


def test_doctor_says_what_is_here_what_it_takes_and_what_to_do(home):
    assert {p["state"] for p in json.loads(p3s("fetch", "world", "--json").stdout)} == {"present"}
    assert "as JSON on stdout, an object or a list." in " ".join(p3s("fetch", "--help").stdout.split())
    report = json.loads(p3s("doctor", "world", "--device", "cpu", "--json").stdout)
    assert {p["state"] for p in report["parts"]} == {"present"} and report["advice"] == []
    assert report["versions"]["torch"] and report["dtype"] == "float32" and report["offline"]
    text = p3s("doctor", "sd15").stdout
    assert "unset HF_HUB_OFFLINE, then run: p3s fetch sd15" in text and "memory profile" in text
    assert p3s("doctor", "sd99").exit_code == 2
    result = p3s("fetch", "sd15", "--control", "canny")
    assert result.exit_code == 2 and "without a network (HF_HUB_OFFLINE is set)" in result.stderr
    assert "fetch it with `p3s fetch sd15 --control canny`" in result.stderr


def test_a_manifest_from_elsewhere_is_refused(home):
    (home / "odd").mkdir()
    (home / "odd/subject.json").write_text('{"schema_version": 99%s}' % ("0" * 400))
    result = p3s("finetune", "odd")
    assert result.exit_code == 2 and "subject.json is not a manifest this version reads" in result.stderr


def test_python_functions_have_the_same_names_and_defaults_as_the_commands():
    import inspect

    from p3s_cli import stages

    commands = {command.callback.__name__: command.callback for command in app.registered_commands}

    renamed = {"photos": "photo", "pos": "positive", "neg": "negative"}
    # lists start empty; files, and a picture, of their own
    commands_only = {"context", "as_json", "pos", "neg", "points", "grid", "subject_dirs", "jobs"}
    for name in ("mask", "finetune", "generate"):
        ours = inspect.signature(getattr(stages, name)).parameters
        for option, parameter in inspect.signature(commands[name]).parameters.items():
            if option not in commands_only:
                assert ours[renamed.get(option, option)].default == parameter.default, (name, option)


@pytest.mark.parametrize("method", ["lora", "textual-inversion"])
def test_a_subject_tuned_by_a_rival_is_drawn_by_it(home, pair, method):
    (x, y), _ = pair[2]
    p3s("mask", "two.png", "--pos", f"{x},{y}", "--model", "world", "--class", "pet")
    result = p3s("finetune", "two", "--method", method, "--steps", 2, "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)
    assert tuned["method"] == method and tuned["steps"] == 2
    tensors, metadata = load_tensors(home / tuned["control"])
    recorded = json.loads((home / "two/subject.json").read_text())["finetune"]["settings"]
    assert (
        {k: metadata[k] for k in recorded} == recorded
        and recorded["method"] == method
        and recorded["config"]["steps"] == 2
    )
    assert sum(t.numel() for t in tensors.values()) < 200_000  # what was trained, and no U-Net
    assert json.loads(p3s("finetune", "two", "--method", method, "--steps", 2, "--json").stdout)["unchanged"]
    made = json.loads(p3s("generate", "two", "a [V] pet on beach", "-n", 1, "--steps", 2, "--json").stdout)
    assert (home / made["images"][0]).is_file()
    (home / tuned["control"]).unlink()
    again = p3s("generate", "two", "a [V] pet").stderr.split("run: ")[1]
    assert again.startswith(f"p3s finetune two --method {method} --steps 2 --lr ") and again.endswith(" --force\n")
    before = (home / "two/subject.json").read_bytes()
    other = p3s("finetune", "two", "--method", "hyper")
    assert other.exit_code == 2 and "no method is called 'hyper'; choose one of: p3s, dreambooth" in other.stderr
    assert (home / "two/subject.json").read_bytes() == before


def test_a_device_without_room_is_one_sentence(home, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("p3s_cli.stages.masking.load", full)
    result = p3s("mask", "two.png", "--pos", "18,32", "-o", "it", "--model", "world")
    assert (
        result.exit_code == 1
        and result.stderr == "p3s: out of memory; free some of the device's, or use another --device\n"
    )
