"""nbdev 2 reads settings.ini, nbdev 3 reads `[tool.nbdev]` of pyproject.toml: both have to say the same.

Whether both export the same modules is compared by `.ci/nbdev3.py`, which installs nbdev 3; here its
comparison is tested, which needs nothing installed.
"""

import importlib.util
from configparser import ConfigParser
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest requires tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TABLE = PYPROJECT["tool"]["nbdev"]

parser = ConfigParser()
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]


def script(name):
    """Import a script of `.ci/` by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nbdev3 = script("nbdev3")


# ---------------------------------------------------------------- settings


def setting(key):
    """The value of settings.ini in the type that pyproject.toml has for it."""
    if isinstance(TABLE[key], bool):
        return SETTINGS.getboolean(key)
    if isinstance(TABLE[key], list):
        return SETTINGS[key].split()
    return SETTINGS[key]


@pytest.mark.parametrize("key", sorted(TABLE.keys() & SETTINGS.keys()))
def test_both_say_the_same(key):
    assert TABLE[key] == setting(key), f"{key} of pyproject.toml is not that of settings.ini, which leads"


@pytest.mark.parametrize(
    "key", ["lib_path", "nbs_path", "tst_flags", "update_pyproject", "allowed_cell_metadata_keys"]
)
def test_nbdev_3_is_told(key):
    assert key in TABLE, f"nbdev 3 would take another {key} than settings.ini says"


def test_pictures_keep_their_descriptions():
    assert "image/png" in TABLE["allowed_out_metadata_keys"], "cleaning by nbdev 3 would strip them"


def test_setup_py_leads_the_build():
    assert "project" not in PYPROJECT, "with a table [project], setuptools reads that instead of setup.py"


def test_nbdev_3_is_pinned():
    names = [pin.partition("==")[0] for pin in nbdev3.PINS]
    assert names == ["nbdev", "fastcore", "execnb", "ghapi"]
    assert nbdev3.PINS[0].startswith("nbdev==3.")


def test_nbdev_3_is_compared_by_ci():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert ".ci/nbdev3.py" in workflow


# ---------------------------------------------------------------- comparison


@pytest.fixture
def packages(tmp_path):
    """Two packages of one module each, the same but for comments and the index."""
    ours = tmp_path / "ours"
    theirs = tmp_path / "theirs"
    for folder, comment in ((ours, "#| a cell"), (theirs, "# another header")):
        folder.mkdir()
        (folder / "images.py").write_text(f"{comment}\nx = 1\n\ny = 2\n", encoding="utf-8")
        (folder / "_modidx.py").write_text(f"d = {comment!r}\n", encoding="utf-8")
    return ours, theirs


def test_comments_and_index_do_not_count(packages):
    ours, theirs = packages
    assert nbdev3.differences(ours, theirs) == []


@pytest.mark.parametrize(
    "source, place",
    [("x = 1\ny = 3\n", "line 4"), ("x = 1\n", "line 4"), ("x = 1\ny = 2\nz = 3\n", "the end")],
)
def test_another_syntax_tree_is_found(packages, source, place):
    ours, theirs = packages
    (theirs / "images.py").write_text(source, encoding="utf-8")
    expected = f"diffusevae/images.py: nbdev 3 exports another syntax tree from {place} on"
    assert nbdev3.differences(ours, theirs) == [expected]


def test_missing_and_additional_modules_are_found(packages):
    ours, theirs = packages
    (theirs / "images.py").rename(theirs / "pictures.py")
    assert nbdev3.differences(ours, theirs) == [
        "diffusevae/images.py: nbdev 3 does not export it",
        "diffusevae/pictures.py: nbdev 3 alone exports it",
    ]
