"""What a tensor file must survive before its numbers are believed, and that every schema ever released is read."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from p3s_cli.config import read_control
from p3s_cli.errors import InputError
from p3s_cli.manifest import SCHEMA as MANIFEST_SCHEMA
from p3s_cli.methods.photos import mask_tensors
from p3s_cli.sd.weights import HEADER_LIMIT, SCHEMA, load_tensors, save_tensors
from p3s_cli.subject import Subject, mask_layout

GOLDEN = Path(__file__).parent.parent / "golden"
LAYOUT = {"a": ("F32", (2, None)), "b": ("U8", (3,))}


@pytest.fixture
def written(tmp_path):
    """(path, sha256) of a file that fits LAYOUT."""
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.arange(3, dtype=torch.uint8)}
    return path, save_tensors(path, tensors, {"settings": {"k": 1}})


def rewrite(path, change):
    """Apply `change(header)` to the JSON header, or write the bytes it returns in its place."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    new = change(header)
    new = new if isinstance(new, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def test_what_was_written_is_read_back(written):
    tensors, metadata = load_tensors(written[0], LAYOUT, written[1])
    assert tensors["a"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and tensors["b"].tolist() == [0, 1, 2]
    assert metadata == {"schema": SCHEMA, "settings": {"k": 1}}


def huge(header):
    header["a"] |= {"shape": [2, 10**11], "data_offsets": [0, 8 * 10**11]}


def newer(header):
    header["__metadata__"] = {"p3s": json.dumps({"schema": SCHEMA + 1})}


def other_dtype(header):
    header["a"]["dtype"] = "I64"
    header["a"]["shape"] = [2, 2]


CHANGES = {
    "announces more than there is": (huge, "bytes instead of"),
    "padded beyond the limit": (lambda h: json.dumps(h).encode() + b" " * HEADER_LIMIT, "longer than"),
    "names a tensor twice": (lambda h: b'{"a": {}, "a": {}}', "something twice"),
    "lacks a tensor": (lambda h: h.__setitem__("a2", h.pop("a")), "a is missing|a2 is not expected"),
    "another dtype": (other_dtype, r"a is I64\[2, 2\] instead of F32\[2, None\]"),
    "another shape": (lambda h: h["a"].__setitem__("shape", [4, 2]), r"a is F32\[4, 2\]"),
    "negative shape": (lambda h: h["a"].__setitem__("shape", [-2, -4]), "does not describe 'a'"),
    "unknown dtype": (lambda h: h["a"].__setitem__("dtype", "F8_E4M3"), "does not describe 'a'"),
    "overlapping": (lambda h: h["b"].__setitem__("data_offsets", [0, 3]), "t.safetensors"),
    "newer schema": (newer, f"its schema is {SCHEMA + 1}, and this version of p3s reads {SCHEMA}"),
    "metadata of another kind": (lambda h: h.__setitem__("__metadata__", {"p3s": "[1]"}), "metadata"),
    "no object": (lambda h: b"[1, 2]", "no JSON object"),
    "no JSON": (lambda h: b"{" * 2000, "t.safetensors"),
    "nested without end": (lambda h: b'{"a":' * 100_000, "t.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_header_is_refused(written, change):
    how, words = CHANGES[change]
    rewrite(written[0], how)
    with pytest.raises(InputError, match=words):
        load_tensors(written[0], LAYOUT)


@pytest.mark.parametrize("count", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_refused(written, count):
    written[0].write_bytes(written[0].read_bytes()[:count])
    with pytest.raises(InputError, match="t.safetensors is damaged"):
        load_tensors(written[0])


def test_every_single_bit_counts(written):
    path, sha = written
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            load_tensors(path, LAYOUT, sha)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        save_tensors(tmp_path / "n.safetensors", {"x": torch.tensor([1.0, value])})
        with pytest.raises(InputError, match="x holds numbers that are not finite"):
            load_tensors(tmp_path / "n.safetensors")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(InputError, match="it is no file"):
            load_tensors(path)


def test_a_pickle_under_another_name_is_not_opened(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="damaged or not made by p3s"):
        load_tensors(tmp_path / "p.safetensors")


@pytest.mark.parametrize("version", range(1, MANIFEST_SCHEMA + 1))
def test_a_subject_of_every_schema_is_read(version, tmp_path):
    """`tests/golden/schema-<n>` was written by the first p3s of that schema, on a family like `tests/tiny.py`."""
    shutil.copytree(GOLDEN / f"schema-{version}", tmp_path / "s")
    subject = Subject.open(tmp_path / "s")
    subject.check_masks()
    subject.check_control(subject.tuned().settings["base_fingerprint"])
    reference = subject.manifest.references[0]
    tensors = mask_tensors(subject, reference)
    assert tensors["subject"].sum() > 0 and tensors.keys() == mask_layout(reference).keys()
    control, sha = subject.path("control/control.safetensors"), subject.tuned().artifacts["control/control.safetensors"]
    tensors, metadata = load_tensors(control, sha=sha)
    assert all(t.dtype == torch.float16 for t in tensors.values()) and "rngr" in " ".join(tensors)
    assert read_control(metadata["config"]).injection == "gated"


@pytest.mark.parametrize(
    "settings", [None, {}, {"control": {"lam": "much"}}, {"control": {"color": 1}}, {"control": 3}]
)
def test_settings_no_p3s_wrote_are_refused(settings):
    with pytest.raises(InputError, match="settings of the control cannot be read"):
        read_control(settings)


def test_a_control_of_another_base_names_both(tmp_path):
    shutil.copytree(GOLDEN / "schema-1", tmp_path / "s")
    subject = Subject.open(tmp_path / "s")
    theirs = subject.tuned().settings["base_fingerprint"]
    with pytest.raises(InputError, match=rf"another base model \({theirs[:12]}, not 0123456789ab\)"):
        subject.check_control("0123456789abcdef")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_manifest_with_a_number_that_is_none_is_refused(tmp_path, number):
    """Where anything may stand as well, so that what was read can always be written back."""
    shutil.copytree(GOLDEN / "schema-1", tmp_path / "s")
    path = tmp_path / "s" / "subject.json"
    good = json.loads(path.read_text())
    good["finetune"]["settings"]["k"] = 0.125
    path.write_text(json.dumps(good).replace("0.125", number))
    with pytest.raises(InputError, match=f"{number} is no number"):
        Subject.open(tmp_path / "s")


def test_a_manifest_of_a_newer_schema_or_with_paths_outside_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "schema-1", tmp_path / "s")
    path = tmp_path / "s" / "subject.json"
    good = json.loads(path.read_text())
    newer = good | {"schema_version": MANIFEST_SCHEMA + 1}
    path.write_text(json.dumps(newer))
    with pytest.raises(InputError, match=f"its schema is {MANIFEST_SCHEMA + 1}, ours {MANIFEST_SCHEMA}"):
        Subject.open(tmp_path / "s")
    for name in ("../../passwd", "/etc/passwd", "a/../../b", "", "a\\..\\b"):
        good["finetune"]["artifacts"] = {name: "0"}
        path.write_text(json.dumps(good))
        with pytest.raises(InputError, match="not a path inside the subject directory"):
            Subject.open(tmp_path / "s")
