"""What is done to all notebooks: export, execute, clean, README (`export`, `readme`), renumber and test.

Needs the `dev` extra, no Quarto.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, README, SECONDS = ROOT / "nbs", ROOT / "README.md", ROOT / ".seconds.json"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
WIDGET = "application/vnd.jupyter.widget-view+json"
AT_A_TIME = 2
# seconds that `yardstick` takes where the limits were set: a training step of the demo takes 0.11 s there
REFERENCE = 0.64


def notebooks():
    "The notebooks that are taught from, in reading order; those of `nbs/runs` are papermill's."
    found = (p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    return sorted(p for p in found if NBS / "runs" not in p.parents)


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


# ---------------------------------------------------------------- test


def yardstick(_=None):
    "Seconds of a fixed piece of work like the lessons': steps of a small network on one thread."
    import torch

    torch.set_num_threads(1)
    net = torch.nn.Sequential(*(torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))
    x = torch.ones(64, 32, 16, 16)
    for _ in range(3):  # warm up
        net(x).sum().backward()
    started = time.perf_counter()
    for _ in range(12):
        net(x).sum().backward()
    return time.perf_counter() - started


def slowness():
    "How many times slower this machine, with all workers busy, is than the one of the limits; at least 1."
    with ProcessPoolExecutor(AT_A_TIME) as workers:
        measured = [max(workers.map(yardstick, range(AT_A_TIME))) for _ in range(3)]
    return max(1.0, min(measured) / REFERENCE)


def test_in_order():
    """nbdev_test over all notebooks; did they pass?

    Their seconds, rounded up, and this machine's `slowness` go into `.seconds.json`, which
    tests/house/test_house.py reads.
    """
    SECONDS.unlink(missing_ok=True)
    before = slowness()
    nbdev_test = Path(sys.executable).parent / "nbdev_test"
    command = [nbdev_test, "--timing", "--do_print", "--n_workers", str(AT_A_TIME)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    seconds = {}
    for line in child.stdout:
        print(line, end="", flush=True)
        if found := re.fullmatch(r"(\S+\.ipynb): (\d+) secs", line.strip()):
            seconds[found[1]] = int(found[2]) + 1
    slow = max(before, slowness())  # other work may have come or gone meanwhile
    print(f"this machine takes {slow:.2f} times as long as the one that the limits were set on", flush=True)
    if child.wait() == 0:
        SECONDS.write_text(json.dumps({**seconds, "slowness": slow}, indent=1, sort_keys=True) + "\n")
    return child.returncode == 0


def test_shuffled(seed):
    "The same notebooks once in a random order: workers keep what earlier notebooks left in their process."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    paths = notebooks()
    random.Random(seed).shuffle(paths)
    print(f"random order, seed {seed} (again: .ci/notebooks.py test --random {seed})", flush=True)
    # a notebook replaces __main__ in its worker, so the task must be nbdev's own function
    task = partial(test_nb, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    failed = []
    with ProcessPoolExecutor(AT_A_TIME) as workers:
        for path, (ok, seconds) in zip(paths, workers.map(task, paths)):
            print(f"{path.name}: {'' if ok else 'FAILED, '}{seconds:.1f} secs", flush=True)
            if not ok:
                failed.append(path.name)
    print(f"failed: {', '.join(failed)}" if failed else "Success.", flush=True)
    return not failed


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

    command = commands.add_parser("test", help="nbdev_test of all notebooks")
    random_help = "in a random order instead, workers sharing state"
    command.add_argument("--random", nargs="?", type=int, const=-1, metavar="SEED", help=random_help)
    command.set_defaults(serve=serve_test)
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


def serve_test(options):
    if options.random is None:
        return 0 if test_in_order() else 1
    seed = random.randrange(10_000) if options.random == -1 else options.random
    return 0 if test_shuffled(seed) else 1


def main(argv=None):
    "Serve a command line; returns what `sys.exit` takes."
    options = parser().parse_args(argv)
    os.chdir(ROOT)
    here = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    os.environ.update(THREADS, PYTHONPATH=os.pathsep.join(here))
    return options.serve(options)


if __name__ == "__main__":
    sys.exit(main())
