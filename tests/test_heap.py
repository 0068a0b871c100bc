"""Freed memory stays with the process: counted in the pages that the system has to hand out again."""

import os
import platform
import subprocess
import sys

import pytest

_BLOCKS, _BYTES = (
    4,
    20 << 20,
)  # each below what lies in the heap, all above what glibc keeps by itself, twice the largest
_ROUNDS = """
import resource, sys
from p3s_cli.cli.heap import keep_freed

kept = keep_freed() if sys.argv[1] == "keep" else None
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * int(sys.argv[3]) for _ in range(int(sys.argv[2]))]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[-1])
"""


def rounds(how: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed` said, and the page faults of the fourth round of taking and freeing the blocks."""
    calm = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _ROUNDS, how, str(_BLOCKS), str(_BYTES)]
    run = subprocess.run(command, env=calm | environment, capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_was_freed_is_not_asked_of_the_system_again():
    pages = _BLOCKS * _BYTES // os.sysconf("SC_PAGE_SIZE")
    left, handed_out = rounds("leave")
    kept, again = rounds("keep")
    assert (left, kept) == ("None", "True")
    assert handed_out > pages / 2 and again < pages / 20


def test_variables_of_the_users_own_are_heeded():
    assert rounds("keep", MALLOC_ARENA_MAX="2")[0] == "False"


_COMMAND = """
import gc, sys
from p3s_cli import cli, stages

def stage(photos, output):
    global inside
    inside = gc.isenabled(), gc.get_freeze_count()
    return []

stages.grid_many, inside = stage, None
sys.argv = ["p3s", *sys.argv[1:]]
try:
    cli.run()
except SystemExit:
    pass
print(inside, gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_what_a_command_imports_is_not_looked_through_while_it_works_nor_at_its_end():
    run = subprocess.run(
        [sys.executable, "-c", _COMMAND, "mask", "photo.png", "--grid"], capture_output=True, text=True
    )
    collects, kept, kept_at_the_end, looked_through = run.stdout.translate(str.maketrans("(),", "   ")).split()
    assert collects == "True"  # garbage of the stage's own is found
    assert int(kept) > 10_000  # typer and rich alone
    assert int(kept_at_the_end) > int(kept) and int(looked_through) < 100  # all that is left goes with the process


def test_a_program_that_calls_the_library_keeps_its_collector_as_it_is():
    how = "gc.isenabled(), gc.get_freeze_count()"
    code = (
        f"import gc; before = {how}; from p3s_cli import stages; from p3s_cli.cli import app; print(({how}) == before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
