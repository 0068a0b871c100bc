"""What `fuzz.py` gives: free inputs, good ones with a few places changed, and well-formed ones with odd contents.

PNG chunks have right checksums and safetensors headers fit their data, so that they get past the first check.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tempfile
import zlib
from pathlib import Path

import torch
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from p3s_cli.sd.weights import save_tensors

LAYOUT = {"a": ("F32", (2, None)), "b": ("U8", (3,))}  # what `open_artifact` asks for
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


def pictures() -> list[bytes]:
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


def our_png() -> bytes:
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_itxt("p3s", json.dumps({"prompt": "a [V] dog", "seed": 3}))
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def our_tensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        save_tensors(path, {"a": torch.ones(2, 4), "b": torch.ones(3, dtype=torch.uint8)}, {"settings": {"k": [1]}})
        return path.read_bytes()


def our_manifest() -> dict:
    stage = {"inputs": "0", "settings": {"k": 1}, "seed": 0, "artifacts": {"control/a": "0"}, "result": {"loss": 0.1}}
    reference = {"folder": "references/00", "photo_sha256": "0", "width": 60, "height": 40, "positive": [[1, 2]]}
    return {
        "schema_version": 1, "class_word": "dog", "class_score": None, "identifier": "sks", "model": "world",
        "references": [reference | {"mask": stage}], "finetune": stage, "generated": [stage],
    }  # fmt: skip


CLICKS = {"positive": [[12, 8], "0.5,0.25"], "negative": [[50.5, 3]], "box": [1, 2, 50, 30], "class": "dog"}
WORDS = st.sampled_from(
    ["[V]", "a", "dog", "sks", "\0", "\ud800", "[V", "V]", "🐕", "<|endoftext|>", "'", "\n", "ﬀ" * 9]
)
