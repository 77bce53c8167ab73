"""All tests: every lesson once, what is timed, then whole runs, peers, faults and a browser.

    python .ci/test.py                 everything, as CI does
    python .ci/test.py --changed       only what could have changed since it last passed here

Prints how long it took, in minutes and in yardstick minutes: those of the machine that limits hold for.
"""

import argparse
import os
import subprocess
import sys
import time

from notebooks import ROOT
from yardstick import WORKERS, slowness

SPEED = "tests/peers/test_speed.py"  # compares times, so nothing else may run beside it


def parts(changed, slow):
    "The parts of the tests as (name, arguments of python, its own environment)."
    only_changed = ["--changed"] if changed else []
    pytest = ["-m", "pytest", *only_changed]
    several = ["-n", str(WORKERS), "--dist", "loadfile", "--ignore", SPEED, "tests"]
    return (
        ("lessons", [".ci/lessons.py", "--slowness", str(slow), *only_changed], {}),
        ("speed", [*pytest, SPEED], {}),
        ("whole runs, rooms, peers, browser", [*pytest, *several], {"OMP_NUM_THREADS": "1"}),
    )


def run(name, arguments, environment):
    "Run one part and print its minutes; whether it passed."
    print(f"---- {name}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment})
    print(f"---- {name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)
    # pytest's 5: no test was left to run
    return done.returncode == 0 or (done.returncode == 5 and "pytest" in arguments)


def main():
    "Serve the command line; what `sys.exit` takes."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changed", action="store_true", help="only what could have changed since it passed")
    changed = parser.parse_args().changed
    if changed and os.environ.get("CI"):
        return "CI runs all tests: leave CHANGED out there"
    slow = slowness()
    started = time.monotonic()
    failed = [part[0] for part in parts(changed, slow) if not run(*part)]
    minutes = (time.monotonic() - started) / 60
    slow = max(slow, slowness())  # other work may have come meanwhile
    print(
        f"test took {minutes:.1f} min, {minutes / slow:.1f} yardstick minutes: "
        f"this machine is {slow:.2f} times slower than the one that limits are set on"
    )
    return f"failed: {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
