"""One writer per subject, named to whoever comes second, gone with its process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import one_writer, writing
from p3s_cli.subject import Subject

HOLD = """
import sys, time
from pathlib import Path
from p3s_cli.lock import writing
with writing(Path(sys.argv[1]), "p3s finetune"):
    (Path(sys.argv[1]) / "subject.json").write_text("{}")
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_stops_at_once_and_names_the_holder_until_that_is_killed(tmp_path):
    root = tmp_path / "pet"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(P3SError, match=rf"pet is being written by p3s finetune, process {holder.pid} on .* since \d"):
        with writing(root, "p3s mask"):
            raise AssertionError
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with writing(root, "p3s mask"):
        assert f"p3s mask, process {os.getpid()}" in (root / ".lock").read_text()


def test_two_threads_are_two_writers(tmp_path):
    found = []

    def other():
        try:
            with writing(tmp_path, "second"):
                found.append("held")
        except P3SError as error:
            found.append(str(error))

    with writing(tmp_path, "first"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1 and "being written by first" in found[0]


def test_a_directory_that_got_nothing_is_not_left_behind(tmp_path):
    with pytest.raises(ValueError), writing(tmp_path / "new", "a test"):
        raise ValueError
    assert not (tmp_path / "new").exists()
    with writing(tmp_path, "a test"):
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_stage_holds_its_subject_and_nothing_that_is_none(tmp_path):
    @one_writer
    def stage(subject_dir):
        return Subject.open(subject_dir)

    with pytest.raises(InputError, match="not a subject directory"):
        stage(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "subject.json").write_text("{}")
    with writing(tmp_path, "another"), pytest.raises(P3SError, match="being written by another"):
        stage(tmp_path)
