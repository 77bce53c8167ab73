"""The eyes for shapes as they ship: how well they read, edits by their direction, samples of the kit's
models, and what they refuse.
"""

import json

import pytest
import torch

from diffusevae.core import runs
from diffusevae.core.checkpoints import load_system, load_tensors, pretrained, save_system, shipped_weights
from diffusevae.core.images import load as load_images
from diffusevae.core.pixels import Batch, ImageSet, to_uint8
from diffusevae.core.shapes import draw_shapes, render_shapes, shape_factors
from diffusevae.core.training import Settings, train
from diffusevae.evaluation.factors import (
    FactorRegressor,
    degrade,
    factor_change,
    numeric_factors,
    read_factors,
    read_faults,
    reading_errors,
    regression_targets,
    symmetry_order,
    train_regressor,
)
from diffusevae.evaluation.features import FromUint8, extract_features, label_accuracy, load_features
from diffusevae.evaluation.metrics import evaluate, fid

NAMES = list(shape_factors)


@pytest.fixture(scope="module")
def test_set():
    return load_images("shapes", "test")


@pytest.fixture(scope="module")
def read(test_set):
    return read_factors(test_set.images, device="cpu")


# ---------------------------------------------------------------- the shipped weights


def test_the_shipped_weights_are_small_and_say_where_they_come_from():
    file = shipped_weights / "shapes_factors.safetensors"
    info = load_tensors(file)[1]
    assert file.stat().st_size < 400_000
    assert (
        info["config"]["class"] == "diffusevae.evaluation.factors.FactorRegressor"
        and info["seed"] == 0
        and "seed=2" in info["trained_on"]
    )


def test_no_image_of_the_splits_was_trained_on(test_set):
    rows = {tuple(row) for row in draw_shapes(16_384, seed=2).attributes.tolist()}
    for images in (load_images("shapes"), test_set):
        assert not rows & {tuple(row) for row in images.attributes.tolist()}


@pytest.mark.parametrize("name", numeric_factors)
def test_each_number_is_read_well(test_set, read, name):
    error, (low, high) = reading_errors(test_set.attributes, read)[name], shape_factors[name]
    assert error["r2"] >= 0.99 and error["mae"] < 0.02 * (high - low)


def test_shapes_and_rotations_are_read_well(test_set, read):
    errors = reading_errors(test_set.attributes, read)
    assert errors["shape"]["accuracy"] >= 0.99 and errors["shape"]["accuracy"] == label_accuracy(
        test_set, "shapes", "cpu"
    )
    assert errors["rotation"]["mae"] < 3  # degrees
    for c in range(3):
        kind = test_set.labels == c
        assert (read[kind, 0] == c).double().mean() > 0.98 and float(
            read[kind, 5].abs().quantile(0.99)
        ) < 180 / symmetry_order(torch.tensor([c])) + 1e-3


