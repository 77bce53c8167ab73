"""What the training room cannot show in seconds: every system in bfloat16, the real torch.compile, an EMA
that is chosen after a run.
"""

import functools
import shutil

import pytest
import torch
from tiny import TINY

from diffusevae.autoencoders.autoencoder import AutoEncoder
from diffusevae.autoencoders.first_stages import KLAutoEncoder
from diffusevae.autoencoders.flows import IAF
from diffusevae.autoencoders.gan import GAN, VAEGAN
from diffusevae.autoencoders.hierarchical import HierarchicalVAE
from diffusevae.autoencoders.vae import VAE
from diffusevae.autoencoders.vqvae import VQVAE
from diffusevae.core import runs
from diffusevae.core.checkpoints import load_system, load_tensors
from diffusevae.core.devices import networks_of
from diffusevae.core.ema import reconstruct, system_at_length
from diffusevae.core.images import load as load_images
from diffusevae.core.shapes import draw_shapes
from diffusevae.core.training import Settings, train
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.evaluation.features import DigitClassifier
from diffusevae.hybrid.diffusevae import DiffuseVAE

DIGITS, SHAPES = load_images("digits")[:150], draw_shapes(150, 16)


def process():
    return Diffusion(Schedule(cosine(50)), "v")


SYSTEMS = {
    "autoencoder": (lambda: AutoEncoder(16, width=8), DIGITS),
    "vae": (lambda: VAE(16, z_dim=4, width=8), DIGITS),
    "vae with a flow": (lambda: VAE(16, z_dim=4, width=8, flow=IAF(4)), DIGITS),
    "hierarchical": (lambda: HierarchicalVAE(16, z_dim=4, width=8), DIGITS),
    "vqvae": (lambda: VQVAE(16, 3, width=8), SHAPES),
    "kl first stage": (lambda: KLAutoEncoder(16, 3, width=8, adversarial=0.5), SHAPES),
    "gan": (lambda: GAN(16, width=8), DIGITS),
    "vae-gan": (lambda: VAEGAN(VAE(16, z_dim=4, width=8), width=8), DIGITS),
    "ddpm": (lambda: DDPM(UNet(16, 3, width=16, multipliers=(1, 2)), process()), SHAPES),
    "diffusevae": (
        lambda: DiffuseVAE(
            VAE(16, z_dim=4, width=8).requires_grad_(False),
            UNet(16, 1, width=16, image_channels=1),
            process(),
        ),
        DIGITS,
    ),
    "classifier": (lambda: DigitClassifier(), DIGITS),
}


def trained(name, run_dir, **settings):
    "A short training of a system: (it, losses)."
    make, images = SYSTEMS[name]
    torch.manual_seed(0)
    system = make()
    how = {
        "steps": 4,
        "batch_size": 16,
        "lr": 1e-3,
        "warmup": 0,
        "validation": 0.15,
        "validate_every": 2,
        "device": "cpu",
        **settings,
    }
    return system, [p.loss for p in train(system, images, Settings(**how), run_dir)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_learns_in_bfloat16_as_in_float32(name, tmp_path):
    system, full = trained(name, tmp_path / "full", precision="float32")
    rounded_system, rounded = trained(name, tmp_path / "half", precision="bfloat16")
    assert rounded != full and rounded == pytest.approx(full, rel=0.03)
    assert networks_of(system) and not any("forward" in vars(m) for m in rounded_system.modules())
    kept = [load_tensors(tmp_path / run / "last.safetensors")[0] for run in ("full", "half")]
    assert kept[0].keys() == kept[1].keys() and all(v.dtype == kept[0][k].dtype for k, v in kept[1].items())


@pytest.fixture
def compiler(monkeypatch):
    "Lets torch.compile use another backend: a function of its name."
    plain = torch.compile
    torch._dynamo.reset()
    return lambda backend: monkeypatch.setattr(torch, "compile", functools.partial(plain, backend=backend))


@pytest.mark.parametrize("name", ["vae", "ddpm", "diffusevae"])
def test_compiled_networks_give_the_same_training(name, tmp_path, compiler):
    "Traced by the real compiler, run by PyTorch's own kernels."
    compiler("eager")
    _, plain = trained(name, tmp_path / "plain")
    system, compiled = trained(name, tmp_path / "compiled", compile="on")
    assert compiled == pytest.approx(plain, rel=1e-4)
    kept = [load_tensors(tmp_path / run / "last.safetensors") for run in ("plain", "compiled")]
    assert kept[0][0].keys() == kept[1][0].keys() and kept[0][1]["identity"] == kept[1][1]["identity"]
    assert type(load_system(tmp_path / "compiled" / "best.safetensors")) is type(system)


def test_compiling_ends_after_three_shapes_and_works_for_the_next_system(tmp_path, compiler):
    from torch._dynamo.utils import counters

    compiler("eager")
    graphs = [counters["stats"]["unique_graphs"]]
    for i in range(4):  # versions enough for the limit of eight, if they were counted together
        trained(
            "classifier", tmp_path / str(i), compile="on", steps=12
        )  # two networks; batches of 16, validations of 16 and 7
        graphs.append(counters["stats"]["unique_graphs"])
    assert [b - a for a, b in zip(graphs, graphs[1:])] == [6] * 4


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.timeout(300)
def test_the_real_compiler_gives_the_same_training(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch._dynamo.reset()
    _, plain = trained("classifier", tmp_path / "plain", validation=0.0)
    _, compiled = trained("classifier", tmp_path / "compiled", validation=0.0, compile="on")
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_the_chosen_average_is_a_system(tmp_path):
    make, images = SYSTEMS["diffusevae"]
    trained("diffusevae", tmp_path, steps=30, ema_snapshots=5)
    system, error = system_at_length(tmp_path, 0.10)
    state, (average, _) = load_tensors(tmp_path / "last.safetensors")[0], reconstruct(tmp_path, 0.10)
    own = system.state_dict()
    assert error < 1e-6 and not system.training and type(system) is DiffuseVAE
    assert average.keys() == {k for k in own if k.startswith("denoiser.")}
    assert all(torch.equal(own[k], average[k]) for k in average)
    assert all(torch.equal(own[k], state[f"model.{k}"]) for k in own if k not in average)  # the frozen VAE
    assert any(not torch.equal(own[k], state[f"model.{k}"]) for k in average)


@pytest.mark.timeout(240)
def test_a_run_chooses_the_ema(tmp_path):
    tiny = {**TINY["train_ddpm"], "steps": 24, "ema_snapshots": 4, "validation": 0.1}
    runs.run("train_ddpm", tmp_path / "ddpm", **tiny)
    record = runs.run(
        "choose_ema",
        tmp_path / "ema",
        model=str(tmp_path / "ddpm"),
        lengths=[0.05, 0.1, 0.2],
        repeats=2,
        device="cpu",
    )
    assert (
        record["metrics"]["length"] in (0.05, 0.1, 0.2)
        and record["artefacts"]["checkpoint"] == "best.safetensors"
    )
    assert (
        record["metrics"]["validation_loss"] == min(record["metrics"]["lengths"].values())
        and record["metrics"]["profile_errors"]["0.05"] < 1e-6
    )
    assert load_system(tmp_path / "ema" / "best.safetensors").sample(2, steps=2).shape == (2, 1, 16, 16)
    with pytest.raises(runs.RunFailed, match="was trained on 1293 images, not on"):
        runs.run(
            "choose_ema", tmp_path / "other data", model=str(tmp_path / "ddpm"), data="shapes", device="cpu"
        )
