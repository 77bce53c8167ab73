"""The project as a whole: exported, clean, importable without its tools, installable, written down once."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LEFT_OUT = (
    ".venv",
    ".git",
    "runs",
    "data",
    "build",
    "dist",
    "__pycache__",
    ".pytest_cache",
    ".ipynb_checkpoints",
)

config = ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def call(*command, cwd=ROOT, **environment):
    "Run a command; what it printed. Fails with its output."
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} in {cwd}: {done.returncode}\n{done.stdout}"
    return done.stdout


def files(*folders):
    "Bytes of the files under folders, by path relative to the first one's parent."
    found = (
        p for folder in folders for p in ([folder] if folder.is_file() else folder.rglob("*")) if p.is_file()
    )
    return {
        p.relative_to(folders[0].parent).as_posix(): p.read_bytes()
        for p in found
        if not set(LEFT_OUT[5:]) & set(p.parts)
    }


@pytest.fixture
def checkout(tmp_path):
    "A copy of the checkout to work on."
    top = {n for n in LEFT_OUT[:6]}

    def ignore(folder, names):
        return [
            n
            for n in names
            if n in LEFT_OUT[6:] or n.endswith(".egg-info") or (Path(folder) == ROOT and n in top)
        ]

    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignore))


# ---------------------------------------------------------------- one source


def test_export_and_clean_leave_no_difference(checkout):
    before = files(checkout / "nbs", checkout / "diffusevae", checkout / "README.md")
    for path in (checkout / "diffusevae").rglob(
        "*.py"
    ):  # so that a module without a notebook is missing afterwards
        path.unlink()
    call(sys.executable, checkout / ".ci" / "notebooks.py", "export", "--no-execute", cwd=checkout)
    after = files(checkout / "nbs", checkout / "diffusevae", checkout / "README.md")
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"`.ci/notebooks.py export --no-execute` changes {', '.join(changed)}"


def test_readme_is_not_stale():
    call(sys.executable, ROOT / ".ci" / "notebooks.py", "readme", "--check")


def test_readme_is_found_stale(checkout):
    with open(checkout / "README.md", "a") as f:
        f.write("one more word\n")
    done = subprocess.run(
        [sys.executable, checkout / ".ci" / "notebooks.py", "readme", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "README.md is stale" in done.stderr


def test_links_of_the_front_page_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    lost = [
        link
        for link in links
        if not re.match(r"[a-z]+:|#", link) and not (ROOT / link.partition("#")[0]).exists()
    ]
    assert len(links) > 5 and not lost, f"README.md points to {lost}"


def test_nothing_calls_quarto():
    "Quarto is not on every machine, and these commands of nbdev call it."
    calls = re.compile(r"\bquarto\b|nbdev_(readme|docs|prepare|proc_nbs|preview|sidebar|install_quarto)\b")
    places = [
        ROOT / "Makefile",
        ROOT / "setup.py",
        *(p for top in (".ci", ".github", "nbs", "diffusevae") for p in (ROOT / top).rglob("*")),
    ]
    texts = {
        p: p.read_text(encoding="utf-8")
        for p in places
        if p.is_file() and p.suffix in ("", ".py", ".yml", ".yaml", ".ipynb", ".ini")
    }
    assert texts and not (callers := [str(p) for p, text in texts.items() if calls.search(text)]), callers


# ---------------------------------------------------------------- the library alone

BARE = """
import importlib, importlib.abc, pkgutil, re, sys
sys.path.insert(0, {root!r})
tools = re.compile(
    r"(nbdev|fastcore|execnb|ghapi|IPython|ipykernel|ipywidgets|jupyter\\w*|notebook"
    r"|nbformat|nbclient|nbconvert|papermill|pytest)$"
)

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if tools.match(name.partition(".")[0]):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import diffusevae
assert diffusevae.__path__[0].startswith({root!r}), diffusevae.__path__
names = [m.name for m in pkgutil.walk_packages(diffusevae.__path__, "diffusevae.")]
for name in names:
    importlib.import_module(name)
