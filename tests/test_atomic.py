"""Files that are whole or absent, on disks that fill up and in folders that cannot be written."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from p3s_cli.atomic import append, committing, finish, read_text, replacing
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import writing

LIVING, DEAD = 1, 2**22 + 1  # process numbers: the first of all, and one above the largest there can be


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_files_get_the_rights_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path):
    for process in (LIVING, DEAD):
        (tmp_path / f".{process}-00.p3s-tmp").mkdir()
        (tmp_path / f".{process}-00.p3s-tmp" / "half").write_text("x")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert names(tmp_path) == [f".{LIVING}-00.p3s-tmp", "a"]
    finish(tmp_path)  # the one writer of a folder knows that all of them are stale
    assert names(tmp_path) == ["a"]


def test_a_folder_with_a_writer_of_its_own_is_left_to_that_one(tmp_path):
    """Who may be at work there, with temporary files of a living process."""
    (tmp_path / "subject/references").mkdir(parents=True)
    with writing(tmp_path / "subject", "a test"), replacing(tmp_path / "subject/references/a") as temporary:
        temporary.write_text("a")
        (tmp_path / "else/.1-00.p3s-tmp").mkdir(parents=True)
        finish(tmp_path)
        assert temporary.read_text() == "a" and not names(tmp_path / "else")
    assert (tmp_path / "subject/references/a").read_text() == "a"


def test_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "b").write_text("old")
    with pytest.raises(RuntimeError), committing(tmp_path) as folder:
        (folder / "b").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "old"
    with committing(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("new")
        (folder / "b").write_text("new")
    assert names(tmp_path) == ["b", "deep"] and (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_commit_that_was_decided_is_completed_by_the_next_writer(tmp_path, moved):
    """Killed after `moved` of its two files were in place: both are, for whoever writes next."""
    decided = tmp_path / ".p3s-commit"
    (decided / "deep").mkdir(parents=True)
    (tmp_path / "deep").mkdir()
    for k, name in enumerate(("deep/a", "b")):
        ((tmp_path if k < moved else decided) / name).write_text("new")
    (tmp_path / "subject.json").write_text("{}")
    with writing(tmp_path, "a test"):
        assert names(tmp_path) == [".lock", "b", "deep", "subject.json"]
        assert (tmp_path / "deep/a").read_text() == (tmp_path / "b").read_text() == "new"


@contextlib.contextmanager
def file_size_limit(count):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_quota_is_one_sentence_with_path_and_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with (
        file_size_limit(1000),
        pytest.raises(P3SError, match=r"a: File too large \(1,000 bytes were written, [\d,]+ are free\)"),
    ):
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(bytes(2000))
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if made.returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_lines_that_do_not_fit_leave_those_before_them(tmp_path):
    path = tmp_path / "deep" / "rows"
    append(path, "one\n")
    with file_size_limit(1000), pytest.raises(P3SError, match="deep/rows: File too large"):
        append(path, "x" * 2000)
    assert path.read_text() == "one\n"
    append(path, "two\n")
    assert path.read_text() == "one\ntwo\n"


def test_text_without_end_is_not_read(tmp_path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="larger than 50 MB"):
        read_text(tmp_path / "zero")


def test_a_full_disk_is_one_sentence_and_what_was_whole_stays(small_disk):
    import torch

    from p3s_cli.sd.weights import load_tensors, save_tensors

    save_tensors(small_disk / "a.safetensors", {"x": torch.ones(1000)})
    with pytest.raises(P3SError, match=r"a.safetensors: .*No space left on device.* are free\)"):
        save_tensors(small_disk / "a.safetensors", {"x": torch.zeros(1_000_000)})
    assert load_tensors(small_disk / "a.safetensors")[0]["x"].sum() == 1000
    assert names(small_disk) == ["a.safetensors"]


SCRIPT = """
import os, sys
from pathlib import Path
from p3s_cli.atomic import replacing
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import writing
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
for write in (lambda p: replacing(p / "a"), lambda p: writing(p, "a test"), lambda p: writing(p / "new", "a test")):
    try:
        with write(Path(sys.argv[1])):
            print("written")
    except P3SError as error:
        print(error)
"""


def test_a_folder_that_cannot_be_written_is_one_sentence():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # not in tmp_path, which only its owner may enter
        os.chmod(folder, 0o555)
        out = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, check=True).stdout
        os.chmod(folder, 0o755)
        lines = out.splitlines()
        assert len(lines) == 3 and all(
            f"cannot write {folder}" in line and "Permission denied" in line for line in lines
        )
        assert not names(Path(folder))


def test_a_directory_whose_name_is_no_text_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """safetensors would write there, and could read nothing of it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not valid Unicode text; name another one with --output"):
        with writing(Path("caf\udce9"), "a test"):
            pass
    assert names(tmp_path) == []


def test_a_folder_below_may_be_a_link_to_another_disk(tmp_path, monkeypatch):
    """No rename goes there: a whole copy takes the target's place, and nothing is left over."""
    other, root, rename = tmp_path / "disk", tmp_path / "it", os.replace
    other.mkdir()
    (other / "a.txt").write_text("old")
    root.mkdir()
    (root / "outputs").symlink_to(other, target_is_directory=True)

    def across(source, target):
        if Path(source).stat() and Path(source).resolve().is_relative_to(root) != Path(target).resolve().is_relative_to(
            root
        ):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", across)
    with committing(root) as folder:
        (folder / "outputs").mkdir()
        (folder / "outputs/a.txt").write_text("new")
        (folder / "b.txt").write_text("beside")
    assert (other / "a.txt").read_text() == "new" and (root / "b.txt").read_text() == "beside"
    assert names(root) == ["b.txt", "outputs"] and names(other) == ["a.txt"]
