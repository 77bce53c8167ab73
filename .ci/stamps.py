"""What could have changed since it last passed: a stamp for each lesson and each file of tests.

A stamp is a hash of everything that a lesson or a file of tests can reach: the file, the modules of the
package that it imports, directly or through others, and what all of them share (pinned packages, weights,
records, run notebooks, helpers of tests). While the hash is the same, the outcome is.
Stamps lie in `.stamps.json`, outside of git, and are used by `make test CHANGED=1` alone.
"""

import ast
import functools
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusevae"
STAMPS = ROOT / ".stamps.json"

# what any lesson or test may read besides modules
SHARED = (
    "constraints.txt",
    "settings.ini",
    "pyproject.toml",
    "setup.py",
    ".ci/*.py",
    "tests/*.py",
    "diffusevae/weights/*",
    "nbs/runs/**/*",
)


@functools.cache
def file_hash(path):
    "A hash of a file's content; of a notebook, of its cells without their outputs."
    content = path.read_bytes()
    if path.suffix == ".ipynb":
        cells = json.loads(content)["cells"]
        content = json.dumps([[cell["cell_type"], cell["source"]] for cell in cells]).encode()
    return hashlib.sha256(content).hexdigest()


@functools.cache
def shared_hash():
    "A hash of what all lessons and tests share."
    paths = sorted(path for pattern in SHARED for path in ROOT.glob(pattern) if path.is_file())
    return hashlib.sha256("".join(file_hash(path) for path in paths).encode()).hexdigest()


@functools.cache
def public_names():
    "The modules of the package by the public names that they define: `from diffusevae import …` finds them."
    homes = {}
    for path in PACKAGE.rglob("*.py"):
        found = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.M | re.S)
        for name in ast.literal_eval(found[1]) if found else []:
            homes[name] = path
    return homes


def module_file(dotted):
    "The file of a module of the package, `diffusevae.core.images`; None for any other name."
    path = ROOT.joinpath(*dotted.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_relative_to(PACKAGE) and file.is_file():
            return file
    return None


def imported(source, package):
    "The files of the package that some code imports; `package` is the dotted package that it is part of."
    files = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            files |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            files.add(module_file(base))
            for alias in node.names:  # a module of a sub-package, or a name at the front door
                files.add(module_file(f"{base}.{alias.name}"))
                if base == "diffusevae":
                    files.add(public_names().get(alias.name))
    return files - {None}


@functools.cache
def module_imports(path):
    "The files of the package that one of its modules imports."
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imported(path.read_text(encoding="utf-8"), package)


def code_of(path):
    "The code of a file of tests or of a notebook, without lines that only IPython understands."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in code.splitlines())


def reached(path):
    "All files of the package that a lesson or a file of tests imports, directly or through others."
    found = set()
    waiting = imported(code_of(path), "")
    while waiting:
        found |= waiting
        waiting = set().union(*(module_imports(file) for file in waiting)) - found
    return found


def stamp(path):
    "The stamp of a lesson or a file of tests."
    hashes = [file_hash(path), *sorted(file_hash(file) for file in reached(path)), shared_hash()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def kept():
    "The stamps of what has passed, by path from the top level."
    return json.loads(STAMPS.read_text()) if STAMPS.is_file() else {}


def changed(paths):
    "Those of `paths` that could have changed since they last passed."
    stamps = kept()
    return [path for path in paths if stamps.get(path.relative_to(ROOT).as_posix()) != stamp(path)]


def keep(passed):
    """Remember the stamps of what has passed, {path: stamp}.

    They are those from before the run, since files may be edited while it lasts.
    """
    named = {path.relative_to(ROOT).as_posix(): own for path, own in passed.items()}
    STAMPS.write_text(json.dumps({**kept(), **named}, indent=1, sort_keys=True) + "\n")
