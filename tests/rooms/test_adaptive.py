"""Adaptive conditioning and adaptive effort at tiny sizes: spreads, gates, gated systems trained, saved and
sampled, kept answers, fitted efforts, bad input.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny import BRIEF, awake

from diffusevae.autoencoders.flows import IAF
from diffusevae.autoencoders.hierarchical import HierarchicalVAE
from diffusevae.autoencoders.priors import FlowPrior
from diffusevae.autoencoders.vae import VAE
from diffusevae.core.checkpoints import load_system, save_system
from diffusevae.core.pixels import Batch, ImageSet
from diffusevae.core.training import Settings, train
from diffusevae.diffusion import samplers
from diffusevae.diffusion.conditions import Cond, null_condition
from diffusevae.diffusion.dit import DiT
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.evaluation.comparison import paired_interval
from diffusevae.hybrid.adaptive import (
    AdaptiveDiffuseVAE,
    ConstantGate,
    FixedGate,
    Gated,
    LearnedGate,
    calibrate,
    pixel_spread,
    with_wider_condition,
)
from diffusevae.hybrid.diffusevae import DiffuseVAE
from diffusevae.hybrid.effort import (
    Effort,
    KeptX0,
    fit_effort,
    refine_by_drift,
    sample_adaptive,
    uncertainty_measures,
)

both_forms = pytest.mark.parametrize("form", [1, 2])
both_colours = pytest.mark.parametrize("channels", [1, 3])


pytestmark = pytest.mark.usefixtures("one_thread")


def vae(channels=1, **how):
    return VAE(8, channels, z_dim=3, width=4, levels=1, **how).eval()


def net(channels=1, extra=1, **how):
    return awake(UNet(8, channels, width=8, multipliers=(1, 1), image_channels=channels + extra, **how))


def process(predict="v", **how):
    return Diffusion(Schedule(cosine(40)), predict, **how)


def adaptive(gate, channels=1, form=1, predict="v", use_z=False, **how):
    return AdaptiveDiffuseVAE(
        vae(channels), net(channels, z_dim=3 if use_z else 0), process(predict), gate, form, use_z, **how
    ).eval()


def published(channels=1, form=1, predict="v", **how):
    return DiffuseVAE(
        vae(channels), net(channels, extra=0, **how), process(predict), form, use_z=bool(how)
    ).eval()


# ---------------------------------------------------------------- spread


@both_colours
@pytest.mark.parametrize("flow", [None, IAF(3, layers=2, hidden=8, context=2)])
def test_spread_belongs_to_the_image(channels, flow):
    first, x = vae(channels, flow=flow), torch.rand(3, channels, 8, 8) * 2 - 1
    s = pixel_spread(first, x)
    assert s.shape == (3, 1, 8, 8) and (s > 0).all() and torch.equal(s, pixel_spread(first, x))
    assert torch.allclose(s[1:2], pixel_spread(first, x[1:2]), atol=1e-5) and not torch.equal(
        s, pixel_spread(first, x, seed=1)
    )


@pytest.mark.parametrize("flow", [False, True])
def test_spread_is_that_of_the_posterior(flow):
    """Orthogonal directions of the typical length against as many independent draws of `posterior_sample`,
    through decoders that are not linear.
    """
    first, x = (
        VAE(8, z_dim=24, width=4, levels=1, flow=IAF(24, layers=2, hidden=8) if flow else None),
        torch.rand(1, 1, 8, 8),
    )
    with torch.no_grad():
        drawn = first.decode(first.posterior_sample(x.expand(3000, -1, -1, -1))[0])
    assert torch.allclose(pixel_spread(first, x, 3000)[0], drawn.std(0), rtol=0.12)


def test_colours_are_pooled():
    first = vae(3)
    first.decode = lambda z: (
        z[:, :, None, None] * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    )
    x = torch.rand(1, 3, 8, 8)
    std = first.encode(x).stddev[0].detach()
    wanted = ((std * torch.tensor([1.0, 2.0, 3.0])) ** 2).mean().sqrt()
    assert torch.allclose(pixel_spread(first, x, 3000), wanted.expand(1, 1, 8, 8), rtol=0.01)


@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_calibration_finds_what_is_missed(offset):
    first = vae()
    first.reconstruct = lambda x: x + offset + pixel_spread(first, x, 64) * torch.randn_like(x)
    x = torch.rand(200, 1, 8, 8)
    assert abs(calibrate(first, x, 64)["residual"] - max(offset**2, 1e-4)) < 0.02


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantGate(0.3),
        FixedGate,
        lambda: FixedGate(prior=3.0),
        lambda: awake(LearnedGate(3, width=4)),
    ],
)
def test_gates_lie_in_range_and_know_nothing_at_precision_0(make):
    gate, x_hat, precision = (
        make(),
        torch.rand(2, 3, 5, 5),
        torch.tensor([0.0, 1e-6, 1.0, 1e6, 30.0]).expand(2, 1, 5, 5),
    )
    for snr in (0.0, 1e-12, 1.0, 1e12):
        g = gate(x_hat, precision, torch.full((2, 1, 1, 1), snr))
        assert (
            g.shape == (2, 1, 5, 5)
            and g.isfinite().all()
            and 0 <= g.min()
            and g.max() <= 1
            and not g[..., 0].any()
        )


def test_rule_is_monotone_in_what_it_weighs():
    levels, precision = torch.logspace(-3, 3, 20), torch.tensor(5.0)
    assert (FixedGate()(None, precision, levels).diff() < 0).all() and (
        FixedGate()(None, levels, precision).diff() > 0
    ).all()
    assert FixedGate(prior=2.0)(None, precision, levels[0]) < FixedGate()(None, precision, levels[0])


@both_colours
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_widened_is_the_same_until_trained(channels, kind):
    old = (
        net(channels, extra=0, patch=2)
        if kind == "unet"
        else awake(DiT(8, channels, width=16, depth=1, heads=2, image_channels=channels))
    )
    x, image, t = (
        torch.randn(2, channels, 8, 8),
        torch.randn(2, channels + 1, 8, 8),
        torch.tensor([3.0, 30.0]),
    )
    new = with_wider_condition(old)
    assert torch.allclose(new(x, t, Cond(image=image)), old(x, t, Cond(image=image[:, :channels])), atol=1e-5)
    new(x, t, Cond(image=image)).sum().backward()
    assert new.stem.weight.grad[:, -1].any()


@pytest.mark.parametrize("continuous", [False, True])
def test_gate_hears_the_level_of_each_sample(continuous):
    levels = process(continuous=continuous)
    gated, image, t = Gated(net(), FixedGate(), levels), torch.rand(2, 2, 8, 8), torch.tensor([2, 35])
    abar = levels.schedule.abar[t].float().view(2, 1, 1, 1)
    assert torch.allclose(
        gated.opening(image, levels.time_input(t)),
        image[:, 1:] / (image[:, 1:] + abar / (1 - abar)),
        rtol=1e-4,
    )
    free = gated(image[:, :1], levels.time_input(t), null_condition(Cond(image=image)))
    assert torch.equal(
        free, gated.denoiser(image[:, :1], levels.time_input(t), Cond(image=torch.zeros_like(image)))
    )


# ---------------------------------------------------------------- the system


@both_forms
@both_colours
@pytest.mark.parametrize("use_z", [False, True])
def test_gate_1_is_diffusevae(form, channels, use_z):
    plain = published(channels, form, **({"z_dim": 3} if use_z else {}))
    open_wide = AdaptiveDiffuseVAE(
        plain.vae, with_wider_condition(plain.denoiser), plain.process, ConstantGate(1.0), form, use_z
    ).eval()
    for a, b in zip(
        plain.sample_pairs(2, seeds=[3, 4], steps=5), open_wide.sample_pairs(2, seeds=[3, 4], steps=5)
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form, changes", [(1, False), (2, True)])
def test_gate_0_leaves_the_shift_alone(form, changes):
    "In form 1 nothing of x̂ is left; in form 2 what the network sees is still y + x̂."
    model = adaptive(ConstantGate(0.0), form=form)
    y, t, x_hats = torch.randn(2, 1, 8, 8), torch.full((2,), 20.0), torch.rand(2, 2, 1, 8, 8)
    with torch.no_grad():
        one, other = (model.model(v)(y, t, model.cond(v)) for v in x_hats)
    assert torch.equal(one, other) != changes


@both_forms
@pytest.mark.parametrize(
    "channels, gate, use_z", [(1, "learned", False), (3, "learned", False), (1, "fixed", True)]
)
def test_train_save_load_sample(form, channels, gate, use_z, tmp_path):
    made = {"learned": lambda: LearnedGate(channels, width=4), "fixed": lambda: FixedGate(prior=2.0)}[gate]()
    model = adaptive(
        made, channels, form, use_z=use_z, cond_drop=0.2, slope=0.3, power=1, residual=0.02, draws=3
    )
    first, gates = (
        {k: v.clone() for k, v in part.state_dict().items()} for part in (model.vae, model.denoiser.gate)
    )
    images = ImageSet(
        torch.randint(
            0, 255, (12, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
    )
    settings = Settings(**BRIEF, steps=4, validate_every=2, checkpoint_every=2)
    assert len(list(train(model, images, settings, tmp_path))) == 4
    assert all(torch.equal(v, first[k]) for k, v in model.vae.state_dict().items())
    assert all(not torch.equal(v, gates[k]) for k, v in model.denoiser.gate.state_dict().items())

    save_system(tmp_path / "now.safetensors", model.eval())
    for path in ("now.safetensors", "best.safetensors"):
        again = load_system(tmp_path / path)
        assert type(again) is AdaptiveDiffuseVAE and (
            again.slope,
            again.power,
            again.residual,
            again.draws,
            again.form,
            again.use_z,
        ) == (0.3, 1, 0.02, 3, form, use_z)
        pair = again.sample_pairs(2, seeds=[1, 2], steps=3, guidance=0.5)
        assert [v.shape for v in pair] == [(2, channels, 8, 8)] * 2
    save_system(tmp_path / "again.safetensors", load_system(tmp_path / "now.safetensors"))
    again = load_system(tmp_path / "again.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.sample_pairs(2, seeds=[1, 2], steps=3), model.sample_pairs(2, seeds=[1, 2], steps=3)
        )
    )


@both_forms
def test_batch_of_one_ends_in_range_and_alone_is_the_same(form):
    model = adaptive(FixedGate(), channels=3, form=form)
    assert model.loss(Batch(torch.zeros(1, 3, 8, 8)))["loss"].ndim == 0
    many = model.sample_pairs(3, seeds=[4, 5, 6], steps=5)
    assert all(
        torch.allclose(a[1:2], b, atol=1e-4) for a, b in zip(many, model.sample_pairs(1, seeds=[5], steps=5))
    )
    assert many[1].abs().max() <= 1 + 1e-5


# ---------------------------------------------------------------- effort


@both_forms
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_without_drift_everything_is_as_before(form, sampler, predict):
    model, x_hat = published(form=form, predict=predict), torch.rand(3, 1, 8, 8)
    how = dict(sampler=sampler, seeds=[1, 2, 3], steps=6, start=30)
    images, calls = refine_by_drift(model, x_hat, **how)
    assert torch.allclose(images, samplers.final_image(model.steps(x_hat, **how)), atol=1e-5)
    assert calls.tolist() == [11 if sampler == "heun" else 6] * 3


@pytest.mark.parametrize("continuous", [False, True])
def test_without_drift_with_z_guidance_and_continuous_levels(continuous):
    model = DiffuseVAE(
        vae(3), net(3, extra=0, z_dim=3), process(continuous=continuous), 2, use_z=True, cond_drop=0.1
    ).eval()
    x_hat, z = torch.rand(2, 3, 8, 8), torch.randn(2, 3)
    images, calls = refine_by_drift(model, x_hat, z, guidance=1.5, seeds=[1, 2], steps=5)
    assert torch.allclose(
        images, samplers.final_image(model.steps(x_hat, z, guidance=1.5, seeds=[1, 2], steps=5)), atol=1e-5
    ) and calls.tolist() == [5, 5]
    with pytest.raises(ValueError, match="give the z"):
        refine_by_drift(model, x_hat, seeds=[1, 2])


class Half(torch.nn.Module):
    """A denoiser that is sure of dark images from the start, and changes its mind at every level about
    bright ones.
    """

    def __init__(self):
        super().__init__()
        self.size, self.channels, self.image_channels, self.asked = 8, 1, 1, []
        self.config = {"arguments": {}}

    def forward(self, x, t, cond=None):
        self.asked.append(len(x))
        return torch.where(cond.image > 0, t.view(-1, 1, 1, 1) / 40, -0.5).expand_as(x)


def test_only_those_that_are_due_are_asked():
    model = DiffuseVAE(vae(), Half(), process("x0")).eval()
    x_hat = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    images, calls = refine_by_drift(model, x_hat, seeds=[1, 2, 3], steps=40, drift=1e-3)
    assert (
        sum(model.denoiser.asked) == calls.sum()
        and model.denoiser.asked[0] == 3
        and 1 in model.denoiser.asked
    )
    assert calls[0] == calls[2] <= 12 and calls[1] > 2 * calls[0]  # strides double where nothing moves
    full, _ = refine_by_drift(model, x_hat, seeds=[1, 2, 3], steps=40)
    assert (
        torch.allclose(images[[0, 2]], full[[0, 2]], atol=1e-6) and (images[1] - full[1]).abs().max() < 0.05
    )


def test_more_drift_asks_less_and_goes_farther():
    model = published(predict="x0")
    x_hat = torch.rand(4, 1, 8, 8)
    full, _ = refine_by_drift(model, x_hat, seeds=range(4), steps=30)
    found = [refine_by_drift(model, x_hat, seeds=range(4), steps=30, drift=d) for d in (0.001, 0.03, 0.3)]
    costs, gaps = (
        [float(c.float().mean()) for _, c in found],
        [float((v - full).abs().mean()) for v, _ in found],
    )
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] and gaps[0] <= gaps[-1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(found[1], refine_by_drift(model, x_hat, seeds=range(4), steps=30, drift=0.03))
    )


@both_forms
@both_colours
def test_full_effort_is_plain_sampling(form, channels):
    model = adaptive(FixedGate(), channels, form)
    effort = Effort("spread", [0.01, 0.02], [{"steps": 5}] * 3)
    images, calls = sample_adaptive(model, 4, effort, seeds=range(4))
    assert (
        torch.allclose(images, model.sample(4, seeds=range(4), steps=5), atol=1e-5)
        and calls.tolist() == [5] * 4
    )
    one, its = sample_adaptive(model, 1, replace(effort, measure="move"), seeds=[2])
    assert torch.allclose(one, images[2:3], atol=1e-4) and its.tolist() == [6]
    torch.manual_seed(5)
    free = sample_adaptive(model, 2, effort)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(free, sample_adaptive(model, 2, effort)))


@pytest.mark.parametrize("measure", uncertainty_measures)
def test_effort_is_fitted_alike_each_time_and_survives_json(measure):
    model = published(form=2)
    x_hat = torch.rand(8, 1, 8, 8)
    how = dict(
        candidates=[{"steps": 4}, {"steps": 6, "start": 20}, {"steps": 8, "drift": 0.1}],
        full={"steps": 8},
        measure=measure,
        buckets=3,
        tolerance=0.3,
    )
    torch.manual_seed(1)
    effort = fit_effort(model, x_hat, **how)
    torch.manual_seed(2)
    assert effort == fit_effort(model, x_hat, **how) == Effort(**json.loads(json.dumps(asdict(effort))))
    assert len(effort.choices) == len(effort.fitted) in (1, 3) and all(
        f["distance"] <= 0.3 and f["evaluations"] <= 8 for f in effort.fitted
    )
    assert effort.measure == measure
    three = Effort(
        measure,
        torch.quantile(
            uncertainty_measures[measure][0](model, x_hat, seeds=range(8)), torch.tensor([1 / 3, 2 / 3])
        ).tolist(),
        [{}] * 3,
    )
    buckets, cost = three.buckets(model, x_hat, seeds=range(8))
    assert cost == (measure == "move") and sorted(buckets.unique().tolist()) == [0, 1, 2]
    strict = fit_effort(model, x_hat, **{**how, "tolerance": 1e-9})
    assert strict == Effort(
        measure, [], [{"steps": 8}], [{"distance": 0.0, "evaluations": 8.0}]
    )  # all agree: one bucket, and no measuring
    assert sample_adaptive(model, 2, strict, seeds=[1, 2])[1].tolist() == [8, 8]
    loose = fit_effort(model, x_hat, **{**how, "tolerance": 9.0})
    assert all(f["evaluations"] <= 6 for f in loose.fitted)


def test_buckets_differ_where_samples_do():
    "Samples that a late start leaves alone get it, those that it spoils do not."
    model = DiffuseVAE(vae(), Half(), process("x0")).eval()
    x_hat = torch.cat([torch.full((4, 1, 8, 8), -0.5), torch.full((4, 1, 8, 8), 1.0)])
    effort = fit_effort(
        model,
        x_hat,
        candidates=[{"steps": 1, "start": 30}],
        full={"steps": 10},
        measure="move",
        buckets=2,
        tolerance=0.1,
    )
    assert effort.choices == [{"steps": 1, "start": 30}, {"steps": 10}]


def test_a_prior_put_in_afterwards_is_sampled_from():
    model = adaptive(FixedGate())
    before = model.sample(3, seeds=range(3), steps=3)
    model.vae.prior = awake(FlowPrior(3, layers=2, hidden=8))
    assert not torch.allclose(before, model.sample(3, seeds=range(3), steps=3), atol=1e-3)


def test_paired_interval():
    a = torch.randn(400)
    value, low, high = paired_interval(lambda a, b: (b - a).mean(), a, a + 1)
    assert (
        low == pytest.approx(1, abs=1e-5)
        and high == pytest.approx(1, abs=1e-5)
        and value == pytest.approx(1, abs=1e-5)
    )  # no luck is left
    b = torch.randn(400)
    apart = [
        paired_interval(lambda a, b: b.mean() - a.mean(), a, b, resamples=300, seed=s) for s in (0, 0, 1)
    ]
    assert apart[0] == apart[1] != apart[2]  # by the seed alone
    half = 1.96 * ((a.var() + b.var()) / 400) ** 0.5
    assert abs((apart[0][2] - apart[0][1]) / 2 - half) < 0.25 * half
    narrow = paired_interval(lambda a, b: b.mean() - a.mean(), a, b, resamples=300, level=0.5)
    assert narrow[2] - narrow[1] < 0.5 * (apart[0][2] - apart[0][1])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pixel_spread(vae(), torch.zeros(1, 1, 8, 8), draws=1), "at least 2 draws"),
        (lambda: pixel_spread(vae(), torch.zeros(1, 1, 16, 16)), "16"),
        (
            lambda: pixel_spread(HierarchicalVAE(8, z_dim=3, width=4, levels=1), torch.zeros(1, 1, 8, 8)),
            "no Gaussian over one code",
        ),
        (lambda: ConstantGate(-0.1), r"\[0, 1\], got -0.1"),
        (lambda: FixedGate(prior=float("nan")), "prior must be a finite number of at least 0, got nan"),
        (lambda: Gated(net(extra=0), FixedGate(), process()), "image_channels=2, not 1"),
        (
            lambda: Gated(net(), FixedGate(), process())(torch.zeros(1, 1, 8, 8), torch.zeros(1)),
            "needs a condition whose image",
        ),
        (lambda: AdaptiveDiffuseVAE(vae(), net(3), process(), FixedGate()), "takes 3 × 8 × 8"),
        (lambda: AdaptiveDiffuseVAE(vae(), net(z_dim=3), process(), FixedGate()), "z_dim=0, not 3"),
        (lambda: adaptive(FixedGate(), form=3), "form must be one of 1, 2; got 3"),
        (lambda: adaptive(FixedGate(), slope=-1.0), "slope ≥ 0"),
        (lambda: adaptive(FixedGate(), residual=0.0), "residual > 0"),
        (lambda: adaptive(FixedGate(), draws=1), "at least 2 draws"),
        (lambda: KeptX0(published(), drift=-1), "drift must not be negative"),
        (lambda: refine_by_drift(published(), torch.zeros(2, 1, 8, 8), drift=0.1, guidance=1.0), "cond_drop"),
        (lambda: refine_by_drift(published(), torch.zeros(2, 1, 8, 8), seeds=[1]), "1 seeds for 2 samples"),
        (lambda: Effort("age", [], [{}]), "measure must be one of spread, move"),
        (lambda: Effort("spread", [0.2, 0.1], [{}] * 3), "rising"),
        (lambda: Effort("spread", [0.1], [{}]), "need 2 choices"),
        (lambda: fit_effort(published(), torch.zeros(2, 1, 8, 8), tolerance=0.0), "positive tolerance"),
        (lambda: fit_effort(published(), torch.zeros(2, 1, 8, 8), buckets=3), "no more buckets than samples"),
        (
            lambda: sample_adaptive(published(), 3, Effort("spread", [], [{}]), seeds=[1]),
            "1 seeds for 3 samples",
        ),
        (lambda: paired_interval(lambda a, b: 0.0, torch.zeros(3), torch.zeros(2)), "got 3 and 2 rows"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