def test_slightly_faulty_images_are_read_nearly_as_well(test_set):
    noise = 0.1 * torch.randn(test_set.x.shape, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.avg_pool2d(test_set.x, 3, 1, 1, count_include_pad=False)
    for x in (test_set.x + noise, soft, soft + noise):
        errors = reading_errors(test_set.attributes, read_factors(to_uint8(x), device="cpu"))
        assert errors["shape"]["accuracy"] > 0.95 and min(errors[n]["r2"] for n in numeric_factors) > 0.96


@pytest.mark.parametrize("model", ["shapes_vae", "shapes_kl", "shapes_vqvae"])
def test_reconstructions_are_read_like_their_originals(test_set, model):
    """What each model keeps: the VAE draws round blobs in the right place and colour, the first stages
    shapes too.
    """
    images = test_set[:256]
    torch.manual_seed(0)
    with torch.no_grad():
        again = to_uint8(pretrained(model).reconstruct(images.x))
    errors = reading_errors(images.attributes, read_factors(again, device="cpu"))
    assert min(errors[n]["r2"] for n in ("hue", "x", "y", "background")) > 0.95
    assert model == "shapes_vae" or errors["shape"]["accuracy"] > 0.8 and errors["size"]["r2"] > 0.8


def test_noise_and_blur_are_read(test_set):
    torch.manual_seed(0)
    x, amount = degrade(test_set.x)
    error = (read_faults(to_uint8(x), device="cpu") - amount).square().mean(0) / amount.var(0)
    assert error[0] < 0.3 and error[1] < 0.1
    clean, noisy = (
        read_faults(to_uint8(v), device="cpu")
        for v in (test_set.x, test_set.x + 0.15 * torch.randn_like(test_set.x))
    )
    assert (noisy[:, 1] > clean[:, 1] + 0.05).double().mean() > 0.99


@pytest.mark.parametrize("fault", ["noise", "blur"])
def test_fid_rises_with_each_fault(test_set, fault):
    real, x = extract_features(load_images("shapes").images, "shapes", device="cpu")[0], test_set.x
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    soft = [x]
    for _ in range(4):
        soft.append(torch.nn.functional.avg_pool2d(soft[-1], 3, 1, 1, count_include_pad=False))
    worse = [x + s * z for s in (0.0, 0.05, 0.1, 0.2, 0.4)] if fault == "noise" else soft
    curve = [fid(real, extract_features(to_uint8(v), "shapes", device="cpu")[0]) for v in worse]
    assert all(b > a for a, b in zip(curve, curve[1:])) and curve[-1] > 10 * curve[0]


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_read_in_its_direction(test_set, read, name):
    i, (low, high), factors = NAMES.index(name), shape_factors[name], test_set.attributes
    new = factors.clone()
    if name == "shape":
        new[:, 0] = (factors[:, 0] + 1) % 3
    else:
        new[:, i] += 0.15 * (high - low) * torch.where(factors[:, i] > (low + high) / 2, -1, 1)
    again = read_factors(render_shapes(new), device="cpu")
    made, seen = factor_change(factors, new)[:, i], factor_change(read, again)[:, i]
    assert (made.sign() == seen.sign()).double().mean() >= 0.98
    others = [NAMES.index(n) for n in numeric_factors if n != name]
    low, high = torch.tensor([shape_factors[NAMES[j]] for j in others]).T
    assert (factor_change(read, again)[:, others].abs().mean(0) < 0.04 * (high - low)).all()


def test_changes_of_the_rotation_go_the_short_way():
    before = torch.tensor([[c, 0, 0.3, 0, 0, 40.0, 0] for c in range(3)])
    after = before.clone()
    after[:, 5] = torch.tensor([40.0 + 90 + 5, 40 + 180 - 5, 40 - 120 + 7])
    assert torch.allclose(factor_change(before, after)[:, 5], torch.tensor([5.0, -5, 7]), atol=1e-4)
    assert torch.allclose(
        regression_targets(after)[1][0],
        regression_targets(torch.tensor([[0, 0, 0.3, 0, 0, 45.0, 0]]))[1][0],
        atol=1e-5,
    )
    assert torch.equal(before[:, 5], torch.tensor([40.0] * 3))  # left alone


def test_readings_have_gradients_for_whoever_steers_by_them(test_set):
    x = test_set.x[:2].requires_grad_()
    told = pretrained("shapes_factors").factors(x)
    assert all(
        torch.autograd.grad(told[:, i].sum(), x, retain_graph=True)[0].abs().max() > 0 for i in range(1, 7)
    )


# ---------------------------------------------------------------- the judge


def test_the_name_the_network_and_its_wrapper_judge_alike(test_set):
    real, fake, network = (
        load_images("shapes").images[:600],
        test_set.images[:300],
        pretrained("shapes_factors"),
    )
    found = [
        evaluate(real, fake, eyes, kid_subsets=1, device="cpu")
        for eyes in ("shapes", network, FromUint8(network), load_features("shapes", "cpu"))
    ]
    assert (
        all(f == found[0] for f in found[1:]) and found[0]["n"] == 300 and found[0]["inception_score"] > 2.8
    )


def test_features_have_mean_square_one_and_judge_each_image_alone(test_set):
    features, logits = extract_features(draw_shapes(1024, seed=2).images, "shapes", device="cpu")
    assert (
        features.shape == (1024, 64)
        and logits.shape == (1024, 3)
        and abs(features.square().mean() - 1) < 0.05
    )
    all_, one = (extract_features(test_set.images[:n], "shapes", device="cpu")[0] for n in (100, 1))
    assert torch.allclose(all_[:1], one, atol=1e-4)


def test_images_of_other_shapes_are_refused(test_set):
    digits = load_images("digits", "test")
    for images in (digits.images[:9], test_set.images[:9, :1], test_set.images[:9, :, :16, :16]):
        for ask in (
            lambda x: extract_features(x, "shapes", device="cpu"),
            lambda x: read_factors(x, device="cpu"),
        ):
            with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 32\)"):
                ask(images)
    for ask in (
        lambda x: extract_features(x, "shapes", device="cpu"),
        lambda x: read_factors(x, device="cpu"),
    ):
        with pytest.raises(ValueError, match="uint8"):
            ask(test_set.x[:9])
    with pytest.raises(ValueError, match="no shipped model 'shape_factors'"):
        read_factors(test_set.images[:9], "shape_factors")


