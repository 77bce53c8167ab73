"""The comments in `parameters` cells: where a run's parameter is a field of `Settings`, both say the same.

The block of training settings stands in nine notebooks, since each must work as it stands.
This holds the copies to the class.
"""

import ast
import dataclasses
import inspect
import io
import json
import tokenize

import pytest

from diffusevae.core.parameters import notebooks_folder, parameters_of
from diffusevae.core.training import Settings

NOTEBOOKS = sorted(notebooks_folder().glob("*.ipynb"))
TRAINING = [path for path in NOTEBOOKS if "run.arguments_for(Settings)" in path.read_text(encoding="utf-8")]

# Parameters with a meaning of their own: the mirrored images are among the latents, training flips none.
OTHER_MEANING = {("train_latent_ddpm", "flip")}


def field_comments(cls):
    """The comment on the lines of each field of a dataclass, by the field's name."""
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def test_every_field_of_the_settings_has_a_comment():
    comments = field_comments(Settings)
    assert comments.keys() == {field.name for field in dataclasses.fields(Settings)}
    assert all(comments.values()), comments


def test_all_training_notebooks_are_looked_at():
    assert {path.stem for path in NOTEBOOKS if path.stem.startswith("train_")} == {p.stem for p in TRAINING}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_setting_is_described_as_in_the_class(path):
    fields = field_comments(Settings)
    wrong = []
    for name, parameter in parameters_of(path).items():
        if name in fields and (path.stem, name) not in OTHER_MEANING and parameter.help != fields[name]:
            wrong.append(f"{name}: {parameter.help!r}, not {fields[name]!r}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_comment(path):
    """`diffusevae list NOTEBOOK` prints it. A formatter that breaks a long line would hide it in brackets."""
    bare = [name for name, parameter in parameters_of(path).items() if not parameter.help]
    assert not bare, f"without a comment at the end of the line: {', '.join(bare)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_notebooks_are_committed_unexecuted(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
