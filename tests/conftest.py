"""What several tests share: kernels that are there at once, and a study at tiny sizes that is run once."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from forks import forking
from tiny import tiny_recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import stamps  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "2")


# ---------------------------------------------------------------- only what could have changed


def pytest_addoption(parser):
    parser.addoption("--changed", action="store_true", help="only files that could have changed")


def pytest_ignore_collect(collection_path, config):
    "With `--changed`, leave out the files whose stamp is that of their last passing."
    if not config.getoption("--changed") or not _has_stamp(collection_path):
        return None
    return True if not stamps.changed([collection_path]) else None


def _has_stamp(path):
    "Whether a file of tests reads nothing but what its stamp is made of: house rules read everything."
    return path.name.startswith("test_") and path.parent.name not in ("house", "browser")


outcomes = defaultdict(set)  # of the tests in each file: passed, skipped, failed
as_tested = {}  # the stamp of each file when the tests began: it may be edited meanwhile


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # a worker of xdist reports to the session that started it
        for path in (ROOT / "tests").rglob("test_*.py"):
            if _has_stamp(path):
                as_tested[path] = stamps.stamp(path)


def pytest_runtest_logreport(report):
    outcomes[report.nodeid.partition("::")[0]].add(report.outcome)


def pytest_sessionfinish(session):
    "Stamp the files of which all tests have run and none has failed."
    config = session.config
    whole = not (config.option.keyword or config.option.markexpr or session.shouldstop or session.shouldfail)
    if not whole or any("::" in name for name in config.args):
        return
    passed = [ROOT / name for name, kinds in outcomes.items() if "failed" not in kinds]
    stamps.keep({path: as_tested[path] for path in passed if path in as_tested})


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session", autouse=True)
def kernels_at_once(tmp_path_factory):
    """Runs find a kernel that has its libraries imported, where they would wait for a new one: for what
    they compute it is the same.
    """
    home, path = tmp_path_factory.mktemp("kernels"), os.environ.get("JUPYTER_PATH")
    with forking(home, "python3", cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(home), path]))
        yield
    os.environ.pop("JUPYTER_PATH") if path is None else os.environ.update(JUPYTER_PATH=path)


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory):
    """A whole study at tiny sizes, executed through papermill: its folder. Tests read it; whoever changes
    it works on a copy.
    """
    from diffusevae.core import runs

    place = tmp_path_factory.mktemp("study {with braces}")
    recipe = tiny_recipe(place / "tiny.yaml")
    for _ in runs.run_study(recipe, place / "out"):
        pass
    return place / "out"


@pytest.fixture
def one_thread():
    """Sums in one order, and a seeded global generator: what a test draws does not depend on the tests
    before it.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
