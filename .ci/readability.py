"""Measure how densely Python is written: wide lines, crowded lines, long functions, tuple assignments.

    python .ci/readability.py                        the exported package, its figures and densest lines
    python .ci/readability.py PATH …                 any other folders of Python, measured the same way
    python .ci/readability.py --check                exit code 1 where the package is over a limit
    python .ci/readability.py --draw 12 --seed 3     twelve functions at random, to be read

How it counts:

- A module is a `*.py` file; `__init__.py` and nbdev's index `_modidx.py` are left out.
- A code line is a line on which a token of the code starts. Blank lines, comments and docstrings are none,
  nor are the inner lines of a string. All shares are shares of the code lines.
- Tokens are those of `tokenize`: names, numbers, strings, operators, brackets, commas. An f-string is one
  token, as any other string, also from Python 3.12 on, whose tokenizer takes it apart.
- A function's lines are those from `def` to its end, with docstring and blank lines, without decorators;
  methods and inner functions count too. Of all functions the median and the length at 90 % are given.
- A tuple assignment is `a, b = c, d`: a tuple on both sides, of the same length. `a, b = pair` is none.
- The limit of 110 columns holds for every line that somebody has written: code, comments and docstrings.
  `__all__` is nbdev's and may be wider.
"""

import argparse
import ast
import io
import math
import random
import statistics
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("__init__.py", "_modidx.py")

# limits of the package
COLUMNS = 110
TOKENS = 30
DENSE_PERCENT = 2
TUPLES_PER_1000 = 15

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


# ---------------------------------------------------------------- one module


@dataclass
class Line:
    """A code line: where it stands, how many tokens it has, and its text."""

    place: str
    tokens: int
    text: str


@dataclass
class Function:
    """A function or method: where it stands, how many lines it has, and its source with decorators."""

    place: str
    name: str
    lines: int
    source: str


@dataclass
class Module:
    """What is counted in one file."""

    lines: int
    code: list[Line]
    functions: list[Function]
    # places of `a, b = c, d`
    tuple_assignments: list[str]
    # places of lines over 110 columns, comments and docstrings too
    too_wide: list[str]


def docstring_lines(tree):
    """Return the numbers of the lines that belong to docstrings."""
    numbers = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def lines_of_all(tree):
    """Return the numbers of the lines of `__all__ = [...]`."""
    numbers = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            numbers.update(range(node.lineno, node.end_lineno + 1))
    return numbers


def code_tokens(source):
    """Yield the tokens that are code, an f-string as one."""
    open_strings = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if open_strings == 0 and token.type not in LAYOUT:
            yield token
        # from Python 3.12 on: FSTRING_START, what is inside, FSTRING_END
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            open_strings += 1
        elif kind.endswith("STRING_END"):
            open_strings -= 1


def tokens_by_line(source):
    """Count the tokens that start on each line; lines without any are not listed."""
    return Counter(token.start[0] for token in code_tokens(source))


def functions_of(tree, texts, name):
    """List the functions and methods of a module in the order in which they stand there."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nodes.sort(key=attrgetter("lineno"))
    found = []
    for node in nodes:
        first = min(part.lineno for part in [node, *node.decorator_list])
        source = "\n".join(texts[first - 1 : node.end_lineno])
        length = node.end_lineno - node.lineno + 1
        found.append(Function(f"{name}:{node.lineno}", node.name, length, source))
    return found


def is_tuple_assignment(node):
    """Tell whether a node is `a, b = c, d`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    return isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts)


def measure_module(path, name):
    """Measure one file; `name` is what places call it."""
    source = path.read_text(encoding="utf-8")
    texts = source.splitlines()
    tree = ast.parse(source)
    docstrings = docstring_lines(tree)
    generated = lines_of_all(tree)

    code = []
    for number, tokens in sorted(tokens_by_line(source).items()):
        if number not in docstrings:
            code.append(Line(f"{name}:{number}", tokens, texts[number - 1]))

    tuples = sorted(node.lineno for node in ast.walk(tree) if is_tuple_assignment(node))

    too_wide = []
    for number, text in enumerate(texts, start=1):
        if len(text) > COLUMNS and number not in generated:
            too_wide.append(f"{name}:{number}")

    return Module(
        lines=len(texts),
        code=code,
        functions=functions_of(tree, texts, name),
        tuple_assignments=[f"{name}:{number}" for number in tuples],
        too_wide=too_wide,
    )


# ---------------------------------------------------------------- a package


