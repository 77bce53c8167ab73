"""The refiner on images from elsewhere, at tiny sizes: in both forms, grey and coloured, with z, by seed,
held to what is known, and the run notebook.
"""

import json

import numpy as np
import pytest
import torch
from tiny import awake

from diffusevae.autoencoders.autoencoder import AutoEncoder
from diffusevae.autoencoders.codes import code_of, fitted_codes
from diffusevae.autoencoders.flows import IAF
from diffusevae.autoencoders.hierarchical import HierarchicalVAE
from diffusevae.autoencoders.vae import VAE
from diffusevae.cli import main
from diffusevae.core import records, runs
from diffusevae.core.checkpoints import save_system
from diffusevae.core.corruptions import corrupt, corruptions
from diffusevae.diffusion import samplers
from diffusevae.diffusion.conditions import Cond
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine, linear
from diffusevae.diffusion.unet import UNet
from diffusevae.evaluation.comparison import evaluations_of
from diffusevae.hybrid.diffusevae import DiffuseVAE
from diffusevae.hybrid.refiner import (
    Consistent,
    consistent,
    filter_baseline,
    mean_refinement,
    mean_squared_distance,
    refine,
    responses,
)

both_forms = pytest.mark.parametrize("form", [1, 2])


pytestmark = pytest.mark.usefixtures("one_thread")


def system(
    form=1, channels=1, size=8, use_z=False, predict="v", vae=None, cond_drop=0.0, T=40, continuous=False
):
    vae = vae or VAE(size, channels, z_dim=3, width=4, levels=1)
    net = UNet(
        size,
        channels,
        width=8,
        multipliers=(1, 1),
        image_channels=channels,
        z_dim=vae.z_dim if use_z else 0,
        dropout=0.3,
    )
    awake(net)
    return DiffuseVAE(
        vae,
        net,
        Diffusion(Schedule(cosine(T)), predict, continuous=continuous),
        form,
        use_z,
        cond_drop=cond_drop,
    )


def pictures(n=4, channels=1, size=8):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@both_forms
@pytest.mark.parametrize("channels, use_z", [(1, False), (3, False), (1, True)])
def test_it_is_the_models_own_walk(form, channels, use_z):
    model, x = system(form, channels, use_z=use_z), pictures(4, channels)
    out = refine(model, x, seeds=range(4), steps=5)
    z = model.vae.encode(x).mean if use_z else None
    by_hand = samplers.final_image(model.eval().steps(x, z, seeds=range(4), steps=5))
    assert out.shape == x.shape and torch.equal(out, by_hand) and not out.requires_grad
    assert torch.allclose(refine(model, x[2:3], seeds=[2], steps=5), out[2:3], atol=1e-5)
    assert torch.allclose(refine(model, x, seeds=range(4), steps=5, batch_size=3), out, atol=1e-5)


@pytest.mark.parametrize(
    "vae",
    [
        VAE(8, z_dim=3, width=4, levels=1, flow=IAF(3, hidden=8, context=0)),
        HierarchicalVAE(8, z_dim=2, z_channels=(1,), width=8, levels=1),
    ],
    ids=["flow", "levels"],
)
def test_codes_without_a_draw(vae):
    x = pictures()
    vae.eval()
    assert torch.equal(code_of(vae, x), code_of(vae, x)) and code_of(vae, x).shape == (4, vae.z_dim)
    assert refine(system(use_z=True, vae=vae), x, seeds=range(4), steps=2).isfinite().all()


def test_draws_and_their_mean():
    model, x = system(), pictures()
    drawn = refine(model, x, draws=3, seeds=range(4), steps=4)
    assert drawn.shape == (3, 4, 1, 8, 8) and torch.equal(drawn[0], refine(model, x, seeds=range(4), steps=4))
    assert len({round(float(d.sum()), 4) for d in drawn}) == 3
    assert torch.allclose(mean_refinement(model, x, 3, seeds=range(4), steps=4), drawn.mean(0))
    torch.manual_seed(3)
    loose = refine(model, x, steps=4)
    torch.manual_seed(3)
    assert torch.equal(refine(model, x, steps=4), loose) and not torch.equal(refine(model, x, steps=4), loose)


def test_modes_are_left_as_they_were():
    model = system().train()
    refine(model, pictures(), seeds=range(4), steps=2, known=("blur", 1.0))
    assert model.training and model.denoiser.training and not model.vae.training
    with pytest.raises(ValueError, match="start must lie"):
        refine(model, pictures(), start=40)
    assert model.denoiser.training
    model.eval()
    refine(model, pictures(), seeds=range(4), steps=2, known=("blur", 1.0))
    assert not any(m.training for m in model.modules())


