"""Kill p3s at random instants, let it go on, and compare what it leaves with a run that was never killed.

    python benchmarks/faults.py --kills 200

Each trial runs mask, finetune and generate, or eval on a masked subject (in turn), on a tiny family with random
weights, in a process of its own that is killed once (kill -9, SIGTERM and SIGINT in turn) at a random instant of
that run; the same commands are then given again. A kill is `survived` if they succeed, nothing is left behind, and a
process ended by SIGTERM or SIGINT said so with 143 or 130; `equal` counts those trials that end with
the very bytes, in every file, of the undisturbed run (measured seconds, which eval writes down, excepted). Checkpoints are written after every step, so that many kills
fall into one. Needs `fork`: the libraries are imported once, and every trial is a child of that process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tables import machine, markdown

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny

from p3s_cli import benches, signals, stages
from p3s_cli.lock import LOCK
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.stages import generating, tuning  # noqa: F401 (every trial is a child, and imports nothing itself)

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS, IMAGES = 6, 5  # of finetune; of generate, which makes two batches
# scores have three decimals; seconds of what a kill fell right behind stay unknown
_SECONDS = re.compile(rb"<td>(\d+\.\d)?</td>")


def stages_story(family: Family, photo: Path, root: Path) -> None:
    """Mask, mask again with another point, finetune, generate."""
    for positive in ([(18, 32)], [(20, 30)]):
        stages.mask(photo, positive, [(46, 32)], root, "thing", family=family)
    stages.finetune(root, steps=STEPS, family=family)
    stages.generate(root, "a [V] thing on beach", n=IMAGES, steps=2, family=family)


def eval_story(family: Family, photo: Path, root: Path) -> None:
    """Eval of two methods on a subject that has its masks."""
    prompts, quick = ["a [V] thing on beach", "a [V] thing in snow"], functools.partial(stages.generate, steps=2)
    with mock.patch.object(stages, "generate", quick):
        benches.evaluate_subject(root, ["p3s", "untuned"], prompts, n=2, family=family)


STORIES = {"stages": stages_story, "eval": eval_story}


def child(work: Callable[[], None]) -> int:
    """Fork a process that does the work as the command line would: 0 done, 1 failed, 128 + signal interrupted."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        # torch replaces the pool that a fork has lost at its first use, and threads that load weights side by side
        # may both find it gone ("Invalid thread pool!")
        torch.set_num_threads(1)
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
    """sha256 of every file by its path, without seconds; the lock file only says who held it last."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in (LOCK, "measured.json")]
    return {str(p.relative_to(root)): hashlib.sha256(_SECONDS.sub(b"", p.read_bytes())).hexdigest() for p in files}


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


def prepare(folder: Path) -> tuple[Family, Path]:
    """The family, loaded once before the children are made, and a photo."""
    family, photo = load(str(tiny.build_with_readers(folder / "family")), "cpu"), tiny.photo(folder / "two.png")
    family.profile = replace(family.profile, finetune=family.profile.finetune | {"steps": STEPS})
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler_config", "vision"):
        getattr(family, part)
    stages.mask(photo, [(18, 32)], [(46, 32)], folder / "masked", "thing", family=family)
    tuning.Checkpoint = functools.partial(Checkpoint, every=0.0)  # a default of the class could not be changed
    return family, photo


def begin(name: str, folder: Path) -> Path:
    """The subject as a story finds it; always in one place, as rows of scores name their files."""
    root = folder / "subject"
    shutil.rmtree(root, ignore_errors=True)
    if name == "eval":
        shutil.copytree(folder / "masked", root)
    return root


def undisturbed(name: str, run: Callable[[Path], None], folder: Path) -> tuple[dict[str, str], float]:
    """What a story leaves that nobody kills, and how many seconds it takes."""
    for _ in range(2):  # the first run is slower than all that follow
        root, started = begin(name, folder), time.monotonic()
        if exit_code(child(lambda: run(root))) != 0:  # noqa: B023
            raise SystemExit(f"the undisturbed run of {name} failed")
        length = time.monotonic() - started
    return contents(root), length


def measure(kills: int, seed: int, folder: Path) -> dict:
    """Run the trials. Returns counts, and by signal how many kills came before the work was done."""
    family, photo = prepare(folder)
    runs = {name: functools.partial(story, family, photo) for name, story in STORIES.items()}
    wholes = {name: undisturbed(name, run, folder) for name, run in runs.items()}
    chance, rows, names = random.Random(seed), [], list(STORIES)
    with contextlib.suppress(signals.Interrupted), signals.raising():  # then what was seen so far is the result
        for k in range(kills):
            name, number = names[k % len(names)], SIGNALS[k // len(names) % len(SIGNALS)]
            whole, length = wholes[name]
            root, delay = begin(name, folder), chance.uniform(0, length)
            code = trial(runs[name], root, number, delay)
            found = contents(root)
            litter = sorted(found.keys() - whole.keys())
            survived, equal = code is not None and not litter, found == whole
            rows.append(
                {"story": name, "signal": number.name, "in_time": code != 0, "survived": survived, "equal": equal}
            )
            if not (survived and equal):
                other = sorted(n for n in whole if found.get(n) != whole[n])
                print(
                    f"kill {k}: {name}, {number.name} after {delay:.3f} s, exit {code}, left {litter}, differs in {other}",
                    file=sys.stderr,
                )
            elif (k + 1) % 10 == 0:
                print(f"{k + 1} of {kills} kills", file=sys.stderr)
    return {"rows": rows, "seconds": {name: round(length, 2) for name, (_, length) in wholes.items()}}


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
    table = [{"commands": "all", "signal": "all", **totals}]
    for name, number in itertools.product(STORIES, SIGNALS):
        own = [r for r in rows if (r["story"], r["signal"]) == (name, number.name)]
        table.append(
            {"commands": name, "signal": number.name, "kills": len(own)}
            | {n: sum(r[n] for r in own) for n in ("survived", "equal", "in_time")}
        )
    print(f"{machine()}; seconds of the undisturbed runs: {found['seconds']}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
