"""Give p3s files and texts that nobody would write, and count what it does other than use or refuse them.

    python benchmarks/fuzz.py --seconds 600

Every target takes bytes or text and must return a valid object or raise P3SError. Anything else that is
raised, and any file that appears, is a `stray`. Inputs are made by hypothesis: free ones, good ones with
a few places changed, and well-formed ones with odd contents (PNG chunks with right checksums, safetensors
headers that fit their data), so that they get past the first check. Fixed seeds, one for each round.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import os
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tables import machine, markdown
from transformers import CLIPTokenizer

import p3s_cli
from p3s_cli.errors import P3SError
from p3s_cli.sd import images, text
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.stages.clicks import read_clicks
from p3s_cli.stages.reference import Clicks
from p3s_cli.subject import read_manifest

PACKAGE = Path(p3s_cli.__file__).parent
LAYOUT = {"a": ("F32", (2, None)), "b": ("U8", (3,))}
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
    tensors, metadata = load_tensors(_file(folder, content), LAYOUT)
    assert tensors["a"].shape[0] == 2 and torch.isfinite(tensors["a"]).all() and isinstance(metadata, dict)


def read_png_metadata(folder: Path, content: bytes) -> None:
    assert isinstance(images.read_metadata(_file(folder, content)), dict | None)


def parse_prompts(folder: Path, content: str) -> None:
    tokenizer = _tokenizer()
    words = text.identify(content, "sks")
    text.check_identifier_survives(tokenizer, words, "sks")
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


# --- inputs

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.integers(-5, 200) | st.floats() | st.sampled_from([10**30, 0.5, True, None, "3"])


@st.composite
def damaged(draw, wholes: list[bytes]) -> bytes:
    """A good file with a few places changed, cut out, doubled, or its end missing."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "end", "double"]))
        length = draw(st.sampled_from([1, 2, 4, 17]))
        if kind == "change":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


@st.composite
def chunked_png(draw) -> bytes:
    """PNG chunks with right checksums and odd contents."""
    side = st.sampled_from([0, 1, 16, 20, 4000, 2**31 - 1])
    header = struct.pack(">IIBBBBB", draw(side), draw(side), *(draw(st.sampled_from(v)) for v in _HEADER))
    body = draw(st.lists(st.tuples(st.sampled_from(_CHUNKS), _CONTENTS), max_size=5))
    chunks = [(b"IHDR", header), *body, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


_HEADER = [[1, 2, 4, 8, 16, 3], [0, 2, 3, 4, 6, 5], [0, 1], [0, 1], [0, 1, 2]]
_CHUNKS = [b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"pHYs"]
_CONTENTS = (
    st.binary(max_size=40)
    | st.binary(max_size=40).map(zlib.compress)
    | st.sampled_from([zlib.compress(bytes(16 * 49)), b"p3s\0\0\0\0\0{}", b"p3s\0\0" + zlib.compress(bytes(2**21))])
    | JSON.map(lambda v: b"p3s\0\0\0\0\0" + json.dumps(v).encode())
)


@st.composite
def tensor_file(draw) -> bytes:
    """A safetensors file whose header is well formed and often fits."""
    header, data = {}, b""
    fits = draw(st.booleans())
    others = st.lists(st.sampled_from(["a", "b", "c", "__metadata__", "../x"]), max_size=4, unique=True)
    for name in list(LAYOUT) if fits else draw(others):
        dtype = LAYOUT[name][0] if fits else draw(st.sampled_from(["F32", "U8", "F16", "I64", "F64", "X"]))
        size = st.integers(0, 4) if fits else st.integers(0, 4) | st.sampled_from([2**31, -1])
        shape = [n or draw(size) for n in LAYOUT[name][1]] if fits else draw(st.lists(size, max_size=3))
        count = max(0, math.prod(shape)) * {"F32": 4, "F16": 2, "I64": 8, "F64": 8}.get(dtype, 1)
        part = draw(st.binary(max_size=count)) if count < 1000 else b""
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count]}
        data += part + bytes(max(0, min(count, 1000) - len(part)))
    if draw(st.booleans()):
        header["__metadata__"] = {"p3s": draw(JSON.map(json.dumps) | st.text(max_size=9))}
    encoded = json.dumps(header).encode()
    length = draw(st.sampled_from([len(encoded)] * 4 + [0, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + encoded + data


@st.composite
def odd_json(draw, good: list[object]) -> bytes:
    """Good JSON in which a few values are something else."""
    value = json.loads(json.dumps(draw(st.sampled_from(good))))
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(value))
        if places:
            holder, key = draw(st.sampled_from(places))
            holder[key] = draw(JSON | NUMBERS)
    return json.dumps(value).encode()


def _places(value: object):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _pictures() -> list[bytes]:
    found = []
    for mode, kind, options in (
        ("RGB", "PNG", {}), ("P", "PNG", {"transparency": 0}), ("RGBA", "PNG", {}), ("I;16", "PNG", {}), ("1", "PNG", {}),
        ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
        ("CMYK", "JPEG", {"progressive": True}), ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}),
    ):  # fmt: skip
        file = io.BytesIO()
        Image.effect_noise((20, 18), 60).convert(mode if mode != "I;16" else "L").convert(mode).save(
            file, kind, **options
        )
        found.append(file.getvalue())
    return found