@dataclass
class Package:
    """The measured modules of a folder, and the figures of all of them together."""

    name: str
    modules: list[Module]

    @property
    def lines(self):
        """Lines of all modules, blank ones included."""
        return sum(module.lines for module in self.modules)

    @property
    def code(self):
        """All code lines."""
        return [line for module in self.modules for line in module.code]

    @property
    def functions(self):
        """All functions and methods."""
        return [function for module in self.modules for function in module.functions]

    @property
    def tuple_assignments(self):
        """Places of all tuple assignments."""
        return [place for module in self.modules for place in module.tuple_assignments]

    @property
    def too_wide(self):
        """Places of all lines over 110 columns."""
        return [place for module in self.modules for place in module.too_wide]

    @property
    def dense(self):
        """Code lines of more than 30 tokens, the densest first."""
        lines = [line for line in self.code if line.tokens > TOKENS]
        return sorted(lines, key=attrgetter("tokens"), reverse=True)

    @property
    def dense_percent(self):
        """Share of code lines of more than 30 tokens, in percent."""
        return 100 * len(self.dense) / len(self.code)

    @property
    def tuples_per_1000(self):
        """Tuple assignments per 1,000 code lines."""
        return 1000 * len(self.tuple_assignments) / len(self.code)

    def wide_percent(self, columns):
        """Share of code lines over so many columns, in percent."""
        return 100 * sum(len(line.text) > columns for line in self.code) / len(self.code)

    def function_lines(self):
        """Lines of a function: the median, and the length that 90 % of the functions do not exceed."""
        lengths = sorted(function.lines for function in self.functions)
        if not lengths:
            return 0, 0
        return statistics.median(lengths), lengths[math.ceil(0.9 * len(lengths)) - 1]


def measure(folder):
    """Measure the modules of a folder, those of its sub-folders too."""
    paths = [path for path in sorted(folder.rglob("*.py")) if path.name not in LEFT_OUT]
    modules = []
    for path in paths:
        name = folder.name / path.relative_to(folder)
        modules.append(measure_module(path, name.as_posix()))
    return Package(folder.name, modules)


def listed(places, shown=10):
    """Name the first places, and say how many more there are."""
    rest = len(places) - shown
    return ", ".join(places[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


def over_limits(package):
    """Name the limits that a package exceeds, `columns`, `tokens` or `tuples`, and say for each where."""
    exceeded = {}
    if package.too_wide:
        exceeded["columns"] = f"more than {COLUMNS} columns: {listed(package.too_wide)}"
    if package.dense_percent > DENSE_PERCENT:
        share = f"{package.dense_percent:.1f} % of the code lines have more than {TOKENS} tokens"
        places = [line.place for line in package.dense]
        exceeded["tokens"] = f"{share}, at most {DENSE_PERCENT} % may: {listed(places)}"
    if package.tuples_per_1000 > TUPLES_PER_1000:
        rate = f"{package.tuples_per_1000:.1f} tuple assignments in 1,000 code lines"
        exceeded["tuples"] = f"{rate}, at most {TUPLES_PER_1000} may be: {listed(package.tuple_assignments)}"
    return exceeded


# ---------------------------------------------------------------- printing


def cells(package):
    """The figures of a package as they are printed, by their headings."""
    median, long = package.function_lines()
    return {
        "": package.name,
        "modules": f"{len(package.modules)}",
        "lines": f"{package.lines:,}",
        "code": f"{len(package.code):,}",
        "function": f"{median:g} / {long}",
        "> 110 col": f"{package.wide_percent(110):.1f} %",
        "> 120 col": f"{package.wide_percent(120):.1f} %",
        "> 30 tokens": f"{package.dense_percent:.1f} %",
        "a, b = c, d": f"{package.tuples_per_1000:.1f}",
    }


def print_table(packages):
    """Print the figures, one package a row."""
    tables = [cells(package) for package in packages]
    headings = list(tables[0])
    rows = [list(table.values()) for table in tables]
    for name, *figures in [headings, *rows]:
        print(f"{name:16}", *[f"{figure:>11}" for figure in figures])


def print_densest(package, number):
    """Print the lines with most tokens."""
    for line in package.dense[:number]:
        print(f"{line.place}: {line.tokens} tokens, {len(line.text)} columns\n    {line.text.strip()}")


def print_drawn(packages, number, seed):
    """Print functions drawn at random; a seed always draws the same ones from the same code."""
    functions = [function for package in packages for function in package.functions]
    drawn = random.Random(seed).sample(functions, min(number, len(functions)))
    for function in drawn:
        print(f"{function.place} {function.name}\n\n{function.source}\n\n")


def print_complaints(packages):
    """Print which packages exceed which limits; return 1 if any does, else 0."""
    status = 0
    for package in packages:
        for complaint in over_limits(package).values():
            print(f"\n{package.name}: {complaint}")
            status = 1
    return status


# ---------------------------------------------------------------- the command


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    package = ROOT / "diffusevae"
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="folders (default: the package)")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a limit is exceeded")
    parser.add_argument("--densest", type=int, default=10, metavar="N", help="how many dense lines to show")
    parser.add_argument("--draw", type=int, metavar="N", help="print N functions drawn at random instead")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draw (default: 0)")
    chosen = parser.parse_args()
    chosen.paths = [path.resolve() for path in chosen.paths or [package]]
    return chosen


def main():
    """Print figures or functions; exit code 1 if a limit is exceeded and `--check` asks for it."""
    chosen = arguments()
    packages = [measure(path) for path in chosen.paths]
    for package in packages:
        if not package.modules:
            sys.exit(f"no modules in {package.name}")
    if chosen.draw is not None:
        print_drawn(packages, chosen.draw, chosen.seed)
        return 0
    print_table(packages)
    for package in packages:
        print()
        print_densest(package, chosen.densest)
    return print_complaints(packages) if chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())
