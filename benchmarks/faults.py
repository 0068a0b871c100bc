"""Kill p3s at random instants, let it go on, and compare what it leaves with a run that was never killed.

    python benchmarks/faults.py --kills 200

Each trial runs mask, finetune and generate on a tiny family with random weights, in a process of its own
that is killed once (kill -9, SIGTERM and SIGINT in turn) at a random instant of that run; the same
commands are then given again. A kill is `survived` if they succeed, nothing is left behind, and a
process ended by SIGTERM or SIGINT said so with 143 or 130; `equal` counts those trials that end with
the very bytes, in every file, of the undisturbed run. Checkpoints are written after every step, so that many kills
fall into one. Needs `fork`: the libraries are imported once, and every trial is a child of that process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tables import machine, markdown

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny

from p3s_cli import signals, stages
from p3s_cli.lock import LOCK
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.train import Checkpoint

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS, IMAGES = 6, 5  # of finetune; of generate, which makes two batches
Progress = Callable[[str, int, int], None]


def story(family: Family, photo: Path, root: Path, progress: Progress) -> None:
    """Mask, mask again with another point, finetune, generate."""
    Checkpoint.every = 0.0
    for positive in ([(18, 32)], [(20, 30)]):
        stages.mask(photo, positive, [(46, 32)], root, "thing", family=family, on_progress=progress)
    stages.finetune(root, steps=STEPS, family=family, on_progress=progress)
    stages.generate(root, "a [V] thing on beach", n=IMAGES, steps=2, family=family, on_progress=progress)


def child(work: Callable[[], None]) -> int:
    """Fork a process that does the work as the command line would: 0 done, 1 failed, 128 + signal interrupted."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with signals.raising():
            work()
            code = 0
    except signals.Interrupted as stop:
        code = stop.exit_code
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file by its path; the lock file only says who held it last."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != LOCK]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def trial(run: Callable[[Path], None], root: Path, number: int, delay: float) -> int | None:
    """Start the story, send the signal after `delay` seconds, give the same commands again.

    Returns the exit code of the first process if all was well, None otherwise.
    """
    first = child(lambda: run(root))
    time.sleep(delay)
    os.kill(first, number)  # not reaped yet, so the number cannot belong to another
    code = exit_code(first)
    expected = {0, -number if number == signal.SIGKILL else 128 + number}
    if code not in expected or exit_code(child(lambda: run(root))) != 0:
        return None
    return code


def measure(kills: int, seed: int, folder: Path) -> dict:
    """Run the trials. Returns counts, and by signal how many kills came before the work was done."""
    family, photo = load(str(tiny.build(folder / "family")), "cpu"), tiny.photo(folder / "two.png")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler_config", "vision"):
        getattr(family, part)  # loaded once, before the children are made
    run = functools.partial(story, family, photo, progress=lambda what, done, total: None)
    for warm in range(2):  # the first run is slower than all that follow
        started = time.monotonic()
        if exit_code(child(lambda: run(folder / f"whole{warm}"))) != 0:  # noqa: B023
            raise SystemExit("the undisturbed run failed")
        length = time.monotonic() - started
    whole = contents(folder / "whole0")
    chance, rows = random.Random(seed), []
    with contextlib.suppress(signals.Interrupted), signals.raising():  # then what was seen so far is the result
        for k in range(kills):
            number, root = SIGNALS[k % len(SIGNALS)], folder / "subject"
            delay = chance.uniform(0, length)
            code = trial(run, root, number, delay)
            found = contents(root)
            litter = sorted(found.keys() - whole.keys())
            survived, equal = code is not None and not litter, found == whole
            rows.append({"signal": number.name, "in_time": code != 0, "survived": survived, "equal": equal})
            if not (survived and equal):
                print(f"kill {k}: {number.name} after {delay:.3f} s, exit {code}, left {litter}", file=sys.stderr)
            elif (k + 1) % 10 == 0:
                print(f"{k + 1} of {kills} kills", file=sys.stderr)
            shutil.rmtree(root)
    return {"rows": rows, "seconds": round(length, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no thread pool
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.kills, args.seed, Path(folder))
    rows = found["rows"]
    totals = {"kills": len(rows)} | {n: sum(r[n] for r in rows) for n in ("survived", "equal", "in_time")}
    if args.json:
        print(json.dumps(totals | {"story_seconds": found["seconds"]}))
        return
    table = [{"signal": "all", **totals}]
    for number in SIGNALS:
        own = [r for r in rows if r["signal"] == number.name]
        table.append(
            {"signal": number.name, "kills": len(own)}
            | {n: sum(r[n] for r in own) for n in ("survived", "equal", "in_time")}
        )
    print(f"{machine()}; the undisturbed run takes {found['seconds']} s\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
