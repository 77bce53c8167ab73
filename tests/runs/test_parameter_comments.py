"""The comments of parameters: where one is a field of `Settings` or `Walk`, notebook and class say the same.

The block of training settings stands in nine notebooks, and that of a walk in four, since each must work as
it stands. This holds the copies to the classes.
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
from diffusevae.diffusion.samplers import Walk

NOTEBOOKS = sorted(notebooks_folder().glob("*.ipynb"))
TRAINING = [path for path in NOTEBOOKS if "run.arguments_for(Settings)" in path.read_text(encoding="utf-8")]

WALKING = [path for path in NOTEBOOKS if "Walk(**" in path.read_text(encoding="utf-8")]
CLASSES = [(path, Settings) for path in TRAINING] + [(path, Walk) for path in WALKING]

# Parameters with a meaning of their own
OTHER_MEANING = {
    ("train_latent_ddpm", "flip"),  # the mirrored images are among the latents: training flips none
    ("refine", "start"),  # a parameter has no None: -1 stands for it
}


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


@pytest.mark.parametrize("cls", [Settings, Walk])
def test_every_field_has_a_comment(cls):
    comments = field_comments(cls)
    assert comments.keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(comments.values()), comments


def test_all_training_notebooks_are_looked_at():
    assert {path.stem for path in NOTEBOOKS if path.stem.startswith("train_")} == {p.stem for p in TRAINING}


def test_all_notebooks_that_walk_are_looked_at():
    assert {path.stem for path in WALKING} == {"sample", "evaluate", "interpolate", "refine"}


@pytest.mark.parametrize(
    "path, cls", CLASSES, ids=lambda of: getattr(of, "stem", getattr(of, "__name__", ""))
)
def test_a_parameter_is_described_as_in_the_class(path, cls):
    fields = field_comments(cls)
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