def test_start_and_guidance_reach_the_walk():
    model, x = system(cond_drop=0.1), pictures()
    near = refine(model, x, seeds=range(4), steps=1, start=0, clip=False)
    t = torch.zeros(4, dtype=torch.long)
    x_0 = model.process.add_noise(x, samplers.Noise(x.shape, range(4))(), t)
    with torch.no_grad():
        assert torch.allclose(
            near, model.process.to_x0(model.denoiser.eval()(x_0, t.float(), Cond(image=x)), x_0, t), atol=1e-5
        )
    assert not torch.allclose(
        refine(model, x, seeds=range(4), steps=4, guidance=2.0),
        refine(model, x, seeds=range(4), steps=4),
        atol=1e-3,
    )


@both_forms
@pytest.mark.parametrize("predict, continuous", [("eps", False), ("x0", True), ("v", False), ("v", True)])
@pytest.mark.parametrize("kind, severity", [("lowres", 2.0), ("blur", 0.8)])
def test_held_to_what_is_known(form, predict, continuous, kind, severity):
    """The harmed answer is nearer to the harmed image than without, whatever the network says; here it says
    nonsense.
    """
    model, x = system(form, predict=predict, continuous=continuous), pictures(6)
    x = corruptions["blur"](x, 1.5)  # natural enough not to be clipped
    x_hat = corruptions[kind](x, severity)
    off = [
        float(
            (corruptions[kind](refine(model, x_hat, seeds=range(6), steps=8, known=known), severity) - x_hat)
            .abs()
            .mean()
        )
        for known in (None, (kind, severity))
    ]
    assert off[1] < 0.4 * off[0]
    assert Consistent(model, kind, severity).refiner is model


def test_held_by_a_projection_is_exact():

    def average(v):
        return torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(v, 2), scale_factor=2)

    process, x = Diffusion(Schedule(linear(50)), "eps"), pictures(3) / 4
    walk = samplers.ddim(
        consistent(lambda x_t, t, cond=None: torch.sin(9 * x_t), process, average(x), average),
        process,
        torch.randn(3, 1, 8, 8),
        steps=9,
        clip=False,
    )
    assert torch.allclose(average(samplers.final_image(walk)), average(x), atol=1e-4)


def test_a_learned_variance_stays():
    process, x = Diffusion(Schedule(cosine(50)), "v", "learned_range"), pictures(2)
    out = torch.randn(2, 2, 8, 8)
    held = consistent(lambda x_t, t, cond=None: out, process, x, lambda v: v)(x, torch.tensor([3.0, 40.0]))
    assert torch.equal(held[:, 1:], out[:, 1:])
    assert torch.allclose(
        process.to_x0(held, x, torch.tensor([3, 40])), x, atol=1e-4
    )  # with degrade(x) = x only x̂ is left


def test_responses_are_paired():
    model, x = system(), pictures(5)
    pairs = list(responses(model, x, "noise", [0.0, 0.2, 0.4, 0.2], range(5), seed=3, steps=3))
    assert torch.equal(pairs[0][0], x) and torch.equal(pairs[0][1], refine(model, x, seeds=range(5), steps=3))
    assert all(torch.equal(a, b) for a, b in zip(pairs[1], pairs[3]))
    unclipped = (pairs[2][0].abs() < 1) & (pairs[1][0].abs() < 1)
    assert torch.allclose(
        (pairs[2][0] - x)[unclipped], 2 * (pairs[1][0] - x)[unclipped], atol=1e-5
    )  # one noise, scaled
    assert mean_squared_distance(*pairs[0]) >= 0 and mean_squared_distance(x, x + 0.5) == pytest.approx(0.25)


def test_the_best_filter_of_its_kind():
    clean = torch.nn.functional.interpolate(pictures(200, size=2), size=16, mode="bilinear")
    noisy = corrupt(clean, "noise", 0.3, torch.Generator().manual_seed(0))
    filtered = filter_baseline(clean, noisy, "noise", 0.3, torch.Generator().manual_seed(1))
    assert (
        mean_squared_distance(filtered, clean) < 0.3 * mean_squared_distance(noisy, clean)
        and filtered.abs().max() <= 1
    )


