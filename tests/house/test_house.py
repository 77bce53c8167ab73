"""The house rules: what a lesson must have, which way imports point, what is documented.

Every failure names the place.

How things are counted: words are what stands between blanks in Markdown cells. Assertions are `assert`
statements and calls of `test_*` helpers in cells that are not exported. No rule counts the lines of a
function, a class or a module, or the cells of a lesson.
"""

import ast
import json
import re
import statistics
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "diffusevae"
SECONDS = ROOT / ".seconds.json"  # written by `.ci/lessons.py`
WIDGET = "application/vnd.jupyter.widget-view+json"

# what the lessons promise, whatever other widgets there are
PROMISED_WIDGETS = {
    "schedule",
    "forward",
    "attention",
    "trajectory",
    "quality",
    "guidance",
    "digits",
    "walk",
    "refine",
    "traversal",
    "layers",
    "clouds",
    "swap",
    "control_walk",
    "attributes",
    "gate",
    "asking",
}

FEWEST_WORDS = 1000
FEWEST_ASSERTIONS = 8
BYTES = 1_000_000
SECONDS_EACH = 45
SECONDS_MEAN = 10
# every room draws, refuses wrong values and can be rebuilt from its config, before it is explained how
EXPLAINED_LATER = {"core.plots", "core.parameters", "core.checkpoints"}

# which sub-packages each one may import; "" is diffusevae itself, where cli.py lives
UP_TO_HYBRID = {"core", "autoencoders", "diffusion", "hybrid"}
MAY_IMPORT = {
    "core": {"core"},
    "evaluation": {"core", "evaluation"},
    "course": {"core", "evaluation", "course"},
    "autoencoders": {"core", "autoencoders"},
    "diffusion": {"core", "autoencoders", "diffusion"},
    "hybrid": UP_TO_HYBRID,
    "efficiency": UP_TO_HYBRID | {"efficiency"},
    "": {"core", "evaluation", "course", ""},
}


# ---------------------------------------------------------------- reading


class Cell:
    "A notebook's cell; for code, whether it is `exported`, and its syntax `tree`."

    def __init__(self, raw):
        self.id = raw["id"]
        self.kind, self.source, self.outputs = (
            raw["cell_type"],
            "".join(raw["source"]),
            raw.get("outputs", []),
        )
        directives = re.findall(r"^#\s*\|\s*(\S+)", self.source, re.M) if self.kind == "code" else []
        self.exported = any(d in ("export", "exports", "exporti") for d in directives)
        self.lines = [line for line in self.source.splitlines() if not re.match(r"#\s*\|", line)]

    @cached_property
    def tree(self):
        return ast.parse("\n".join("" if re.match(r"\s*[%!]", line) else line for line in self.lines))

    @property
    def assertions(self):
        nodes = list(ast.walk(self.tree))
        plain = [n for n in nodes if isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant)]
        return len(plain) + sum(called(n).startswith("test_") for n in nodes if isinstance(n, ast.Call))

    @property
    def pictures(self):
        return [o for o in self.outputs if any(k.startswith("image/") for k in o.get("data", {}))]


