"""Export the notebooks by nbdev 3 and compare the modules with `diffusevae/`, which nbdev 2 has written.

nbdev 3 needs other versions of its companions than nbdev 2, so it gets a virtual environment of its own.
It exports a copy: the checkout stays as it is. Both versions have to give the same files with the same
syntax trees; comments, and with them the headers of cells, do not count, nor does the index `_modidx.py`.

    python .ci/nbdev3.py                     environment and copy in a temporary folder
    python .ci/nbdev3.py --venv ~/nbdev3     the environment stays there for the next time
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diffusevae"

# tested together; the last three release often, and a new one may break an old nbdev
PINS = ["nbdev==3.3.26", "fastcore==2.2.41", "execnb==0.3.4", "ghapi==2.1.4"]


# ---------------------------------------------------------------- exporting


def install(folder):
    """Set up a virtual environment with nbdev 3 in `folder`, where there is none yet; return its `bin`."""
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    if not programs.is_dir():
        venv.create(folder, with_pip=True)
    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", *PINS], check=True)
    return programs


def copy_sources(folder):
    """Copy what nbdev 3 reads to `folder`: notebooks, settings, and the version in `__init__.py`."""
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    (folder / PACKAGE).mkdir()
    shutil.copy(ROOT / PACKAGE / "__init__.py", folder / PACKAGE)


def export(programs, folder):
    """Let nbdev 3 export the notebooks of `folder`; return the folder of the package."""
    subprocess.run([programs / "nbdev-export"], cwd=folder, check=True)
    return folder / PACKAGE


# ---------------------------------------------------------------- comparing


def modules(package):
    """Map the names of a package's modules, as `core/images.py`, to their files."""
    files = sorted(path for path in package.rglob("*.py") if path.name != "_modidx.py")
    return {path.relative_to(package).as_posix(): path for path in files}


def first_difference(committed, exported):
    """Say where the statements of two files begin to differ, `line 12` of the first; None if nowhere."""
    ours = ast.parse(committed.read_text(encoding="utf-8")).body
    theirs = ast.parse(exported.read_text(encoding="utf-8")).body
    for our_statement, their_statement in zip_longest(ours, theirs):
        if our_statement is None:
            return "the end"
        if their_statement is None or ast.dump(our_statement) != ast.dump(their_statement):
            return f"line {our_statement.lineno}"
    return None


def differences(committed, exported):
    """List how the package `exported` differs from the package `committed`, one line for each module."""
    ours = modules(committed)
    theirs = modules(exported)
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            found.append(f"{PACKAGE}/{name}: nbdev 3 does not export it")
        elif name not in ours:
            found.append(f"{PACKAGE}/{name}: nbdev 3 alone exports it")
        else:
            place = first_difference(ours[name], theirs[name])
            if place is not None:
                found.append(f"{PACKAGE}/{name}: nbdev 3 exports another syntax tree from {place} on")
    return found


# ---------------------------------------------------------------- the command


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="keep nbdev 3 in this folder, or use the one that is there")
    return parser.parse_args()


def main():
    """Export, compare, print the differences; exit code 1 if there are any."""
    chosen = arguments().venv
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "kit"
        programs = install((chosen or Path(temporary) / "venv").resolve())
        copy.mkdir()
        copy_sources(copy)
        found = differences(ROOT / PACKAGE, export(programs, copy))
    for line in found:
        print(line)
    if not found:
        print(f"{PINS[0]} exports the same {len(modules(ROOT / PACKAGE))} modules")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
