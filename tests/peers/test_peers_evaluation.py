"""Our metrics and features against torch-fidelity's, number by number."""

from unittest.mock import patch

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusevae.core.images import load
from diffusevae.evaluation.features import extract_features, label_accuracy, load_features
from diffusevae.evaluation.metrics import (
    evaluate,
    fid,
    gaussian_baseline,
    inception_score,
    kid,
    precision_recall,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits"), load("digits", "test")


@pytest.fixture(scope="module")
def seen(digits):
    "Features and logits of training digits, test digits and G."
    judge = load_features("digits", "cpu")
    images = {
        "train": digits[0].images,
        "test": digits[1].images,
        "G": gaussian_baseline(digits[0].images, 500),
    }
    return {name: extract_features(x, judge, device="cpu") for name, x in images.items()}


def clouds(n, m, d, seed=0):
    "Two correlated clouds of features, not of one law."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) / d**0.5
    return torch.randn(n, d, generator=g) @ mix, torch.randn(m, d, generator=g).abs() @ mix + 0.1


def pairs(seen):
    return [
        (seen["train"][0], seen["test"][0]),
        (seen["train"][0], seen["G"][0]),
        clouds(300, 200, 32),
        clouds(100, 120, 256, seed=1),
    ]


def theirs_fid(real, fake):
    stats = [fid_features_to_statistics(f.double()) for f in (real, fake)]
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def test_fid_is_torch_fidelitys(seen):
    for real, fake in pairs(seen):
        assert fid(real, fake) == pytest.approx(theirs_fid(real, fake), rel=1e-3)


@pytest.mark.parametrize("name", ["train", "test", "G"])
def test_inception_score_with_one_split_is_torch_fidelitys(seen, name):
    logits = seen[name][1]
    assert inception_score(logits)[0] == pytest.approx(
        isc_features_to_metric(logits, splits=1)["inception_score_mean"], rel=1e-6
    )


def test_inception_score_with_ten_splits_is_near_torch_fidelitys(seen):
    logits = seen["train"][1]  # the shuffles differ
    theirs = isc_features_to_metric(logits, splits=10)
    mean, deviation = inception_score(logits, splits=10)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=0.02)
    assert 0 < deviation < 5 * theirs["inception_score_std"]


def test_kid_of_all_images_is_torch_fidelitys():
    real, fake = clouds(200, 200, 16)
    theirs = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=1, kid_subset_size=200, kid_kernel="poly", verbose=False
    )
    assert kid(real, fake, subsets=1) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(seen, k):
    for real, fake in pairs(seen):
        theirs = prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=k, verbose=False)
        slack = 2 / min(len(real), len(fake))  # a point on the very rim of a ball may round either way
        assert precision_recall(real, fake, k) == pytest.approx(
            (theirs["precision"], theirs["recall"]), abs=slack
        )


def test_evaluate_puts_the_same_numbers_together(digits, seen):
    found = evaluate(digits[0].images, digits[1].images, "digits", kid_subsets=2, device="cpu")
    assert found["fid"] == pytest.approx(theirs_fid(seen["train"][0], seen["test"][0]), rel=1e-3)
    assert found["inception_score"] == pytest.approx(
        isc_features_to_metric(seen["test"][1], splits=1)["inception_score_mean"], rel=1e-5
    )
    assert (found["n"], found["n_real"]) == (360, 1437)


@pytest.fixture(scope="module")
def extractor():
    "torch-fidelity's extractor with random weights under which signals keep their size."
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"), patch("torch.load"):
        network = FeatureExtractorInceptionV3(
            "random", ["2048", "logits_unbiased"], feature_extractor_weights_path="none"
        )
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    return network


def test_inception_from_a_file_sees_what_torch_fidelitys_sees(extractor, tmp_path, monkeypatch):
    torch.save(extractor.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("DIFFUSEVAE_INCEPTION", str(tmp_path / "weights.pth"))
    network, g = load_features("inception", "cpu"), torch.Generator().manual_seed(0)
    for shape in ((3, 3, 32, 32), (2, 1, 16, 16)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        for ours, theirs in zip(
            extract_features(images, network, batch_size=4, device="cpu"),
            extractor(images.expand(-1, 3, -1, -1)),
        ):
            assert theirs.std() > 0.01
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_inceptions_file_nothing_stands_in_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSEVAE_INCEPTION", str(tmp_path / "missing.pth"))
    with pytest.raises(RuntimeError, match="weights-inception-2015-12-05-6726825d.pth"):
        load_features("inception")
    monkeypatch.delenv("DIFFUSEVAE_INCEPTION")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with (
        patch("urllib.request.urlopen", side_effect=OSError("no network")),
        pytest.raises(RuntimeError, match="DIFFUSEVAE_INCEPTION"),
    ):
        load_features("inception")
    assert not list(tmp_path.rglob("*.pth"))


def test_the_shipped_classifier_knows_the_test_digits(digits):
    assert label_accuracy(digits[1], "digits", "cpu") >= 0.98