class Lesson:
    "A teaching notebook."

    def __init__(self, path):
        self.path = path
        self.cells = [Cell(c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        self.markdown = [c for c in self.cells if c.kind == "markdown"]
        self.code = [c for c in self.cells if c.kind == "code"]
        self.exported = [c for c in self.code if c.exported]
        self.shown = [c for c in self.code if not c.exported]

    @property
    def number(self):
        "Chapter and section: (4, 5) for `nbs/4_diffusion/05_dit.ipynb`."
        return int(self.path.parent.name[0]), int(self.path.stem[:2])

    @property
    def module(self):
        "The dotted name that it exports to, without the package's: `core.images`; None for no export."
        return next(
            (m[1] for c in self.code if (m := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", c.source, re.M))),
            None,
        )

    @property
    def definitions(self):
        return [
            n
            for c in self.exported
            for n in c.tree.body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]

    @property
    def public(self):
        "Names that it exports: functions, classes and constants without a leading underscore."
        assigned = [
            n for c in self.exported for n in c.tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
        ]
        targets = [t for n in assigned for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
        names = [n.name for n in self.definitions] + [t.id for t in targets if isinstance(t, ast.Name)]
        return [n for n in names if not n.startswith("_")]

    def section(self, title):
        "Text and code cells from the heading that matches `title` to the next of its level, or ('', [])."
        text, code, level = [], [], 0
        for cell in self.cells:
            if cell.kind == "code" and level:
                code.append(cell)
            for line in cell.source.splitlines() if cell.kind == "markdown" else []:
                heading = re.match(r"(#+)\s+(.*)", line)
                if heading and level and len(heading[1]) <= level:
                    return "\n".join(text), code
                if heading and not level and re.search(title, heading[2], re.I):
                    level = len(heading[1])
                text += [line] if level else []
        return "\n".join(text), code


def called(node):
    "The last part of a called name: `fail` of `test.fail(…)`."
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def dotted(node):
    "`torch.load` of an attribute node, as far as it is made of plain names."
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def words_used(tree):
    "Names and attributes that code mentions."
    return {
        getattr(n, "id", getattr(n, "attr", None))
        for n in ast.walk(tree)
        if isinstance(n, (ast.Name, ast.Attribute))
    }


def imported(tree, package=""):
    """Modules of diffusevae that code imports, without the package's name: `core.images`.

    `package` is that of the code, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "diffusevae"
            )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["diffusevae", *filter(None, package.split("."))]
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            if base.partition(".")[0] == "diffusevae":
                base = base.partition(".")[2]
                known = [".".join(filter(None, [base, a.name])) for a in node.names]
                yield from (k if k in MODULES else base for k in known)


LESSONS = [Lesson(p) for p in sorted(ROOT.glob("nbs/[0-9]_*/[0-9][0-9]_*.ipynb"))]
QUESTIONS = [
    Lesson(p) for p in sorted(ROOT.glob("nbs/[0-9]_*/q[0-9]_*.ipynb"))
]  # answered from records, without a module of their own
SOURCES = {
    p: ast.parse(p.read_text(encoding="utf-8"))
    for p in sorted(LIBRARY.rglob("*.py"))
    if p.name not in ("__init__.py", "_modidx.py")
}
MODULES = {".".join(p.relative_to(LIBRARY).with_suffix("").parts): p for p in SOURCES}
NUMBERS = {lesson.module: lesson.number for lesson in LESSONS if lesson.module}
TESTED_ELSEWHERE = set().union(
    *(
        words_used(ast.parse(p.read_text(encoding="utf-8")))
        for p in ROOT.glob("tests/**/*.py")
        if p != Path(__file__)
    )
)

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda x: x.path.stem)
each_page = pytest.mark.parametrize("lesson", LESSONS + QUESTIONS, ids=lambda x: x.path.stem)
each_question = pytest.mark.parametrize("question", QUESTIONS, ids=lambda x: x.path.stem)


# ---------------------------------------------------------------- a lesson


@each_lesson
def test_size(lesson):
    words = sum(len(c.source.split()) for c in lesson.markdown)
    size = lesson.path.stat().st_size
    assert words >= FEWEST_WORDS, f"{words} words of prose, at least {FEWEST_WORDS} are asked"
    assert size < BYTES, f"{size:,} bytes, less than {BYTES:,} are allowed: fewer or smaller pictures"


@each_lesson
def test_assertions(lesson):
    count = sum(c.assertions for c in lesson.shown)
    assert count >= FEWEST_ASSERTIONS, (
        f"{count} assertions beside the exported cells, at least {FEWEST_ASSERTIONS} are asked"
    )


@each_lesson
def test_every_public_name_is_tested(lesson):
    used = set().union(TESTED_ELSEWHERE, *(words_used(c.tree) for c in lesson.shown if c.assertions))
    untested = [n for n in lesson.public if n not in used]
    assert not untested, f"no cell with an assertion uses {', '.join(untested)}"


@each_lesson
def test_every_public_name_is_documented(lesson):
    bare = [n.name for n in lesson.definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare, f"without a docstring: {', '.join(bare)}"


@each_page
def test_what_if_is_shown(lesson):
    text, code = lesson.section("what if")
    assert text, "no heading with “What if”"
    assert any(c.assertions for c in code), "the “What if” section asserts nothing"
    assert any(c.pictures for c in code), "the “What if” section shows no picture: is it executed?"


@each_page
def test_ends(lesson):
    exercises, _ = lesson.section("exercises")
    assert exercises, "no heading “Exercises”"
    assert len(re.findall(r"^(?:\d+[.)]|[-*])\s", exercises, re.M)) >= 3, (
        "fewer than three exercises, written as a list"
    )
    assert lesson.section("take.?away")[0], "no heading “Take away”"
    assert lesson.section("where (next|it is used)")[0], "no heading “Where next”"


@each_page
def test_equation_with_source(lesson):
    equation, year = re.compile(r"\$[^$]+\$"), re.compile(r"\b(1[89]|20)\d\d\b")
    assert any(equation.search(c.source) and year.search(c.source) for c in lesson.markdown), (
        "no cell has an equation and its source (with the year)"
    )


@each_page
def test_pictures_have_alt_text(lesson):
    mute = [
        o
        for c in lesson.code
        for o in c.pictures
        if not any(
            str(m.get("alt", "")).strip() for m in o.get("metadata", {}).values() if isinstance(m, dict)
        )
    ]
    assert not mute, f"{len(mute)} picture outputs without alt text: show them by Picture(fig, alt)"
    links = [
        m
        for c in lesson.markdown
        for m in re.findall(r"!\[\s*\]\(([^)]*)\)|<img(?![^>]*alt=)[^>]*>", c.source)
    ]
    assert not links, f"images without alt text: {links}"


@each_page
def test_committed_executed(lesson):
    outputs = [o for c in lesson.code for o in c.outputs]
    assert any(c.pictures for c in lesson.code), "no picture among the outputs: run `make export`"
    dark = [c.lines[-1] for c in lesson.shown if c.tree.body and shows(c.tree.body[-1]) and not c.outputs]
    assert not dark, f"cells that show something but have no output, run `make export`: {dark}"
    assert not [o for o in outputs if o["output_type"] == "error"], "an output is an error"
    assert not [o for o in outputs if o.get("name") == "stderr"], (
        "stderr is kept as an output: run `make export`"
    )
    assert not [o for o in outputs if WIDGET in o.get("data", {})], (
        "a widget is kept as an output: run `make export`"
    )


def shows(node):
    "Does a cell that ends with this show a picture or a value? Widgets do too, but are not committed."
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Call):
        return called(value) == "Picture"
    return isinstance(value, (ast.Name, ast.Attribute, ast.Subscript)) and "widget" not in ast.unparse(value)


def test_the_promised_widgets_are_there():
    code = "\n".join(cell.source for lesson in LESSONS for cell in lesson.code)
    assert PROMISED_WIDGETS <= set(re.findall(r"^widget_(\w+) = ", code, re.M))


@pytest.mark.skipif(not SECONDS.is_file(), reason="no .seconds.json: `make test` runs the notebooks first")
def test_seconds():
    "CPU seconds, on the machine that the limits hold for."
    seconds = json.loads(SECONDS.read_text())
    own = {lesson.path.stem: seconds.get(lesson.path.stem) for lesson in LESSONS}
    missing = [name for name, taken in own.items() if taken is None]
    assert not missing, f"not timed, run `.ci/lessons.py`: {missing}"
    long = {name: taken for name, taken in own.items() if taken > SECONDS_EACH}
    assert not long, f"over {SECONDS_EACH} s: {long}"
    average = statistics.mean(own.values())
    assert average <= SECONDS_MEAN, f"{average:.1f} s on average, at most {SECONDS_MEAN} are allowed"


# ---------------------------------------------------------------- a question


def test_the_three_questions_are_asked():
    assert len(QUESTIONS) == 3


@each_question
def test_a_question_is_answered_from_records(question):
    "Read, not trained; every number that the answer gives is computed."
    code = "\n".join(c.source for c in question.code)
    records = re.findall(r'"\.\./(runs/records/\w+\.json)"', code)
    assert records and all((ROOT / "nbs" / r).is_file() for r in records), (
        f"records that are not there: {records}"
    )
    assert not question.module and not {
        called(n) for c in question.code for n in ast.walk(c.tree) if isinstance(n, ast.Call)
    } & {"train", "sample", "sample_pairs"}
    text, answer = question.section("the answer")
    assert any("text/markdown" in o.get("data", {}) for c in answer for o in c.outputs), (
        "the section “The answer” shows no computed text"
    )
    assert not re.search(r"\d\.\d", text), "numbers in “The answer” must come from the record"
    assert question.path.stat().st_size < BYTES


# ---------------------------------------------------------------- the house


CHAPTERS = {
    "start": 0,
    "core": 1,
    "evaluation": 2,
    "autoencoders": 3,
    "diffusion": 4,
    "hybrid": 5,
    "efficiency": 6,
    "course": 7,
}


@each_lesson
def test_notebook_mirrors_module(lesson):
    chapter = lesson.path.parent.name[2:]
    assert lesson.number[0] == CHAPTERS[chapter], f"{chapter} is chapter {CHAPTERS[chapter]}"
    stem = lesson.path.stem[3:]
    assert lesson.module in (f"{chapter}.{stem}", "cli"), f"exports {lesson.module}, not {chapter}.{stem}"


def test_sections_count_from_one_in_each_chapter():
    for chapter in {lesson.number[0] for lesson in LESSONS}:
        sections = sorted(lesson.number[1] for lesson in LESSONS if lesson.number[0] == chapter)
        expected = list(range(1, len(sections) + 1))
        assert sections == expected, (
            f"chapter {chapter} has sections {sections}; run `.ci/notebooks.py renumber`"
        )


@each_page
def test_cells_are_called_by_name_and_never_by_number(lesson):
    name = re.sub(r"^\d\d_", "", lesson.path.stem).replace("_", "-")
    ids = [cell.id for cell in lesson.cells]
    strange = [i for i in ids if not re.fullmatch(rf"{name}-[a-z0-9-]+", i)]
    assert not strange, f"cell ids begin with the notebook's name, {name!r}, and with no number: {strange}"
    assert len(set(ids)) == len(ids), "two cells have one id"


def test_no_module_twice():
    names = [lesson.module for lesson in LESSONS]
    assert len(set(names)) == len(names), (
        f"a module twice: {sorted({n for n in names if names.count(n) > 1})}"
    )


def test_no_public_name_twice():
    "`from diffusevae import NAME` can mean one thing only."
    homes = {}
    for module in MODULES:
        for name in exported_by(module):
            homes.setdefault(name, []).append(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice, f"public names that stand for two things: {twice}"


def exported_by(module):
    "The names in a module's `__all__`."
    for node in SOURCES[MODULES[module]].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


FEW_PARAMETERS = 4


@each_lesson
def test_parameters_are_documented_where_they_stand(lesson):
    "Beyond four, each parameter has a line of its own, with a comment that says what it is."
    bare = []
    for cell in lesson.exported:
        for node in ast.walk(cell.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                bare += [f"{node.name}({name})" for name in uncommented(node.args, cell.lines)]
    assert not bare, f"parameters without a comment on their own line: {', '.join(bare)}"


def uncommented(arguments, lines):
    "The parameters of a long signature that share a line or have no comment; none for a short one."
    given = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    given = [a for a in given if a.arg not in ("self", "cls")]
    if len(given) <= FEW_PARAMETERS:
        return []
    rows = [a.lineno for a in given]
    commented = [re.search(r"#\s*\S", lines[row - 1]) is not None for row in rows]
    return [a.arg for a, row, said in zip(given, rows, commented) if not said or rows.count(row) > 1]


def test_every_module_has_its_notebook():
    assert set(MODULES) == set(NUMBERS), f"without its twin: {sorted(set(MODULES) ^ set(NUMBERS))}"


def test_imports_point_one_way():
    wrong = []
    for name, path in MODULES.items():
        package = name.rpartition(".")[0]
        for other in imported(SOURCES[path], package):
            if other and other.split(".")[0] not in MAY_IMPORT[package] and other not in MAY_IMPORT[package]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "; ".join(wrong)


@each_lesson
def test_imports_only_what_comes_before(lesson):
    package = (lesson.module or "").rpartition(".")[0]
    later = {
        m
        for c in lesson.code
        for m in imported(c.tree, package)
        if NUMBERS.get(m, (0, 0)) > lesson.number and m not in EXPLAINED_LATER
    }
    assert not later, f"imports later rooms: {', '.join(sorted(later))}"


# ---------------------------------------------------------------- what the library may not do


def found(test, except_in=()):
    "The places in the library where `test(node)` holds, as file:line."
    places = [
        (name, n)
        for name, p in MODULES.items()
        if name not in except_in
        for n in ast.walk(SOURCES[p])
        if test(n)
    ]
    return [f"{name}:{n.lineno} {ast.unparse(n)[:60]}" for name, n in places]


def test_core_devices_alone_names_devices():
    """Anything else is given a device or follows its tensors.

    What is stored in files is on the CPU, so core.checkpoints and `map_location` may say so.
    """

    def accelerator(node):
        named = (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"(cuda|mps)(:\d+)?", node.value)
        )
        return named or isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps")

    mapped = {
        id(n.value)
        for t in SOURCES.values()
        for n in ast.walk(t)
        if isinstance(n, ast.keyword) and n.arg == "map_location"
    }
    named = found(accelerator, except_in=["core.devices"])
    named += found(
        lambda n: isinstance(n, ast.Constant) and n.value == "cpu" and id(n) not in mapped,
        except_in=["core.devices", "core.checkpoints"],
    )
    assert not named, "; ".join(named)


def test_nothing_is_unpickled():
    "Loading a pickle runs whatever its author wished. Weights from elsewhere are read as tensors."

    def unpickles(node):
        name = dotted(node.func) if isinstance(node, ast.Call) else ""
        tensors_alone = name == "torch.load" and any(
            k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords
        )
        with_pickle = (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and getattr(node.value, "value", True)
        )
        named = name in ("torch.load", "joblib.load", "joblib.dump") or re.match(
            r"(cloud)?pickle\.|dill\.|marshal\.", name
        )
        return named and not tensors_alone or with_pickle

    places = found(unpickles)
    # Inception's file is handed on, as tensors alone, to a library that reads pickles only
    places += found(
        lambda n: isinstance(n, ast.Call) and dotted(n.func) == "torch.save",
        except_in=["evaluation.features"],
    )
    assert not places, "; ".join(places)


def test_to_uint8_alone_rounds():
    "Floats become uint8 in one function; a cast anywhere else would truncate, or round twice."

    def casts(node):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return False
        given = [*node.args, *(k.value for k in node.keywords if k.arg == "dtype")]
        to_bytes = any(ast.unparse(a) in ("torch.uint8", "np.uint8", "numpy.uint8", "'uint8'") for a in given)
        return node.func.attr == "byte" or node.func.attr in ("to", "type", "astype") and to_bytes

    inside = next(
        n
        for n in ast.walk(SOURCES[MODULES["core.pixels"]])
        if isinstance(n, ast.FunctionDef) and n.name == "to_uint8"
    )
    own = {id(n) for n in ast.walk(inside)}
    assert any(casts(n) for n in ast.walk(inside)), (
        "core.pixels.to_uint8 casts no longer where this test looks"
    )
    assert not (places := found(lambda n: casts(n) and id(n) not in own)), "; ".join(places)
