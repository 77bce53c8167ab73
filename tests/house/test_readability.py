"""How densely the exported package is written: three limits, and how `.ci/readability.py` counts."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name):
    """Import a script of `.ci/` by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readability = script("readability")


@pytest.fixture(scope="module")
def exceeded():
    """The limits that the package exceeds, each with its sentence."""
    return readability.over_limits(readability.measure(ROOT / "diffusevae"))


def test_no_line_is_wider_than_110_columns(exceeded):
    assert "columns" not in exceeded, exceeded["columns"]


def test_few_lines_have_more_than_30_tokens(exceeded):
    assert "tokens" not in exceeded, exceeded["tokens"]


def test_few_assignments_fold_two_into_one(exceeded):
    assert "tuples" not in exceeded, exceeded["tuples"]


# ---------------------------------------------------------------- how it counts

SAMPLE = '''"""A docstring."""

__all__ = ["f"]

# a comment
def f(x):
    """Another one,

    of three lines."""
    a, b = x, 1
    c, d = x
    return f"{a} {b} {c} {d}"
'''


@pytest.fixture
def sample(tmp_path):
    """A package of one module, beside files that are left out."""
    (tmp_path / "f.py").write_text(SAMPLE, encoding="utf-8")
    for name in readability.LEFT_OUT:
        (tmp_path / name).write_text("a, b = 1, 2\n", encoding="utf-8")
    return tmp_path


def test_counts_code_lines_and_their_tokens(sample):
    package = readability.measure(sample)
    tokens = [(line.text.split()[0], line.tokens) for line in package.code]
    # an f-string is one token, docstrings and comments are no code
    assert tokens == [("__all__", 5), ("def", 6), ("a,", 7), ("c,", 5), ("return", 2)]
    assert package.lines == 12 and len(package.modules) == 1


def test_counts_functions_and_tuple_assignments(sample):
    package = readability.measure(sample)
    assert package.function_lines() == (7, 7)
    # `c, d = x` takes one value apart
    assert package.tuple_assignments == [f"{sample.name}/f.py:10"]
    assert package.tuples_per_1000 == 200


def test_names_the_places_over_a_limit(sample):
    wide = f"# {'x' * 110}\n"
    generated = f"__all__ = ['{'x' * 110}']\n"
    dense = "y = [" + "0, " * 20 + "0]\n"
    (sample / "g.py").write_text(generated + wide + dense, encoding="utf-8")
    exceeded = readability.over_limits(readability.measure(sample))
    assert set(exceeded) == {"columns", "tokens", "tuples"}
    assert exceeded["columns"].endswith(f"more than 110 columns: {sample.name}/g.py:2")
    assert exceeded["tokens"].endswith(f"{sample.name}/g.py:3")
    assert exceeded["tuples"].endswith(f"{sample.name}/f.py:10")


def test_readable_code_exceeds_no_limit(tmp_path):
    (tmp_path / "plain.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    assert not readability.over_limits(readability.measure(tmp_path))
