"""What is done to all notebooks: export, execute, clean, README (`export`, `readme`) and renumber.

Needs the `dev` extra, no Quarto.
"""

import argparse
import asyncio
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
README = ROOT / "README.md"
WIDGET = "application/vnd.jupyter.widget-view+json"
AT_A_TIME = 2


def notebooks():
    "The notebooks that are taught from, in reading order; those of `nbs/runs` are papermill's."
    found = (p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    return sorted(p for p in found if NBS / "runs" not in p.parents)


def one_thread():
    "Let what is started from here use one thread each: several notebooks run at a time."
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


def front_matter(cells):
    "The YAML in a leading raw cell, {} where there is none."
    import yaml

    source = "".join(cells[0]["source"]) if cells and cells[0]["cell_type"] == "raw" else ""
    return (yaml.safe_load(source.strip().strip("-")) or {}) if source.startswith("---") else {}


# ---------------------------------------------------------------- export


def settle(nb):
    "Outputs as they are committed: no live widgets, beside which a static picture stands, and no stderr."
    for cell in nb.cells:
        if cell.cell_type == "code":
            kept = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]
            cell.outputs = [o for o in kept if o.output_type != "stream" or o.text.strip()]


async def execute(path, gate):
    "Run a notebook in a kernel of its own and write it with its outputs; False when a cell failed."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb = nbformat.read(path, as_version=4)
    name = path.relative_to(ROOT)
    if front_matter(nb.cells).get("skip_exec"):
        print(f"  {name}: not executed (skip_exec)", flush=True)
        return True
    async with gate:
        started = time.perf_counter()
        # log level: the kernel would warn each time that its ports here are not encrypted, as Jupyter's are
        client = NotebookClient(
            nb,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            store_widget_state=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=40"],
        )
        try:
            await client.async_execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            print(f"  {name}: FAILED, left as it was\n{e}", flush=True)
            return False
    settle(nb)
    nbformat.write(nb, path)
    print(f"  {name}: {time.perf_counter() - started:.1f} s", flush=True)
    return True


async def execute_all(paths):
    "Execute notebooks, two at a time; those that failed."
    gate = asyncio.Semaphore(AT_A_TIME)
    done = await asyncio.gather(*(execute(p, gate) for p in paths))
    return [p for p, ok in zip(paths, done) if not ok]


def export(paths, run):
    "Library, outputs, clean notebooks, README. Returns the notebooks that failed."
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    print("exporting", flush=True)
    nbdev_export.__wrapped__()
    failed = []
    if run:
        chosen = paths or notebooks()
        print(f"executing {len(chosen)} notebooks, {AT_A_TIME} at a time", flush=True)
        failed = asyncio.run(execute_all(chosen))
    print("cleaning", flush=True)
    nbdev_clean.__wrapped__()
    print("writing README.md", flush=True)
    README.write_text(readme(), encoding="utf-8")
    return failed


# ---------------------------------------------------------------- renumber


def renumber():
    """Let the notebooks of each chapter count from 01 in their order; returns the (old, new) paths.

    To insert a lesson, give it a number between two others, as in `04a_name.ipynb`. Links in all
    notebooks follow; nothing else knows a number.
    """
    renamed = []
    for chapter in sorted(NBS.glob("[0-9]_*")):
        for number, old in enumerate(sorted(chapter.glob("[0-9]*_*.ipynb")), start=1):
            name = old.name.partition("_")[2]
            new = chapter / f"{number:02d}_{name}"
            if new != old:
                renamed.append((old, new))
    for old, _ in renamed:  # a name may be taken until its owner has moved too
        old.rename(old.with_suffix(".moving"))
    for old, new in renamed:
        old.with_suffix(".moving").rename(new)
    for path in NBS.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        changed = text
        for old, new in renamed:
            changed = changed.replace(f"{old.parent.name}/{old.name}", f"{new.parent.name}/{new.name}")
        if changed != text:
            path.write_text(changed, encoding="utf-8")
    return renamed


# ---------------------------------------------------------------- readme


def from_top(link):
    "A link of `nbs/index.ipynb` as it reads from the top level."
    if re.match(r"[a-z]+:|#|/", link):
        return link
    return os.path.normpath(os.path.join("nbs", link)).replace(os.sep, "/")


def readme():
    "README.md as `nbs/index.ipynb` says it: its cells in Markdown, `#| hide` ones left out, links rewritten."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not c.source.startswith("#| hide")]
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        sys.exit(
            "nbs/index.ipynb shows a picture as an output; put it into nbs/images and refer to it in Markdown"
        )
    text = re.sub(r"(\]\()([^)\s]+)(?=[)\s])", lambda m: m[1] + from_top(m[2]), text)
    text = re.sub(r'((?:src|href)=")([^"]+)(?=")', lambda m: m[1] + from_top(m[2]), text)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    return f"<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n\n{body}\n"


def stale():
    "Is README.md another text than `nbs/index.ipynb` gives?"
    return not README.is_file() or README.read_text(encoding="utf-8") != readme()


# ---------------------------------------------------------------- command line


def parser():
    "The commands; each sets the function that serves it, as `serve`."
    top = argparse.ArgumentParser(prog=".ci/notebooks.py", description=__doc__)
    commands = top.add_subparsers(required=True)

    command = commands.add_parser("export", help="nbdev_export, execute, clean, README.md")
    command.add_argument("paths", nargs="*", type=Path, help="execute these only (default: all but nbs/runs)")
    command.add_argument("--no-execute", action="store_true", help="keep the outputs that the notebooks have")
    command.set_defaults(serve=serve_export)

    command = commands.add_parser(
        "renumber", help="let the notebooks of each chapter count from 01; then `export`"
    )
    command.set_defaults(serve=serve_renumber)

    command = commands.add_parser("readme", help="make README.md from nbs/index.ipynb")
    command.add_argument("--check", action="store_true", help="write nothing; exit with 1 when it is stale")
    command.set_defaults(serve=serve_readme)
    return top


def serve_export(options):
    failed = export([path.resolve() for path in options.paths], not options.no_execute)
    names = ", ".join(str(path.relative_to(ROOT)) for path in failed)
    return f"failed: {names}" if failed else 0


def serve_renumber(options):
    for old, new in renumber():
        print(f"{old.relative_to(ROOT)} -> {new.name}")
    return 0


def serve_readme(options):
    if options.check:
        return "README.md is stale; run `make export`, or .ci/notebooks.py readme" if stale() else 0
    README.write_text(readme(), encoding="utf-8")
    return 0


def main(argv=None):
    "Serve a command line; returns what `sys.exit` takes."
    options = parser().parse_args(argv)
    os.chdir(ROOT)
    one_thread()
    here = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(here)
    return options.serve(options)


if __name__ == "__main__":
    sys.exit(main())
