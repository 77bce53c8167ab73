"""The models that ship with the package: each is evaluated again, and must come out as its record and its
card say.
"""

import json
import math

import pytest
import torch

from diffusevae.autoencoders.vae import VAEBase, log_weight
from diffusevae.core.checkpoints import pretrained, shipped_weights
from diffusevae.core.images import load
from diffusevae.core.pixels import to_float, to_uint8
from diffusevae.diffusion.bound import variational_bound
from diffusevae.evaluation import metrics
from diffusevae.evaluation.features import extract_features

FAMILY = [f"{data}_{kind}" for data in ("digits", "shapes") for kind in ("vae", "vae_flow", "vqvae", "kl")]
DENOISERS = ["digits_ddpm", "digits_latent", "shapes_ddpm"]
HYBRIDS = ["shapes_diffusevae"]


@pytest.mark.parametrize(
    "models, most",
    [(FAMILY, 4_000_000), (DENOISERS, 8_000_000), (HYBRIDS, 8_000_000)],
    ids=["autoencoders", "denoisers", "hybrids"],
)
def test_all_are_there_and_small(models, most):
    assert set(models) <= {p.stem for p in shipped_weights.glob("*.safetensors")}
    assert sum((shipped_weights / f"{name}.safetensors").stat().st_size for name in models) < most


def batches(n, size):
    return [min(size, n - i) for i in range(0, n, size)]


def reconstructed(system, images, how):
    "The test split's reconstructions, drawn as the run notebook `evaluate` draws them."
    torch.manual_seed(how["seed"])
    return torch.cat(
        [to_uint8(system.reconstruct(part)) for part in to_float(images).split(how["batch_size"])]
    )


@pytest.mark.parametrize("name", FAMILY)
def test_a_model_is_as_good_as_its_record_says(name):
    record = json.loads((shipped_weights / f"{name}.json").read_text(encoding="utf-8"))
    how, figures, system = record["evaluation"], record["figures"], pretrained(name)
    test = load(how["data"], "test").images
    again = metrics.reconstruction(test, reconstructed(system, test, how))
    assert again["psnr"] == pytest.approx(figures["psnr"], abs=0.05) and again["ssim"] == pytest.approx(
        figures["ssim"], abs=0.005
    )
    if isinstance(system, VAEBase):
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
        assert metrics.evaluate(train, drawn, how["features"])["fid"] == pytest.approx(
            figures["fid"], rel=0.03
        )


def drawn_again(system, how):
    "Samples of every class in turn and their labels, drawn as `evaluate` draws them."
    torch.manual_seed(how["seed"])
    labels = torch.arange(how["n"]) % system.classes
    way = {k: how[k] for k in ("sampler", "steps", "spacing", "guidance")}
    return torch.cat(
        [to_uint8(system.sample(len(y), label=y, **way)) for y in labels.split(how["batch_size"])]
    ), labels


@pytest.mark.parametrize("name", ["digits_ddpm", "digits_latent"])
def test_a_denoiser_draws_as_well_as_its_record_says(name):
    record = json.loads((shipped_weights / f"{name}.json").read_text(encoding="utf-8"))
    how, figures = record["evaluation"], record["figures"]
    images, labels = drawn_again(pretrained(name), how)
    again = metrics.evaluate(load(how["data"]).images, images, how["features"])
    assert again["fid"] == pytest.approx(figures["fid"], rel=0.05)
    read = (extract_features(images, how["features"])[1].argmax(1) == labels).float().mean()
    assert float(read) == pytest.approx(figures["read_as_asked"], abs=0.01) and figures["read_as_asked"] > 0.9


def test_the_shapes_denoiser_has_the_bound_of_its_record():
    record = json.loads((shipped_weights / "shapes_ddpm.json").read_text(encoding="utf-8"))
    how, system, test = record["evaluation"], pretrained("shapes_ddpm"), load("shapes", "test")
    x0, labels = to_float(test.images[: how["bound"]]), test.labels[: how["bound"]]
    torch.manual_seed(how["seed"])
    found = variational_bound(
        system.denoiser, system.process, x0, system.cond(len(x0), labels), every=how["bound_every"]
    )
    assert found["total"] / math.log(2) == pytest.approx(record["figures"]["bound_bits_per_dim"], rel=0.02)
    images = system.sample(6, steps=5, sampler="dpm_solver", seeds=range(6))
    assert images.shape == (6, 3, 32, 32) and float(images.std()) > 0.1


def test_a_hybrid_draws_as_well_as_its_record_says():
    record = json.loads((shipped_weights / "shapes_diffusevae.json").read_text(encoding="utf-8"))
    how, system = record["evaluation"], pretrained("shapes_diffusevae")
    torch.manual_seed(how["seed"])
    way = {k: how[k] for k in ("sampler", "steps", "spacing")}
    images = torch.cat([to_uint8(system.sample(n, **way)) for n in batches(how["n"], how["batch_size"])])
    again = metrics.evaluate(load(how["data"]).images, images, how["features"])
    assert again["fid"] == pytest.approx(record["figures"]["fid"], rel=0.05) and again[
        "recall"
    ] == pytest.approx(record["figures"]["recall"], abs=0.05)


@pytest.mark.parametrize("name", FAMILY + DENOISERS + HYBRIDS)
def test_record_and_card_speak_of_this_file(name):
    record, card = (
        json.loads((shipped_weights / f"{name}.json").read_text(encoding="utf-8")),
        (shipped_weights / f"{name}.md").read_text(encoding="utf-8"),
    )
    figure = "psnr" if name in FAMILY else "bound_bits_per_dim" if name == "shapes_ddpm" else "fid"
    assert (
        f"{(shipped_weights / f'{name}.safetensors').stat().st_size:,} bytes" in card
        and f"{record['figures'][figure]:.4g}" in card
    )
    assert (
        record["training"]["parameters"]["data"] == name.partition("_")[0]
        and record["training"]["git"]["commit"]
    )
    assert record["metrics"]["steps"] == record["training"]["parameters"]["steps"] and record["metrics"][
        "seconds"
    ] < (180 if name in FAMILY else 3600)
