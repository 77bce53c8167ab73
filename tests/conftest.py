"""What several tests share: tiny parameters for every run notebook, and a study made of them once."""

import os
import subprocess

import pytest
from forks import forking

os.environ.setdefault("OMP_NUM_THREADS", "2")

TINY = {
    "train_vae": dict(
        steps=12,
        width=8,
        z_dim=4,
        batch_size=16,
        checkpoint_every=5,
        validate_every=6,
        log_every=2,
        device="cpu",
    ),
    "train_ddpm": dict(
        steps=12,
        width=16,
        T=20,
        batch_size=16,
        checkpoint_every=5,
        validate_every=6,
        log_every=2,
        device="cpu",
    ),
    "train_diffusevae": dict(
        steps=12,
        width=16,
        T=20,
        batch_size=16,
        checkpoint_every=5,
        validate_every=6,
        log_every=2,
        device="cpu",
    ),
    "evaluate": dict(n=40, steps=3, batch_size=16, device="cpu"),
}

RECIPE = """
runs:
  vae: {{notebook: train_vae, parameters: {train_vae}}}
  ddpm: {{notebook: train_ddpm, parameters: {train_ddpm}}}
  form1: {{notebook: train_diffusevae, parameters: {form1}}}
  form2: {{notebook: train_diffusevae, parameters: {form2}}}
  evaluate_baselines: {{notebook: evaluate, parameters: {baselines}}}
  evaluate_vae: {{notebook: evaluate, parameters: {e_vae}}}
  evaluate_ddpm: {{notebook: evaluate, parameters: {e_ddpm}}}
  evaluate_form1: {{notebook: evaluate, parameters: {e_form1}}}
  evaluate_form2: {{notebook: evaluate, parameters: {e_form2}}}
  report: {{notebook: report, parameters: {{study: $study, title: A tiny study}}}}
"""


def tiny_recipe(path):
    "A recipe with the demo's runs at tiny sizes, written to `path`."
    import json

    form = {i: {**TINY["train_diffusevae"], "vae": "$study/vae", "form": i} for i in (1, 2)}
    models = {
        f"e_{m}": {**TINY["evaluate"], "model": f"$study/{m}", "samples": "$study/samples"}
        for m in ("vae", "ddpm", "form1", "form2")
    }
    baselines = {**TINY["evaluate"], "model": "baselines", "samples": "$study/samples"}
    parts = {**TINY, "form1": form[1], "form2": form[2], **models, "baselines": baselines}
    path.write_text(RECIPE.format(**{k: json.dumps(v) for k, v in parts.items()}))
    return path


@pytest.fixture(scope="session", autouse=True)
def kernels_at_once(tmp_path_factory):
    "Runs find a kernel that has its libraries imported, where they would wait for a new one: for what they compute it is the same."
    home, path = tmp_path_factory.mktemp("kernels"), os.environ.get("JUPYTER_PATH")
    with forking(home, "python3", cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(home), path]))
        yield
    os.environ.pop("JUPYTER_PATH") if path is None else os.environ.update(JUPYTER_PATH=path)


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory):
    "A whole study at tiny sizes, executed through papermill: its folder. Tests read it; whoever changes it works on a copy."
    from diffusevae.core import runs

    place = tmp_path_factory.mktemp("study {with braces}")
    recipe = tiny_recipe(place / "tiny.yaml")
    for _ in runs.run_study(recipe, place / "out"):
        pass
    return place / "out"


@pytest.fixture
def one_thread():
    "Sums in one order, and a seeded global generator: what a test draws does not depend on the tests before it."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
