"""Give p3s files and texts that nobody would write, and count what it does other than use or refuse them.

    python benchmarks/fuzz.py --seconds 600

Every target takes bytes or text and must return a valid object or raise P3SError. Anything else that is
raised, and any file that appears, is a `stray`. Inputs are made by hypothesis (`fuzz_inputs.py`) from fixed
seeds, one for each round.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fuzz_inputs as make
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tables import machine, markdown
from transformers import CLIPTokenizer

import p3s_cli
from p3s_cli.errors import P3SError
from p3s_cli.manifest import read_manifest
from p3s_cli.sd import images, text
from p3s_cli.sd.weights import load_tensors
from p3s_cli.stages.clicks import read_clicks
from p3s_cli.stages.reference import Clicks

PACKAGE = Path(p3s_cli.__file__).parent
Target = Callable[[Path, bytes | str], None]


# --- targets: what is given, what must come of it


def load_image(folder: Path, content: bytes) -> None:
    image = images.load_image(_file(folder, content))
    assert image.mode == "RGB" and min(image.size) >= images.MIN_SIDE


def parse_points(folder: Path, content: bytes) -> None:
    for clicks in read_clicks(_file(folder, content), [Path("a.jpg")]):
        found = Clicks.read(clicks.positive, clicks.negative, clicks.box, 60, 40)
        assert all(0 <= x < 60 and 0 <= y < 40 for x, y in found.positive + found.negative)


def parse_words(folder: Path, content: str) -> None:
    """Points and a box as the command line gets them."""
    words = content.split(" ")
    Clicks.read(words[:1], words[1:2], words[2] if len(words) > 2 else None, 60, 40)


def manifest(folder: Path, content: bytes) -> None:
    found = read_manifest(_file(folder, content))
    json.dumps(found.model_dump(), allow_nan=False)


def open_artifact(folder: Path, content: bytes) -> None:
    tensors, metadata = load_tensors(_file(folder, content), make.LAYOUT)
    assert tensors["a"].shape[0] == 2 and torch.isfinite(tensors["a"]).all() and isinstance(metadata, dict)


def read_png_metadata(folder: Path, content: bytes) -> None:
    assert isinstance(images.read_metadata(_file(folder, content)), dict | None)


def parse_prompts(folder: Path, content: str) -> None:
    tokenizer = _tokenizer()
    words = text.identify(content, "sks")
    text.check_subjects_survive(tokenizer, content, "sks")
    text.lost_words(tokenizer, words)
    ids = tokenizer(words, truncation=True, max_length=77).input_ids
    assert set(tokenizer("sks").input_ids[1:-1]) <= set(ids)  # the subject is in what the encoder reads


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "input"
    path.write_bytes(content)
    return path


@functools.cache
def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PACKAGE / "world" / "weights" / "tokenizer")


def targets() -> dict[str, tuple[Target, st.SearchStrategy]]:
    """Every target with its inputs."""
    pictures, ours = make.pictures(), make.our_png()
    point = st.tuples(make.NUMBERS, make.NUMBERS).map(lambda p: f"{p[0]},{p[1]}")
    free = st.binary(max_size=300)
    return {
        "load_image": (load_image, make.damaged(pictures) | make.chunked_png() | free),
        "parse_points": (parse_points, make.odd_json([make.CLICKS, {"a.jpg": make.CLICKS}]) | make.JSON.map(json.dumps).map(str.encode) | free),
        "parse_points (words)": (parse_words, st.lists(point | st.text(max_size=12), min_size=1, max_size=3).map(" ".join)),
        "read_manifest": (manifest, make.odd_json([make.our_manifest()]) | make.damaged([json.dumps(make.our_manifest()).encode()]) | free),
        "open_artifact": (open_artifact, make.tensor_file() | make.damaged([make.our_tensors()]) | free),
        "read_png_metadata": (read_png_metadata, make.damaged([ours, *pictures[:2]]) | make.chunked_png() | free),
        "parse_prompts": (parse_prompts, st.lists(make.WORDS | st.text(max_size=8), max_size=120).map(" ".join) | st.text()),
    }  # fmt: skip


# --- the loop


def round_of(name: str, count: int, number: int, folder: Path, seen: collections.Counter, report: Callable) -> None:
    """Give one target `count` inputs made from seed `number`; strays go to `report`."""
    target, inputs = targets()[name]

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def once(content: bytes | str) -> None:
        seen[name] += 1
        with contextlib.suppress(P3SError):
            try:
                target(folder, content)
                seen[f"{name}: used"] += 1
            except P3SError:
                raise
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                report(name, content, traceback.format_exc(limit=-3))
        left = [entry for entry in os.listdir(folder) if entry != "input"]
        if left:
            report(name, content, f"left {left}")

    once()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    seen: collections.Counter = collections.Counter()
    strays: list[str] = []

    def report(name: str, content: bytes | str, what: str) -> None:
        strays.append(name)
        print(f"{name}: {content!r:.2000}\n{what}", file=sys.stderr)

    started, number = time.monotonic(), args.seed
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)  # a write without a path would be seen there
        while time.monotonic() - started < args.seconds:
            for name in targets():
                round_of(name, 200, number, Path(folder), seen, report)
            number += 1
        os.chdir("/")
    names = list(targets())
    inputs = sum(seen[n] for n in names)
    if args.json:
        print(json.dumps({"inputs": inputs, "stray": len(strays), "seconds": round(time.monotonic() - started)}))
        return
    rows = [
        {"target": n, "inputs": seen[n], "used": seen[f"{n}: used"], "refused": seen[n] - seen[f"{n}: used"] - strays.count(n), "stray": strays.count(n)}
        for n in names
    ]  # fmt: skip
    rows.append({"target": "all"} | {k: sum(r[k] for r in rows) for k in ("inputs", "used", "refused", "stray")})
    print(f"{machine()}, {time.monotonic() - started:.0f} s\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
