"""The run notebooks of the autoencoder family at tiny sizes, their comparison, and how they answer what
does not fit.
"""

import json

import numpy as np
import pytest
import torch
from tiny import TRAIN, execute

from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system

RUNS = {
    "autoencoder": ("train_autoencoder", dict(width=4)),
    "vae": (
        "train_vae",
        dict(
            width=8,
            z_dim=4,
            flow="iaf",
            prior="flow",
            objective="free_bits",
            likelihood="logistic",
            sigma=0.1,
        ),
    ),
    "deep": (
        "train_vae",
        dict(
            width=8,
            z_dim=4,
            model="hierarchical",
            z_channels=[1],
            objective="cyclical",
            kl_steps=4,
            attention=[8],
        ),
    ),
    "vq": ("train_first_stage", dict(kind="vq", width=8, codes=16)),
    "kl": ("train_first_stage", dict(kind="kl", width=8, perceptual=0.1, adversarial=0.1, start=2)),
    "gan": ("train_gan", dict(kind="dcgan", width=8, z_dim=8)),
    "vaegan": ("train_gan", dict(kind="vaegan", width=8, z_dim=8)),
}
EVALUATED = ("autoencoder", "deep", "vaegan")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    "Every notebook of the family run once, some of them evaluated and compared: the study's folder."
    study = tmp_path_factory.mktemp("family")
    for name, (notebook, own) in RUNS.items():
        runs.run(notebook, study / name, **TRAIN, **own)
    for name in EVALUATED:
        runs.run(
            "evaluate",
            study / f"evaluate_{name}",
            model=str(study / name),
            n=40,
            batch_size=20,
            weights=2,
            device="cpu",
        )
    runs.run("evaluate", study / "evaluate_baselines", model="baselines", n=40, device="cpu")
    runs.run("compare", study / "compare", study=str(study))
    return study


def metrics(family, name):
    return records.read_record(family / f"evaluate_{name}")["metrics"]["models"][name]


@pytest.mark.timeout(300)
def test_every_family_is_trained_with_logs_and_pictures(family):
    for name in RUNS:
        record = records.read_record(family / name)
        assert record["status"] == "completed" and record["metrics"]["steps"] == 6, name
        assert (family / name / "pictures.png").is_file() and list(
            (family / name / "tensorboard").glob("events*")
        ), name
    assert (
        records.read_record(family / "vq")["metrics"]["codes_in_use"] <= 16
        and records.read_record(family / "vq")["metrics"]["scale"] > 0
    )
    assert 0 <= records.read_record(family / "gan")["metrics"]["classes"] <= 10


def test_first_stages_know_their_scale(family):
    for name in ("vq", "kl"):
        stage, x = load_system(family / name / "best.safetensors"), torch.zeros(1, 1, 16, 16)
        assert stage.scale > 0 and stage.from_latent(stage.to_latent(x)).shape == x.shape


def test_each_is_measured_by_what_it_can_do(family):
    assert "fid" not in metrics(family, "autoencoder") and metrics(family, "autoencoder")["psnr"] > 0
    found = metrics(family, "deep")
    assert {"fid", "psnr", "ssim", "mse", "elbo", "iwae", "bits_per_dim", "active_units"} <= found.keys()
    assert found["iwae"] > found["elbo"] - 5 and 0 <= found["active_units"] <= found["z_dim"]
    assert {"fid", "psnr"} <= metrics(family, "vaegan").keys() and "elbo" not in metrics(family, "vaegan")


def test_the_comparison_names_every_model_once(family):
    table = (family / "compare" / "table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert {*EVALUATED, "G"} <= set(rows) and len(rows) == len(set(rows))
    assert "| training, s |" in table and "| PSNR, dB |" in table
    for picture in ("samples", "reconstructions", "curves"):
        assert (family / "compare" / f"{picture}.png").read_bytes()[1:4] == b"PNG"
    assert np.load(family / "evaluate_deep" / "deep_reconstructions.npy").shape == (2, 12, 1, 16, 16)


@pytest.mark.timeout(120)
def test_priors_are_fitted_to_a_finished_vae(family, tmp_path):
    for kind in ("flow", "mixture"):
        runs.run(
            "train_prior",
            tmp_path / kind,
            **TRAIN,
            vae=str(family / "vae"),
            kind=kind,
            hidden=8,
            layers=2,
            components=3,
        )
        fitted = load_system(tmp_path / kind / "vae.safetensors")
        assert fitted.sample(3, seeds=[1, 2, 3]).shape == (3, 1, 16, 16) and type(
            fitted.prior
        ).__name__.lower().startswith(kind)


@pytest.mark.parametrize(
    "notebook, given, sentence",
    [
        (
            "train_vae",
            dict(likelihood="poisson"),
            "likelihood must be one of gaussian, logistic, bernoulli; got 'poisson'",
        ),
        ("train_first_stage", dict(levels=5), "cannot be halved 5 times"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, notebook, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        execute(notebook, tmp_path / "refused", steps=2, device="cpu", **given)
    assert records.read_record(tmp_path / "refused")["status"] == "failed"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_recipe_is_whole():
    recipe = runs.read_recipe("autoencoders")
    assert {notebook for notebook, _ in recipe.values()} >= {
        "train_autoencoder",
        "train_vae",
        "train_prior",
        "train_first_stage",
        "train_gan",
        "evaluate",
        "compare",
    }
    evaluated = {
        json.dumps(p["model"]).split("/")[1].strip('"')
        for n, p in recipe.values()
        if n == "evaluate" and p["model"] != "baselines"
    }
    assert evaluated == {name for name, (n, _) in recipe.items() if n.startswith("train")}
