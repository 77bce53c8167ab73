"""Run the lessons as `nbdev_test` does: each once, in a process of its own, in a random order.

    python .ci/lessons.py                        all lessons; the seed of the order is printed
    python .ci/lessons.py --seed 7101            the same order again
    python .ci/lessons.py nbs/4_diffusion/04_unet.ipynb …     these only
    python .ci/lessons.py --changed              those that could have changed since they last passed

A lesson passes when

- no cell fails,
- its process is left as it was found: settings of torch and matplotlib, working folder, environment,
  warning filters, and the files beside the lesson,
- every knob of every widget, moved to its other end and back, gives another picture each time, within a
  second of the process's own CPU time.

A fork of a process that has imported the large libraries is a fresh process that need not wait for them.
The CPU seconds of each lesson, divided by how slow this machine is, go into `.seconds.json`, which
tests/house/test_house.py reads.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import stamps
from forks import import_libraries
from notebooks import NBS, ROOT, notebooks, one_thread
from yardstick import WORKERS, slowness

SECONDS = ROOT / ".seconds.json"
TOO_LONG = 600  # seconds after which a lesson is stopped, on the machine of the limits
KNOB = 1.0  # CPU seconds in which a knob must give another picture, on the machine of the limits


# ---------------------------------------------------------------- one lesson, in its own process


def surroundings(folder):
    "What a lesson must leave as it was, by name."
    import matplotlib
    import torch

    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # set by nbdev
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the working folder": os.getcwd(),
        "the environment": environment,
        "the warning filters": list(warnings.filters),
        "matplotlib's settings": dict(matplotlib.rcParams),
        "the files beside the lesson": sorted(path.name for path in folder.iterdir()),
    }


def differences(before, after):
    "One sentence for each part of the surroundings that differs."
    found = []
    for what, was in before.items():
        now = after[what]
        if now == was:
            continue
        if isinstance(was, dict):
            names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
            found.append(f"{what} changed: {', '.join(names)}")
        elif isinstance(was, list):
            new = [part for part in now if part not in was]
            gone = [part for part in was if part not in now]
            found.append(f"{what} changed: new are {new}, gone are {gone}")
        else:
            found.append(f"{what} changed from {was} to {now}")
    return found


def ends(knob):
    "The two values between which a knob is moved: both ends of a slider, the first two entries of a menu."
    if hasattr(knob, "options"):
        return knob.options[0], knob.options[1]
    return knob.min, knob.max


def there_and_back(knob, image, limit):
    "Move a knob to one of its ends and to the other; what is wrong with its answers, one phrase each."
    first, second = ends(knob)
    found = []
    for value in (first, second) if knob.value == second else (second, first):
        before = image.value
        started = time.process_time()
        knob.value = value
        seconds = time.process_time() - started
        if image.value == before:
            found.append(f"{knob.description} = {value} gives the same picture")
        if seconds > limit:
            found.append(f"{knob.description} = {value} takes {seconds:.2f} s of CPU time, not {limit:.2f}")
    return found


def drive(box, limit):
    """Move every knob of a widget; what is wrong with its answers, one phrase each.

    What a knob does may depend on the others: it has to answer with them where the lesson has left them, or
    with all of them at their first ends.
    """
    *knobs, image = box.children
    found = []
    for knob in knobs:
        wrong = there_and_back(knob, image, limit)
        if wrong:
            for other in knobs:
                other.value, _ = ends(other)
            wrong = there_and_back(knob, image, limit)
        found += wrong
    return found


def check(path, slow):
    "Run a lesson in this process; what is wrong with it, one sentence each."
    from execnb.shell import CaptureShell
    from IPython.core.interactiveshell import InteractiveShell
    from nbdev.config import get_config
    from nbdev.test import test_nb

    sys.path.insert(0, str(ROOT))
    CaptureShell(path)  # a shell sets up matplotlib and warnings, which is not the lesson's doing
    before = surroundings(path.parent)
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split())
    if not passed:
        return ["a cell failed"]
    found = differences(before, surroundings(path.parent))
    names = InteractiveShell._instance.user_ns  # of the shell that `test_nb` has made
    for name, value in list(names.items()):
        if name.startswith("widget_"):
            found += [f"{name}: {phrase}" for phrase in drive(value, KNOB * slow)]
    return found


def cpu_seconds():
    "The CPU seconds of this process and of those that it has started and waited for."
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def serve(path, slow, answer):
    "The life of a lesson's process: send `(what is wrong, CPU seconds)` through the pipe `answer`."
    try:
        found = check(path, slow)
    except BaseException:
        found = [traceback.format_exc()]
    answer.send((found, cpu_seconds()))


# ---------------------------------------------------------------- all lessons


def run_all(paths, slow):
    "Run lessons, two at a time; yields `(path, what is wrong, CPU seconds)` as each ends."
    forking = multiprocessing.get_context("fork")
    waiting = list(paths)
    running = {}  # by pipe: the process, its lesson, and when it started
    while waiting or running:
        while waiting and len(running) < WORKERS:
            path = waiting.pop(0)
            ours, theirs = forking.Pipe(duplex=False)
            process = forking.Process(target=serve, args=(path, slow, theirs))
            process.start()
            theirs.close()  # so that the pipe ends when the process does
            running[ours] = process, path, time.monotonic()
        for pipe in wait(running, timeout=1):
            process, path, _ = running.pop(pipe)
            try:
                found, seconds = pipe.recv()
            except EOFError:
                found, seconds = ["its process died"], 0.0
            process.join()
            yield path, found, seconds
        for process, path, started in running.values():
            if time.monotonic() - started > TOO_LONG * slow:
                print(f"{path.name}: stopped after {TOO_LONG * slow:.0f} s", flush=True)
                process.kill()


def test(paths, seed, slow):
    "Run lessons in a random order and print how each went; whether all passed."
    seconds = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}  # of lessons that do not run now
    as_tested = {path: stamps.stamp(path) for path in paths}  # they may be edited meanwhile
    print(f"{len(paths)} lessons in a random order, seed {seed}", flush=True)
    print(f"this machine takes {slow:.2f} times as long as the one that the limits were set on", flush=True)
    random.Random(seed).shuffle(paths)
    import_libraries()
    failed = []
    for path, found, own_seconds in run_all(paths, slow):
        seconds[path.stem] = round(own_seconds / slow, 1)
        print(f"{path.name}: {own_seconds:.1f} s{', FAILED' if found else ''}", flush=True)
        for sentence in found:
            print(f"  {sentence}", flush=True)
        if found:
            failed.append(path.name)
        else:
            stamps.keep({path: as_tested[path]})
    SECONDS.write_text(json.dumps(seconds, indent=1, sort_keys=True) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}; again in this order: .ci/lessons.py --seed {seed}")
    return not failed


def main():
    "Serve the command line; the exit code."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="lessons (default: all)")
    parser.add_argument("--seed", type=int, help="of the order (default: another one each time)")
    parser.add_argument("--changed", action="store_true", help="only what could have changed since it passed")
    parser.add_argument("--slowness", type=float, help="of this machine (default: it is measured)")
    options = parser.parse_args()
    one_thread()
    paths = [path.resolve() for path in options.paths] or notebooks()
    if options.changed:
        paths = stamps.changed(paths)
    seed = random.randrange(10_000) if options.seed is None else options.seed
    os.chdir(NBS)
    return 0 if test(paths, seed, options.slowness or slowness()) else 1


if __name__ == "__main__":
    sys.exit(main())
