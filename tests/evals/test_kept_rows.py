"""The rows that a benchmark keeps: compressed and without the places of a machine, they make the table of the run."""

import importlib.util
import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from p3s_cli.benches.ledger import Ledger
from p3s_cli.benches.run import gather
from p3s_cli.errors import InputError
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scores import Row, Rows, table

_spec = importlib.util.spec_from_file_location("rows", Path(__file__).parents[2] / "benchmarks/rows.py")
rows = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rows)


def made(folder: Path, subject: str, score: float) -> Row:
    return Row(
        "p3s", subject, "a dog", 0, str(folder / f"p3s/{subject}/0.png"), f"sha of {subject}", "16 pictures",
        "identity", "world", score, "readers/identity", "abc", "resize 128",
    )  # fmt: skip


def test_shards_joined_and_compressed_make_the_same_table_and_name_no_place(tmp_path):
    scores = {"00-dog": 0.25, "01-cat": 0.75}
    files = [tmp_path / f"shard-{k}-of-2/scores.jsonl" for k in (1, 2)]
    for file, (subject, score) in zip(files, scores.items(), strict=True):
        file.parent.mkdir()
        Rows(file).add([made(tmp_path / "work", subject, score)])
    joined, kept = rows.read(files), tmp_path / "kept.jsonl.xz"
    rows.keep(joined, kept)
    again = rows.read([kept])
    assert {r.file for r in again} == {"00-dog/0.png", "01-cat/0.png"}
    assert str(tmp_path) not in lzma.decompress(kept.read_bytes()).decode()
    assert [replace(r, file="") for r in again] == [replace(r, file="") for r in joined]
    rows.keep([*again, made(tmp_path / "work", "02-duck", 0.5), made(tmp_path / "work", "03-car", 0.5)], kept)
    assert {r.file for r in rows.read([kept])} == {f"{s}/0.png" for s in (*scores, "02-duck", "03-car")}
    mean = table(again, protocol("world"))["p3s"]["identity"]
    assert (mean.value, mean.subjects, mean.images) == (0.5, 2, 2)


def test_rows_of_one_name_that_were_drawn_by_two_settings_are_refused(tmp_path):
    first = made(tmp_path, "00-dog", 0.5)
    Rows(tmp_path / "a.jsonl").add([first])
    Rows(tmp_path / "b.jsonl").add([replace(first, sha256="another picture", score=0.7)])
    assert len(rows.read([tmp_path / "a.jsonl", tmp_path / "a.jsonl"])) == 1
    with pytest.raises(InputError, match="2 rows of p3s, 00-dog, 'a dog', seed 0, identity"):
        rows.read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_names_in_rows_are_the_entries_that_drew_them():
    found = rows.entries(["true pictures", "p3s", "lora, equal time x0.7", "nobody"])
    assert [(e.method, e.budget, e.strength) for e in found] == [("p3s", "published", 1.0), ("lora", "equal", 0.7)]


def test_seconds_of_an_image_are_those_of_the_pace_that_is_named(tmp_path, monkeypatch):
    """A run files them under the tuning and a digest of what it told `generate` of the pace: `fast`, or twenty steps."""
    paces = {"": 4.0, "-0d03a1d1": 2.0, "-d557b0bc": 1.0}
    seconds = {f"image/p3s-54247c7f{pace}": {"00-dog: a dog": taken} for pace, taken in paces.items()}
    (tmp_path / "measured.json").write_text(json.dumps(seconds))
    Rows(tmp_path / "scores.jsonl").add([made(tmp_path, "00-dog", 0.5)])
    told = []
    for options in ((), ("--fast",), ("--quick",), ("--fast", "--quick")):
        given = [tmp_path / "scores.jsonl", "--measured", tmp_path / "measured.json", "--json", tmp_path / "told.json"]
        monkeypatch.setattr(sys, "argv", ["rows.py", *map(str, given), *options])
        rows.main()
        told.append(json.loads((tmp_path / "told.json").read_text())["methods"]["p3s"]["seconds_per_image"])
    assert told == [4.0, 2.0, 1.0, 2.0]  # what is fast has its own steps, quick or not


@pytest.mark.parametrize("bench", ["bench-world", "bench-world-former"])
def test_rows_of_the_committed_bench_say_what_its_table_says(bench):
    """Its results are derived from rows and measured seconds that anyone can read."""
    results, how = Path(__file__).parents[2] / "benchmarks/results", protocol("world")
    kept = rows.read([results / f"{bench}.jsonl.xz"])
    entries = rows.entries(dict.fromkeys(row.method for row in kept))
    outcome = gather(kept, entries, Ledger(results / f"{bench}.measured.json"), how)
    told = json.loads((results / f"{bench}.json").read_text())
    assert json.loads(rows.told(kept, outcome, how)) == told
    assert len(told["methods"]) == len(entries) + 2 and told["methods"]["p3s"]["seconds"] > 0  # two calibration lines