def test_fewer_codes_than_dimensions():
    codes = torch.randn(5, 2, 3, 3)
    drawn = fitted_codes(codes, 7, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 2, 3, 3) and drawn.isfinite().all()
    assert torch.equal(drawn, fitted_codes(codes, 7, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "images, more, message",
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), {}, "convert uint8 images"),
        (255 * pictures().abs(), {}, "must lie in"),
        (pictures() * 1.5, {}, "must lie in"),
        (pictures(channels=3), {}, "refines images of 1 × 8 × 8, got 3 × 8 × 8"),
        (pictures(size=16), {}, "got 1 × 16 × 16"),
        (pictures()[0], {}, "batch of one"),
        (pictures(), {"draws": 0}, "draws must be a finite number of at least 1, got 0"),
        (pictures(), {"seeds": [1, 2]}, "2 seeds for 4 images"),
        (pictures(), {"known": ("noise", 0.1)}, "known must be one of blur, lowres; got 'noise'"),
        (pictures(), {"known": ("blur", -1.0)}, "the severity of blur"),
        (pictures(), {"guidance": 1.0}, "cond_drop"),
        (pictures(), {"sampler": "euler"}, "sampler must be one of"),
    ],
)
def test_refused_before_any_work(images, more, message):
    model = system()
    model.denoiser.forward = lambda *_: pytest.fail("the network was asked")
    with pytest.raises(ValueError, match=message):
        refine(model, images, **more)


def test_what_refines_nothing():
    with pytest.raises(ValueError, match="VAE refines nothing"):
        refine(system().vae, pictures())


# ---------------------------------------------------------------- the run notebook


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "A tiny refiner of digits, and a plain autoencoder."
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_system(folder / "tiny.safetensors", system(size=16).eval())
    save_system(folder / "plain.safetensors", AutoEncoder(16, width=4).eval())
    return folder


COMMON = dict(steps=2, n=16, draws=2, averaged=3, batch_size=8, filtered=32, device="cpu")


@pytest.mark.timeout(240)
def test_run_of_super_resolution(shelf, tmp_path):
    runs.run(
        "refine",
        tmp_path / "sr",
        model=str(shelf / "tiny.safetensors"),
        task="lowres",
        severities=[2, 4.0],
        consistent=True,
        **COMMON,
    )
    record = records.read_record(tmp_path / "sr")
    found = record["metrics"]["models"]
    assert set(found) == {f"{who}, lowres {s}" for who in ("tiny", "harmed", "baseline") for s in (1, 2, 4)}
    one = found["tiny, lowres 4"]
    assert (
        {"fid", "psnr", "psnr_mean", "distance", "fid_over_clean", "n", "network_evaluations"} <= one.keys()
        and one["n"] == 16
        and one["network_evaluations"] == 2
    )
    assert (
        found["tiny, lowres 1"]["distance"] == 0 == found["harmed, lowres 1"]["distance"]
        and found["harmed, lowres 4"]["distance"] > found["harmed, lowres 2"]["distance"] > 0
    )
    assert found["harmed, lowres 4"] == {
        k: v for k, v in found["baseline, lowres 4"].items() if k in found["harmed, lowres 4"]
    }  # its best filter is none
    assert evaluations_of(tmp_path)["models"]["tiny, lowres 2"]["fid"] == found["tiny, lowres 2"]["fid"]
    assert [p["severity"] for p in record["metrics"]["curves"]["refined"]] == [1, 2, 4] and (
        tmp_path / "sr" / "curves.png"
    ).is_file()
    assert np.load(tmp_path / "sr" / "shown.npy").dtype == np.uint8 and "Infinity" not in json.dumps(record)


@pytest.mark.timeout(240)
def test_run_on_another_generator(shelf, tmp_path):
    runs.run(
        "refine",
        tmp_path / "ae",
        model=str(shelf / "tiny.safetensors"),
        source="other",
        other=str(shelf / "plain.safetensors"),
        task="none",
        start=20,
        **COMMON,
    )
    found = records.read_record(tmp_path / "ae")["metrics"]["models"]
    assert (
        set(found) == {"tiny of plain", "harmed of plain", "baseline of plain"}
        and "psnr" not in found["tiny of plain"]
        and found["tiny of plain"]["fid"] != found["harmed of plain"]["fid"]
    )


@pytest.mark.timeout(240)
def test_what_the_run_refuses(shelf, tmp_path, capsys):
    wrong = (
        (["task=noise", "consistent=true"], "consistent=True needs a task"),
        (["source=other"], "source=other needs another generator"),
        ([f"model={shelf / 'plain.safetensors'}"], "AutoEncoder refines nothing"),
    )
    for i, (given, sentence) in enumerate(wrong):
        options = [
            v for p in [f"model={shelf / 'tiny.safetensors'}", "device=cpu", *given] for v in ("-p", p)
        ]
        assert main(["run", "refine", "--out", str(tmp_path / f"{i}"), *options]) == 1
        assert sentence in capsys.readouterr().err, given
