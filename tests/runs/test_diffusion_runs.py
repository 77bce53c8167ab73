"""The run notebooks of the diffusion rooms at tiny sizes: labels, guidance, latents, classifiers, samplers,
averages chosen afterwards, the benchmark.
"""

import json

import numpy as np
import pytest
import torch
from tiny import TRAIN, execute

from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system

RUNS = {
    "labels": (
        "train_ddpm",
        dict(conditional=True, width=8, T=20, weight="min_snr", times="importance", ema_snapshots=2),
    ),
    "levels": (
        "train_ddpm",
        dict(
            continuous=True,
            width=8,
            T=20,
            noise_schedule="linear",
            network="dit",
            depth=1,
            heads=2,
            zero_terminal=True,
            patch=4,
        ),
    ),
    "ranges": (
        "train_ddpm",
        dict(
            variance="learned_range",
            width=8,
            T=20,
            predict="eps",
            noise_schedule="scaled_linear",
            precision="bfloat16",
        ),
    ),
    "latent": ("train_latent_ddpm", dict(first_stage="digits_vqvae", conditional=True, width=8, T=20)),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Every notebook once: the folder."
    out = tmp_path_factory.mktemp("diffusion")
    for name, (notebook, own) in RUNS.items():
        runs.run(notebook, out / name, **TRAIN, **own)
    runs.run("train_classifier", out / "classifier", model=str(out / "ranges"), width=8, **TRAIN)
    runs.run("choose_ema", out / "chosen", model=str(out / "labels"), device="cpu")
    return out


def metrics(out, run):
    return records.read_record(out / run)["metrics"]


@pytest.mark.timeout(300)
def test_every_training_leaves_its_record(study):
    for name in (*RUNS, "classifier"):
        record = records.read_record(study / name)
        assert record["status"] == "completed" and record["metrics"]["steps"] == 6, name
        assert (study / name / "pictures.png").is_file() and (study / name / "best.safetensors").is_file(), (
            name
        )
    assert metrics(study, "latent")["scale"] == pytest.approx(
        float(load_system(study / "latent" / "best.safetensors").first_stage.scale)
    )
    assert 0 <= metrics(study, "classifier")["accuracy_clean"] <= 1


def test_what_was_asked_for_was_built(study):
    labels, levels, ranges, latent = (load_system(study / name / "best.safetensors") for name in RUNS)
    assert (
        labels.classes == latent.classes == 10
        and labels.weight == "min_snr"
        and labels.label_drop == 0.1
        and int(labels.important.seen.sum()) > 0
    )
    assert (
        levels.process.continuous
        and levels.process.schedule.abar[-1] == 0
        and type(levels.denoiser).__name__ == "DiT"
    )
    assert (
        ranges.denoiser.outputs == 2
        and ranges.process.predict == "eps"
        and ranges.sample(1, sampler="ddpm", steps=2).isfinite().all()
    )
    assert latent.denoiser.channels == latent.first_stage.latent_shape[0] and latent.sample(
        2, steps=2, guidance=1.0
    ).shape == (2, 1, 16, 16)


@pytest.mark.timeout(300)
def test_samples_in_every_way(study, tmp_path):
    common = dict(n=10, steps=3, batch_size=4, device="cpu")
    ways = {
        "guided": dict(
            model=str(study / "labels"),
            label=7,
            guidance=2.0,
            interval=[2.0, 15.0],
            rescale=0.5,
            invert=3,
            spacing="leading",
            png=True,
        ),
        "by_classifier": dict(
            model=str(study / "ranges"),
            label=7,
            guidance=1.0,
            classifier=str(study / "classifier"),
            sampler="heun",
            threshold=0.99,
        ),
        "levels": dict(
            model=str(study / "levels"),
            inference_T=10,
            sampler="ddpm",
            step_temperature=0.8,
            shared_noise=True,
        ),
        "latent": dict(
            model=str(study / "latent"), sampler="dpm_solver", guidance=1.0, temperature=0.9, invert=2
        ),
    }
    for name, own in ways.items():
        runs.run("sample", tmp_path / name, **common, **own)
        samples = np.load(tmp_path / name / "samples.npy")
        assert samples.dtype == np.uint8 and samples.shape == (10, 1, 16, 16), name
    assert (
        metrics(tmp_path, "guided")["network_evaluations"] == 3
        and metrics(tmp_path, "by_classifier")["network_evaluations"] == 5
    )
    assert (
        all((np.load(tmp_path / name / "labels.npy") == 7).all() for name in ("guided", "by_classifier"))
        and len(list((tmp_path / "guided" / "png").iterdir())) == 10
    )
    assert (
        np.load(tmp_path / "latent" / "labels.npy").tolist() == list(range(10))
        and metrics(tmp_path, "latent")["inverted_psnr"] > 0
    )
    shared = np.load(tmp_path / "levels" / "samples.npy")
    assert (shared == shared[0]).all()  # one noise, no labels: one image
    runs.run(
        "evaluate", tmp_path / "evaluate_guided", model=str(tmp_path / "guided"), device="cpu", batch_size=20
    )
    found = metrics(tmp_path, "evaluate_guided")["models"]["guided"]
    assert 0 <= found["read_as_asked"] <= 1 and found["n"] == 10 and found["network_evaluations"] == 3


@pytest.mark.timeout(300)
def test_evaluation_of_what_knows_classes(study, tmp_path):
    runs.run(
        "evaluate",
        tmp_path / "labels",
        model=str(study / "labels"),
        n=20,
        steps=2,
        guidance=1.0,
        bound=4,
        bound_every=5,
        device="cpu",
    )
    found = metrics(tmp_path, "labels")["models"]["labels"]
    assert {"fid", "read_as_asked", "bound_bits_per_dim", "bound_prior_bits"} <= found.keys() and found[
        "bound_bits_per_dim"
    ] > 0
    runs.run(
        "evaluate", tmp_path / "latent", model=str(study / "latent"), n=20, steps=2, bound=4, device="cpu"
    )
    assert "bound_bits_per_dim" not in metrics(tmp_path, "latent")["models"]["latent"]


def test_the_chosen_average_is_a_model(study):
    found = metrics(study, "chosen")
    assert load_system(study / "chosen" / "best.safetensors").sample(1, steps=2).shape == (1, 1, 16, 16)
    assert len(found["lengths"]) > 3


@pytest.mark.timeout(240)
def test_benchmark(tmp_path):
    """The same network in diffusers and here, at a tiny size: equal outputs and figures that are ratios;
    whom to race is ours to say.
    """
    pytest.importorskip("diffusers")
    tiny = dict(
        parts=["step", "modes"],
        size=16,
        batch_size=2,
        block_channels=[32, 32],
        blocks=1,
        repeats=1,
        sampling_steps=2,
        network="ddpm_cifar10",
        width=32,
        channels=1,
        seconds_each=0.2,
    )
    runs.run("benchmark", tmp_path / "b", **tiny, device="cpu")
    found = metrics(tmp_path, "b")
    assert (
        found["step"]["outputs_differ_by"] < 1e-4
        and {"ours", "theirs", "ratio"}
        == found["step"]["training_step"].keys()
        == found["step"]["sampling"].keys()
    )
    assert found["modes"]["images_per_second"].keys() >= {"float32", "bfloat16", "channels_last", "diffusers"}


REFUSED = [
    ("train_ddpm", dict(network="dat"), "network must be one of"),
    ("train_latent_ddpm", dict(first_stage="digits_vae"), "first stage"),
    ("sample", dict(model="{study}/ranges", guidance=1.0, n=2), "guidance needs a null class"),
    ("sample", dict(model="{study}/labels", label=12, n=2), "whole numbers in 0 … 9"),
    ("sample", dict(model="{study}/labels", steps=21, n=2), "steps must lie in 1 … 20"),
    ("sample", dict(model="{study}/ranges", label=7, n=2), "knows no classes"),
    ("sample", dict(model="{study}/classifier", n=2), "is a NoisyClassifier, which no sampler draws from"),
    ("sample", dict(model="{study}/labels", inference_T=10, n=2), "continuous"),
]


@pytest.mark.parametrize("notebook, given, sentence", REFUSED)
def test_settings_that_do_not_fit_are_refused(study, tmp_path, notebook, given, sentence):
    if "model" in given:
        given = {**given, "model": given["model"].format(study=study)}
    with pytest.raises(ValueError, match=sentence):
        execute(notebook, tmp_path / "refused", device="cpu", **given)
    assert records.read_record(tmp_path / "refused")["status"] == "failed"


def test_the_recipes_are_whole():
    for name in (
        "diffusion_digits",
        "diffusion_shapes",
        "ddpm_cifar10_published",
        "ddpm_celeba64_published",
        "latent_imagenet100",
    ):
        assert {notebook for notebook, _ in runs.read_recipe(name).values()} & {
            "train_ddpm",
            "train_latent_ddpm",
        }
    assert (
        json.dumps(runs.read_recipe("latent_imagenet100")["sample"][1]["guidance"]) == "1.0"
    )  # null + 2·(cond − null)


def test_bfloat16_weights_stay_float32(study):
    assert {p.dtype for p in load_system(study / "ranges" / "best.safetensors").parameters()} == {
        torch.float32
    }
