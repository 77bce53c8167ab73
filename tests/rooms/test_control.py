"""Control of DiffuseVAE at tiny sizes: paths, directions, curves, edits of samples and of real images,
other priors, and the run notebook `interpolate`.
"""

import numpy as np
import pytest
import torch
from tiny import awake, random_images
from torch.nn.functional import mse_loss

from diffusevae.autoencoders.codes import line_between, line_methods, path_through
from diffusevae.autoencoders.priors import FlowPrior, MixturePrior
from diffusevae.autoencoders.vae import VAE, draw_codes
from diffusevae.cli import main
from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system, save_system
from diffusevae.core.pixels import ImageSet
from diffusevae.core.shapes import draw_shapes
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.samplers import Noise
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid import control
from diffusevae.hybrid.diffusevae import DiffuseVAE

both_forms = pytest.mark.parametrize("form", [1, 2])


pytestmark = pytest.mark.usefixtures("one_thread")


def system(form=1, channels=1, use_z=False, size=8, T=40, std=0.05):
    """A tiny model with random numbers where a fresh one has zeros, so that its output depends on all of
    its inputs.
    """
    torch.manual_seed(0)
    vae = VAE(size, channels, z_dim=3, width=4, levels=1)
    net = UNet(size, channels, width=8, multipliers=(1,), image_channels=channels, z_dim=3 if use_z else 0)
    awake(net, std)
    return DiffuseVAE(vae, net, Diffusion(Schedule(cosine(T)), "v"), form, use_z).eval()


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_arcs_keep_the_variance_and_lines_lose_what_the_formula_says(shape):
    first, second = torch.randn(2, 60, *shape)
    for u, i in ((0.25, 1), (0.5, 2)):
        points = {
            how: torch.stack([line_between(a, b, 5, how)[i] for a, b in zip(first, second)])
            for how in line_methods
        }
        assert float(points["linear"].var()) == pytest.approx((1 - u) ** 2 + u**2, abs=0.02)
        assert float(points["spherical"].var()) == pytest.approx(1, abs=0.02)


def test_paths_pass_through_their_ends():
    ends = torch.randn(4, 5)
    for how in line_methods:
        points = path_through(ends, 3, how)
        assert points.shape == (7, 5) and torch.allclose(points[::2], ends, atol=1e-5)
    assert torch.allclose(path_through(ends[:2], 2), ends[:2])


