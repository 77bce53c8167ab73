"""The models that ship with the package: each is evaluated again, and must come out as its record and its card say."""

import json

import pytest
import torch

from diffusevae.autoencoders.vae import AnyVAE, log_weight
from diffusevae.core.checkpoints import pretrained, weights
from diffusevae.core.images import load, to_float, to_uint8
from diffusevae.evaluation import metrics

MODELS = [f"{data}_{kind}" for data in ("digits", "shapes") for kind in ("vae", "vae_flow", "vqvae", "kl")]


def test_all_are_there_and_small():
    assert set(MODELS) <= {p.stem for p in weights.glob("*.safetensors")}
    assert sum((weights / f"{name}.safetensors").stat().st_size for name in MODELS) < 4_000_000


def batches(n, size):
    return [min(size, n - i) for i in range(0, n, size)]


def reconstructed(system, images, how):
    "The test split's reconstructions, drawn as the run notebook `evaluate` draws them."
    torch.manual_seed(how["seed"])
    return torch.cat([to_uint8(system.reconstruct(part)) for part in to_float(images).split(how["batch_size"])])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_good_as_its_record_says(name):
    record = json.loads((weights / f"{name}.json").read_text(encoding="utf-8"))
    how, figures, system = record["evaluation"], record["figures"], pretrained(name)
    test = load(how["data"], "test").images
    again = metrics.reconstruction(test, reconstructed(system, test, how))
    assert again["psnr"] == pytest.approx(figures["psnr"], abs=0.05) and again["ssim"] == pytest.approx(figures["ssim"], abs=0.005)
    if isinstance(system, AnyVAE):
        with torch.no_grad():
            torch.manual_seed(1)
            draws = torch.stack([log_weight(system, to_float(test[:360])) for _ in range(4)])
        assert figures["iwae"] > figures["elbo"]
        if len(test) == 360:  # the same images as the record's
            assert float(draws.mean()) == pytest.approx(figures["elbo"], abs=0.5)
    if "fid" in figures:
        train = load(how["data"]).images
        torch.manual_seed(how["seed"])
        with torch.no_grad():
            drawn = torch.cat([to_uint8(system.sample(n)) for n in batches(figures["n"], how["batch_size"])])
        assert metrics.evaluate(train, drawn, how["features"])["fid"] == pytest.approx(figures["fid"], rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_record_and_card_speak_of_this_file(name):
    record, card = json.loads((weights / f"{name}.json").read_text(encoding="utf-8")), (weights / f"{name}.md").read_text(encoding="utf-8")
    assert f"{(weights / f'{name}.safetensors').stat().st_size:,} bytes" in card and f"{record['figures']['psnr']:.4g}" in card
    assert record["training"]["parameters"]["data"] == name.partition("_")[0] and record["training"]["git"]["commit"]
    assert record["metrics"]["steps"] == record["training"]["parameters"]["steps"] and record["metrics"]["seconds"] < 180