def _our_png() -> bytes:
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_itxt("p3s", json.dumps({"prompt": "a [V] dog", "seed": 3}))
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _our_tensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        save_tensors(path, {"a": torch.ones(2, 4), "b": torch.ones(3, dtype=torch.uint8)}, {"settings": {"k": [1]}})
        return path.read_bytes()


def _our_manifest() -> dict:
    stage = {"inputs": "0", "settings": {"k": 1}, "seed": 0, "artifacts": {"control/a": "0"}, "result": {"loss": 0.1}}
    reference = {"folder": "references/00", "photo_sha256": "0", "width": 60, "height": 40, "positive": [[1, 2]]}
    return {
        "schema_version": 1, "class_word": "dog", "class_score": None, "identifier": "sks", "model": "world",
        "references": [reference | {"mask": stage}], "finetune": stage, "generated": [stage],
    }  # fmt: skip


_CLICKS = {"positive": [[12, 8], "0.5,0.25"], "negative": [[50.5, 3]], "box": [1, 2, 50, 30], "class": "dog"}
_WORDS = st.sampled_from(
    ["[V]", "a", "dog", "sks", "\0", "\ud800", "[V", "V]", "🐕", "<|endoftext|>", "'", "\n", "ﬀ" * 9]
)


def targets() -> dict[str, tuple[Target, st.SearchStrategy]]:
    """Every target with its inputs."""
    pictures, ours = _pictures(), _our_png()
    point = st.tuples(NUMBERS, NUMBERS).map(lambda p: f"{p[0]},{p[1]}")
    free = st.binary(max_size=300)
    return {
        "load_image": (load_image, damaged(pictures) | chunked_png() | free),
        "parse_points": (parse_points, odd_json([_CLICKS, {"a.jpg": _CLICKS}]) | JSON.map(json.dumps).map(str.encode) | free),
        "parse_points (words)": (parse_words, st.lists(point | st.text(max_size=12), min_size=1, max_size=3).map(" ".join)),
        "read_manifest": (manifest, odd_json([_our_manifest()]) | damaged([json.dumps(_our_manifest()).encode()]) | free),
        "open_artifact": (open_artifact, tensor_file() | damaged([_our_tensors()]) | free),
        "read_png_metadata": (read_png_metadata, damaged([ours, *pictures[:2]]) | chunked_png() | free),
        "parse_prompts": (parse_prompts, st.lists(_WORDS | st.text(max_size=8), max_size=120).map(" ".join) | st.text()),
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