# ---------------------------------------------------------------- training


def test_what_cannot_be_learnt_from_is_refused_before_the_first_step(test_set, tmp_path):
    settings = Settings(steps=2, validation=0, device="cpu")
    for images in (
        ImageSet(test_set.images[:64]),
        ImageSet(test_set.images[:64], test_set.labels[:64]),
        ImageSet(test_set.images[:64], test_set.labels[:64], attributes=test_set.attributes[:64, :3]),
    ):
        with pytest.raises(ValueError, match="images with the factors shape, hue, size"):
            list(train(FactorRegressor(width=4), images, settings, tmp_path / str(id(images))))
        assert not list(tmp_path.rglob("*.safetensors"))


def test_the_same_seed_trains_the_same_network(test_set):
    images, x = draw_shapes(200, seed=4), test_set.images[:20]

    def make():
        return FactorRegressor(width=4, features=16)

    one, same, other = (train_regressor(images, seed, steps=4, device="cpu", make=make) for seed in (0, 0, 1))
    assert torch.equal(read_factors(x, one), read_factors(x, same)) and not torch.equal(
        read_factors(x, one), read_factors(x, other)
    )
    assert abs(extract_features(images.images, one, device="cpu")[0].square().mean() - 1) < 1e-3


def test_a_network_saved_and_rebuilt_reads_the_same(test_set, tmp_path):
    network = train_regressor(
        draw_shapes(64, seed=4), steps=2, device="cpu", make=lambda: FactorRegressor(width=4, noise=0.3)
    )
    save_system(tmp_path / "own.safetensors", network)
    again = load_system(tmp_path / "own.safetensors")
    assert again.most == (1.0, 0.3) and torch.equal(
        read_factors(test_set.images[:9], again), read_factors(test_set.images[:9], network)
    )
    one = network.loss(Batch(test_set.x[:1], test_set.labels[:1], test_set.attributes[:1]))
    assert torch.isfinite(one["loss"]) and one["loss"] > one["shape"] + one["numbers"] + one["rotation"]


def test_the_run_notebook_evaluates_shapes(test_set, tmp_path):
    import numpy as np

    (tmp_path / "samples").mkdir()
    np.save(tmp_path / "samples" / "samples.npy", test_set.images[:64].numpy())
    record = {
        "metrics": {"seconds_per_1000": 1.0, "network_evaluations": 1},
        "status": "completed",
        "run": "sample",
    }
    (tmp_path / "samples" / "record.json").write_text(json.dumps(record))
    runs.run(
        "evaluate",
        tmp_path / "out",
        model=str(tmp_path / "samples"),
        data="shapes",
        features="shapes",
        n=64,
        device="cpu",
    )
    found = json.loads((tmp_path / "out" / "record.json").read_text())["metrics"]["models"]["samples"]
    assert found["precision"] > 0.7 and found["n"] == 64 and found["memorised"] == 0