def test_too_few_ends_are_refused_before_any_work():
    model = system()
    for make in (
        lambda: path_through(torch.randn(1, 3), 5),
        lambda: control.walk_codes(model, torch.randn(1, 3), 5),
        lambda: control.walk_noises(model, torch.randn(1, 3), torch.randn(1, 1, 8, 8), 5),
    ):
        with pytest.raises(ValueError, match="at least two ends, got 1"):
            make()
    with pytest.raises(ValueError, match="at least 2 points"):
        line_between(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(ValueError, match="method must be one of"):
        line_between(torch.zeros(3), torch.ones(3), 3, "cubic")
    with pytest.raises(ValueError, match="noise must have"):
        control.walk_noises(model, torch.randn(1, 3), torch.randn(2, 1, 8, 8).expand(2, 3, 8, 8), 5)


# ---------------------------------------------------------------- drawing with the noise in hand


@both_forms
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("channels, use_z", [(1, False), (3, True)])
def test_shared_noise_makes_a_batch_differ_by_z_only(form, sampler, channels, use_z):
    model, how = system(form, channels, use_z), dict(sampler=sampler, steps=4)
    z = draw_codes(model.vae.prior, 3, seeds=range(3))[[0, 1, 2, 1]]
    x_hat, x0 = control.draw_with_noise(model, z, seeds=5, **how)
    assert torch.allclose(x0[1], x0[3], atol=1e-5) and not torch.allclose(x0[0], x0[1], atol=1e-3)
    torch.rand(3)  # the global random state has no say
    assert torch.allclose(control.draw_with_noise(model, z[[2, 0]], seeds=5, **how)[1], x0[[2, 0]], atol=1e-5)
    assert torch.allclose(
        control.draw_with_noise(model, z[:1], seeds=5, **how)[1], x0[:1], atol=1e-5
    )  # a batch of one
    own = control.draw_with_noise(model, z, seeds=[5, 6, 7, 8], **how)[1]
    assert torch.allclose(own[0], x0[0], atol=1e-5) and not torch.allclose(own[1], own[3], atol=1e-3)
    anew = [control.draw_with_noise(model, z, seeds=None, **how)[1] for _ in range(2)]
    assert not torch.allclose(*anew, atol=1e-3)


@both_forms
def test_walks_hold_the_other_fixed(form):
    model = system(form)
    z, noises = draw_codes(model.vae.prior, 2, seeds=[0, 1]), Noise((2, 1, 8, 8), [0, 1])()
    x_hat, x0 = control.walk_codes(model, z, 4, seeds=1, steps=3)
    assert x_hat.shape == x0.shape == (4, 1, 8, 8)
    assert torch.allclose(
        x0[0], control.draw_with_noise(model, z[:1], noise=noises[1], steps=3)[1][0], atol=1e-5
    )
    assert torch.allclose(x_hat[-1], model.vae.decode(z)[1], atol=1e-5)
    x_hat, x0 = control.walk_noises(model, z[:1], noises, 4, steps=3)
    assert torch.allclose(x_hat, x_hat[:1].expand_as(x_hat), atol=1e-6) and not torch.allclose(
        x0[0], x0[-1], atol=1e-3
    )
    assert torch.equal(x0, control.walk_noises(model, z[:1], noises, 4, steps=3)[1])


@both_forms
def test_edits_share_noise_as_asked(form):
    model, z = system(form), draw_codes(system().vae.prior, 3, seeds=[0, 0, 1])
    still = {
        share: control.edit_codes(model, z, torch.zeros(3), share=share, seed=2, steps=3)
        for share in ("batch", "sample", "none")
    }
    for share, ((_, before), (_, after)) in still.items():
        assert torch.equal(before, after) == (share != "none")
        assert torch.allclose(before[0], before[1], atol=1e-5) == (share == "batch")
    pair = control.edit_codes(model, z, torch.tensor([1.0, 0, 0]), 0.5, steps=3)
    assert torch.allclose(pair[1][0], model.vae.decode(z + torch.tensor([0.5, 0, 0])), atol=1e-6)
    with pytest.raises(ValueError, match="share must be one of batch, sample, none"):
        control.edit_codes(model, z, torch.zeros(3), share="all")


# ---------------------------------------------------------------- attributes


def world(n=3000):
    "Codes that mix two correlated attributes, and their ImageSet."
    codes = torch.randn(n, 4) @ torch.randn(4, 4) + 1
    reading = torch.tensor([[1.0, 0.5, 0, 0], [0.5, 1, 0, 0]])
    return (
        codes,
        reading,
        ImageSet(
            torch.zeros(n, 1, 2, 2, dtype=torch.uint8),
            (codes[:, 0] > 1).long(),
            ("low", "high"),
            codes @ reading.T,
            ("a", "b"),
        ),
    )


@pytest.mark.parametrize("how", control.direction_methods)
def test_directions_raise_what_they_are_named_after(how):
    codes, reading, data = world()
    u = control.direction(codes, data, "a", how)
    assert reading[0] @ u > 0.1 and torch.linalg.solve_triangular(
        control.GaussianFit.of(codes).factor, u[:, None], upper=False
    ).norm() == pytest.approx(1, abs=1e-4)
    kept = control.direction(codes, data, "a", how, keep=["b"])
    assert reading[0] @ kept > 0.05 and abs(reading[1] @ kept) < 1e-3
    assert control.direction(codes, data, "high", how)[0] > 0.1  # a class
    assert torch.equal(u, control.direction(codes, data, "a", how))


def test_attributes_that_are_not_there_or_never_change():
    codes, _, data = world(50)
    same = ImageSet(data.images, data.labels, data.classes, torch.ones(50, 1), ("a",))
    for make, sentence in (
        (lambda: control.attribute_of(data, "smile"), "no attribute 'smile'; there are: a, b, low, high"),
        (lambda: control.attribute_of(ImageSet(data.images), "a"), "there are: none"),
        (lambda: control.direction(codes, same, "a"), "must change"),
        (lambda: control.direction(codes, same, "a", "regression"), "must change"),
        (lambda: control.curve_of(codes, torch.ones(50, 1)), "must change"),
        (
            lambda: control.direction(codes, data, "a", "median"),
            "method must be one of mean, logistic, regression; got 'median'",
        ),
        (lambda: control.direction(codes, data, "a", "mean", keep=["a"]), "other attributes to keep"),
        (lambda: control.direction(codes[:4], data[:4], "a"), "need more than 4 images"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_a_curve_follows_bent_codes_and_leaves_the_global_random_state():
    angle = 3 * torch.rand(1500)
    codes = torch.stack([angle.cos(), angle.sin()], 1) + 0.02 * torch.randn(1500, 2)
    state = torch.get_rng_state()
    curve = control.curve_of(codes, angle[:, None], steps=200)
    assert torch.equal(state, torch.get_rng_state())
    mean = curve(torch.linspace(0.2, 2.8, 9)[:, None])
    assert (mean.norm(dim=1) - 1).abs().max() < 0.1 and not mean.requires_grad
    assert torch.equal(
        mean, control.curve_of(codes, angle[:, None], steps=200)(torch.linspace(0.2, 2.8, 9)[:, None])
    )
    assert curve(torch.ones(1, 1)).shape == (1, 2)


def test_judgement_counts_moves_and_leaks():
    change, unrelated = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [1.0, -0.1]]), torch.ones(3, 2)
    found = control.edit_figures(change, unrelated, 0, 1)
    assert (
        found["moved"] == pytest.approx(2 / 3)
        and found["leak"] == pytest.approx(0.1)
        and found["leaks"].tolist() == pytest.approx([1, 0.1])
    )
    assert control.edit_figures(change, unrelated, 0, torch.tensor([1.0, -1, 1]))["moved"] == 1
    assert (
        control.edit_figures(change, 0 * unrelated, 0, 1)["leaks"].isfinite().all()
    )  # unrelated codes that change nothing


# ---------------------------------------------------------------- real images


@both_forms
@pytest.mark.parametrize("channels, use_z", [(1, False), (3, True)])
def test_inversion_and_back(form, channels, use_z):
    model, x = system(form, channels, use_z), random_images(3, channels, reach=0.8)
    back, edited = control.edit_real(model, x, torch.tensor([1.0, 0, 0]), 2.0, steps=20, corrections=3)
    assert 10 * torch.log10(4 / mse_loss(back, x)) > 35
    assert not torch.allclose(edited, back, atol=1e-3)
    one = control.edit_real(model, x[:1], torch.zeros(3), steps=20, corrections=3)
    assert torch.allclose(one[0], one[1])
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        control.invert_images(model, x * 2)
    with pytest.raises(ValueError, match="to_float"):
        control.invert_images(model, torch.zeros(1, channels, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError):
        control.invert_images(model, torch.zeros(1, channels, 16, 16))


@both_forms
def test_inversion_ends_where_the_sampler_begins(form, monkeypatch):
    model, z = system(form, T=400, std=0.02), torch.randn(2, 3)
    begin = 0.3 * Noise((2, 1, 8, 8), [0, 1])()
    x_hat, x0 = control.draw_with_noise(model, z, noise=begin, steps=100, clip=False)
    assert x0.abs().max() < 1  # an image that can be inverted
    monkeypatch.setattr(control, "codes_of", lambda *_: z)  # the codes that it was drawn from
    found, x_hat_found, end = control.invert_images(model, x0, steps=100, corrections=3)
    assert torch.equal(found, z) and torch.allclose(x_hat_found, x_hat)
    assert (end - begin).abs().max() < 0.05 * begin.abs().max()


@both_forms
def test_another_prior_is_sampled_saved_and_loaded(form, tmp_path):
    model = system(form)
    mixture = MixturePrior(3, 2).fit(5 + torch.randn(200, 3))
    for prior in (mixture, FlowPrior(3, layers=2, hidden=4)):
        twin = control.model_with_prior(model, prior)
        save_system(tmp_path / "twin.safetensors", twin)
        again = load_system(tmp_path / "twin.safetensors")
        assert type(again.vae.prior) is type(prior) and not any(
            p.requires_grad for p in again.vae.parameters()
        )
        assert torch.equal(again.sample(2, seeds=[0, 1], steps=3), twin.sample(2, seeds=[0, 1], steps=3))
    assert (draw_codes(control.model_with_prior(model, mixture).vae.prior, 50).mean(0) - 5).abs().max() < 1
    assert type(control.model_with_prior(model.vae, mixture).prior) is MixturePrior  # a VAE without a refiner
    assert type(model.vae.prior).__name__ == "StandardNormal"
    with pytest.raises(ValueError, match="dim=3"):
        control.model_with_prior(model, FlowPrior(4))


# ---------------------------------------------------------------- the run notebook


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("control")
    save_system(place / "digits.safetensors", system(2, size=16))
    save_system(place / "shapes.safetensors", system(1, channels=3, size=32))
    return place


def metrics_and_frames(run_dir):
    record = records.read_record(run_dir)
    assert record["status"] == "completed" and (run_dir / record["artefacts"]["pictures"]).is_file()
    return record["metrics"], np.load(run_dir / "frames.npy")


@pytest.mark.timeout(300)
def test_interpolate(models, tmp_path):
    common = dict(steps=4, n=3, device="cpu")
    runs.run(
        "interpolate", tmp_path / "z", model=str(models / "digits.safetensors"), ends=[0, 1, 2], **common
    )
    found, frames = metrics_and_frames(tmp_path / "z")
    assert (
        frames.shape == (5, 1, 16, 16)
        and frames.dtype == np.uint8
        and found["frames"] == 5
        and found["largest_step"] >= found["mean_step"] > 0
    )
    runs.run(
        "interpolate",
        tmp_path / "noise",
        model=str(models / "digits.safetensors"),
        what="noise",
        real=True,
        ends=[3, 4],
        **common,
    )
    assert metrics_and_frames(tmp_path / "noise")[1].shape == (3, 1, 16, 16)


@pytest.mark.timeout(300)
def test_interpolate_edits_attributes(models, tmp_path):
    common = dict(
        model=str(models / "shapes.safetensors"), data="shapes", what="attribute", steps=2, n=3, device="cpu"
    )
    runs.run(
        "interpolate",
        tmp_path / "curve",
        attribute="hue",
        method="curve",
        keep=["x", "square", "ellipse", "triangle"],
        ends=[0],
        judge=4,
        **common,
    )
    found, frames = metrics_and_frames(tmp_path / "curve")
    assert (
        frames.shape == (1, 3, 3, 32, 32)
        and {"x_hat_moved", "refined_moved", "refined_leak", "refined_change_size"} <= found.keys()
        and 0 <= found["x_hat_moved"] <= 1
        and found["models"]["shapes, edit hue"]["refined_moved"] == found["refined_moved"]
    )


@pytest.mark.timeout(180)
def test_an_attribute_that_the_data_lacks_is_one_sentence(models, tmp_path, capsys):
    given = [
        v
        for p in (f"model={models / 'digits.safetensors'}", "device=cpu", "what=attribute", "attribute=smile")
        for v in ("-p", p)
    ]
    assert main(["run", "interpolate", "--out", str(tmp_path / "smile"), *given]) == 1
    assert "no attribute 'smile'" in capsys.readouterr().err


def test_several_attributes_are_one_table():
    shapes = draw_shapes(30)
    assert control.attributes_of(shapes, ["hue", "size", "x", "y", "background", *shapes.classes]).shape == (
        30,
        8,
    )
