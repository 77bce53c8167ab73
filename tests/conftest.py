"""What several tests share: kernels that are there at once, and a study at tiny sizes that is run once."""

import os
import subprocess

import pytest
from forks import forking
from tiny import tiny_recipe

os.environ.setdefault("OMP_NUM_THREADS", "2")


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