there = [m for m in sys.modules if tools.match(m)]
assert not there, there
print(len(names))
"""


def test_every_module_imports_in_a_bare_interpreter(tmp_path):
    count = int(call(sys.executable, "-I", "-c", BARE.format(root=str(ROOT)), cwd=tmp_path).split()[-1])
    assert count >= len([p for p in (ROOT / "diffusevae").rglob("*.py") if p.name != "__init__.py"])


def test_console_script(tmp_path):
    assert "usage: diffusevae" in call(BIN / "diffusevae", "--help", cwd=tmp_path)
    assert "train_ddpm" in call(BIN / "diffusevae", "list", cwd=tmp_path)


# ---------------------------------------------------------------- what is installed


def test_wheel(checkout, tmp_path):
    "Built from the source distribution, which is complete: modules, run notebooks, recipes, weights."
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = {n: z.read(n) for n in z.namelist() if not n.endswith("/")}
    package = {n: data for n, data in inside.items() if ".dist-info/" not in n}
    expected = files(ROOT / "diffusevae")
    for path, data in files(ROOT / "nbs" / "runs").items():
        if path.endswith((".ipynb", ".yaml")):
            expected[path.replace("runs/", "diffusevae/notebooks/", 1)] = data
    assert sorted(package) == sorted(expected)
    assert all(package[n] == data for n, data in expected.items())

    about = {Path(n).name: data.decode() for n, data in inside.items() if ".dist-info/" in n}
    metadata = Parser().parsestr(about["METADATA"])
    assert (
        metadata["Version"] == SETTINGS["version"]
        and metadata["Requires-Python"] == f">={SETTINGS['min_python']}"
    )
    required = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    assert {r.name for r in required if not r.marker} == {
        Requirement(r).name for r in SETTINGS["requirements"].split()
    }
    assert {r.name for r in required if r.marker} == {
        Requirement(r).name for r in SETTINGS["dev_requirements"].split()
    }
    assert (
        SETTINGS["console_scripts"].replace("=", " = ", 1) in about["entry_points.txt"]
        and {"LICENSE", "LICENSE-lessons"} <= about.keys()
    )

    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    code = (
        "import diffusevae.core.parameters as p\n"
        "print(p.__file__, *sorted(path.name for path in p.notebooks_folder().iterdir()))"
    )
    where, *names = call(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert where.startswith(str(tmp_path / "site")) and "recipes" in names and "train_vae.ipynb" in names


def test_no_second_copy():
    assert not list((ROOT / "diffusevae").rglob("*.ipynb")) and not list(
        (ROOT / "diffusevae").rglob("*.yaml")
    )


# ---------------------------------------------------------------- written down once


def test_settings_agree():
    from importlib.metadata import version

    import diffusevae

    assert diffusevae.__version__ == SETTINGS["version"] == version("diffusevae"), (
        "run `make export`, or pip install -e . again"
    )
    assert "tags" in SETTINGS["allowed_cell_metadata_keys"].split(), "cleaning would strip papermill's tag"
    build = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert build.strip('"') in SETTINGS["dev_requirements"].split(), (
        f"{build} of pyproject.toml is what a build without isolation needs too"
    )


def test_constraints_fit_the_requirements():
    pins = {canonicalize_name(c.name): c for c in CONSTRAINTS}
    assert len(pins) == len(CONSTRAINTS) and all(
        len(c.specifier) == 1 and "==" in str(c.specifier) and not c.url for c in CONSTRAINTS
    )
    for text in (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split():
        wanted = Requirement(text)
        pin = next(iter(pins[canonicalize_name(wanted.name)].specifier))
        assert wanted.specifier.contains(pin.version), f"{wanted} is not met by {pin} of constraints.txt"


def test_development_tools_are_no_requirements():
    needed = {Requirement(r).name for r in SETTINGS["requirements"].split()}
    tools = {Requirement(r).name: r for r in SETTINGS["dev_requirements"].split()}
    assert not needed & set(tools)
    assert all(tools[name] != name for name in ("nbdev", "fastcore", "execnb", "ghapi")), (
        "nbdev 2 runs with these versions only"
    )


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_sets_up_what_is_missing_or_old(checkout):
    def plan(target):
        return call("make", "-n", target, cwd=checkout)

    for target in ("demo", "test", "lab", "export"):
        assert "-m venv .venv" in plan(target) and "-e '.[dev]'" in plan(target), target
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    assert "-m venv" not in plan("demo") and "study demo --out runs/demo" in plan("demo")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        os.utime(checkout / ".venv" / ".installed", (1e9, 1e9))
        for other in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
            os.utime(checkout / other, (2e9 if other == name else 9e8,) * 2)
        assert "-e '.[dev]'" in plan("test"), name
    listed = call("make", cwd=checkout)
    assert all(f"make {target}" in listed for target in ("demo", "test", "lab", "export"))


def test_ci_does_what_make_test_does():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\nmake test") and os.access(
        ROOT / ".ci" / "run", os.X_OK
    )
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "test.yml").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/runs/records/*.json")), ids=lambda p: p.stem)
def test_records_are_json_to_every_reader(path):
    "NaN and Infinity are Python's own; other readers stop there."
    json.loads(
        path.read_text(encoding="utf-8"),
        parse_constant=lambda constant: pytest.fail(f"{constant} in {path.name}"),
    )
