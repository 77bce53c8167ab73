"""What a DDPM is trained on and scored by: weights, bound, drawn times, labels, and what a checkpoint keeps
of them.

Where a rule is easily broken in silence, a class or function that breaks it (a mutant) is put through the
same check, which must notice.
"""

import math

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from tiny import LabelListener, random_images
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from diffusevae.core import checkpoints
from diffusevae.core.images import load
from diffusevae.core.pixels import Batch
from diffusevae.core.training import Settings, train, validate
from diffusevae.diffusion import ddpm, samplers
from diffusevae.diffusion.bound import bound_term, pixel_log_prob, variational_bound
from diffusevae.diffusion.conditions import Cond, drop_parts
from diffusevae.diffusion.ddpm import DDPM, ImportantTimes, diffusion_loss, loss_weight, squared_errors
from diffusevae.diffusion.guidance import NoisyClassifier, cfg, classifier_guided
from diffusevae.diffusion.process import Diffusion, ideal_denoiser
from diffusevae.diffusion.schedules import Schedule, cosine, linear, zero_terminal_snr
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE

LOG2 = math.log(2)


def tiny(size=16, channels=1, **more):
    return UNet(size, channels=channels, width=8, multipliers=(1, 1), **more)


def plain(predict="eps", variance="fixed_small", T=20, continuous=False):
    return Diffusion(Schedule(cosine(T)), predict, variance, continuous)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n, channels=1, size=16, seed=0):
    return random_images(n, channels, size, seed)


# ---------------------------------------------------------------- loss and weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_diffusers(gamma):
    "Their training scripts: min(snr, γ) / snr for eps, over snr + 1 for v."
    t, betas = torch.arange(1000), linear(1000)
    scheduler = diffusers.DDPMScheduler(trained_betas=betas.tolist())
    scheduler.alphas_cumprod = Schedule(betas).abar  # theirs is float32
    snr = compute_snr(scheduler, t).double()
    least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    for predict, theirs in (("eps", least / snr), ("v", least / (snr + 1)), ("x0", least)):
        ours = loss_weight(Diffusion(Schedule(betas), predict), t, "min_snr", gamma)
        assert ours.dtype == torch.float32 and torch.allclose(ours.double(), theirs, rtol=1e-5), predict


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_p2_is_its_formula(gamma):
    "Choi et al. 2022, equation 8 with k = 1, for eps; 0 turns it off there."
    process, t = plain(T=1000), torch.arange(1000)
    abar = process.schedule.abar
    assert torch.allclose(loss_weight(process, t, "p2", gamma).double(), (1 - abar) ** gamma, rtol=1e-5)
    assert torch.equal(loss_weight(process, t, "p2"), loss_weight(process, t, "p2", 1.0))


def test_plain_loss_draws_as_ever():
    """First t, then noise, and nothing else: old seeds repeat. DiffuseVAE's call, with a condition, is the
    same.
    """
    process, x0, net = plain("v"), images(7), tiny(image_channels=1)
    cond = Cond(image=images(7, seed=1))
    torch.manual_seed(3)
    t = torch.randint(process.T, (7,))
    noise = torch.randn_like(x0)
    expected = (
        (net(process.add_noise(x0, noise, t), process.time_input(t), cond) - process.target(x0, noise, t))
        .square()
        .mean()
    )
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.allclose(diffusion_loss(net, process, x0, cond), expected, rtol=1e-5) and torch.equal(
        torch.get_rng_state(), after
    )


def test_weight_of_a_continuous_level_is_that_of_the_level():
    process, seen = plain("x0", continuous=True), []
    t = torch.arange(20).repeat(50)
    losses = squared_errors(
        lambda x, u, cond=None: seen.append(u) or torch.zeros_like(x),
        process,
        torch.ones(1000, 1, 2, 2),
        t,
        weight="min_snr",
    )
    abar = seen[0].double() ** 2
    assert torch.allclose(losses.double(), (abar / (1 - abar)).clamp(max=5.0), rtol=1e-3)
    root = process.schedule.sqrt_abar
    above = torch.cat([torch.ones(1), root[:-1]])
    assert (
        (seen[0] >= root[t] - 1e-6).all()
        and (seen[0] <= above[t] + 1e-6).all()
        and len(seen[0].unique()) > 900
    )


def leaking(model, process, x0, t, cond=None):
    "Mutant: L_hybrid whose bound moves the mean too."
    noise = torch.randn_like(x0)
    x_t = process.add_noise(x0, noise, t)
    out = model(x_t, process.time_input(t), cond)
    squares = (out[:, : x0.shape[1]] - process.target(x0, noise, t)).square().mean((1, 2, 3))
    return squares + 1e-3 * process.T * bound_term(process, out, x0, x_t, t, clip=False)


def mean_of_hybrid_learns_from_the_simple_loss_alone(losses):
    x0, t = images(20, 2, 4), torch.arange(20)
    out = (0.3 * torch.randn(20, 4, 4, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    grads = []
    for p, o in ((plain("x0", "learned_range"), losses), (plain("x0"), squared_errors)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(o(lambda *_: out, p, x0, t).sum(), out)[0])
    assert torch.equal(grads[0][:, :2], grads[1][:, :2]), "the bound moves the mean"
    assert grads[0][:, 2:].abs().min() > 0 and not grads[1][:, 2:].any(), "the variance does not learn"


def test_hybrid_is_a_thousandth_of_the_whole_bound():
    """L_vlb is a sum over t, of which one term stands for all T.

    Nichol and Dhariwal 2021, equation 16, in nats.
    """
    process, x0, t, out, kept = (
        plain("x0", "learned_range"),
        images(20, 1, 4),
        torch.arange(20),
        0.5 * images(20, 2, 4, seed=1),
        [],
    )
    torch.manual_seed(0)
    hybrid = squared_errors(lambda x, *_: kept.append(x) or out, process, x0, t)
    extra = hybrid - (out[:, :1] - x0).square().mean((1, 2, 3))
    assert torch.allclose(
        extra, 0.001 * 20 * bound_term(process, out, x0, kept[0], t, clip=False), rtol=1e-4, atol=1e-6
    )


def test_hybrid():
    mean_of_hybrid_learns_from_the_simple_loss_alone(squared_errors)
    with pytest.raises(AssertionError, match="moves the mean"):
        mean_of_hybrid_learns_from_the_simple_loss_alone(leaking)


# ---------------------------------------------------------------- the bound


def step_back(process, x0, x_t, i):
    "Mean and variance of q(x_{t-1} | x_t, x0) by Bayes' rule on two Gaussians."
    beta, before = process.schedule.betas[i], process.schedule.abar[i - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    return ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x0 / (1 - before)) / precision, 1 / precision


def independent_terms(net, process, x0, discrete):
    "L_0, L_1 … in nats per dimension, by torch.distributions, one t after another."
    smallest = step_back(process, x0, x0, 1)[1]
    for i in range(process.T):
        t = torch.randint(i, i + 1, (len(x0),))
        x_t = process.add_noise(x0, torch.randn_like(x0), t)
        out = net(x_t, process.time_input(t))
        guess, beta = out[:, : x0.shape[1]].clamp(-1, 1), process.schedule.betas[i]
        mean, small = step_back(process, guess, x_t, i) if i else (guess, smallest)
        variance = {"fixed_small": small, "fixed_large": beta}.get(process.variance)
        if variance is None:
            f = (out[:, x0.shape[1] :] + 1) / 2
            variance = beta**f * small ** (1 - f)
        model = Normal(mean, torch.as_tensor(variance).sqrt().expand_as(mean))
        if i:
            yield kl_divergence(Normal(step_back(process, x0, x_t, i)[0], small.sqrt()), model).mean(
                (1, 2, 3)
            )
        elif discrete:
            top = torch.where(x0 > 0.999, 1.0, model.cdf(x0 + 1 / 255))
            yield -(top - torch.where(x0 < -0.999, 0.0, model.cdf(x0 - 1 / 255))).log().mean((1, 2, 3))
        else:
            yield -model.log_prob(x0).mean((1, 2, 3))


@pytest.mark.parametrize("discrete", [True, False], ids=["pixels", "density"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_bound_is_an_independent_computation(variance, discrete):
    process = Diffusion(Schedule(linear(12, 0.001, 0.4)), "x0", variance)
    x0 = ((images(5, 3, 4).double() + 1) * 127.5).round() / 127.5 - 1
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # black and white

    def net(x, t, cond=None):
        guess = 0.98 * x + 0.02 * torch.sin(x + t.double().reshape(-1, 1, 1, 1))
        return torch.cat([guess, torch.cos(3 * x)], dim=1) if variance == "learned_range" else guess

    torch.manual_seed(0)
    ours = variational_bound(net, process, x0, discrete=discrete)
    torch.manual_seed(0)
    theirs = torch.stack(list(independent_terms(net, process, x0, discrete)))
    abar = process.schedule.abar[-1]
    prior = kl_divergence(
        Normal(abar.sqrt() * x0, (1 - abar).sqrt().expand_as(x0)),
        Normal(torch.zeros(()).double(), torch.ones(()).double()),
    )
    assert torch.allclose(ours["terms"], theirs.mean(1), rtol=1e-8) and ours["prior"] == pytest.approx(
        float(prior.mean()), rel=1e-8
    )
    assert torch.allclose(ours["each"], theirs.sum(0) + prior.mean((1, 2, 3)), rtol=1e-8) and ours[
        "total"
    ] == pytest.approx(float(ours["each"].mean()))


def test_published_prior_term():
    "Ho et al. 2020, section 4: L_T of about 1e-5 bits per dimension; float32 images do not blur it."
    x0 = images(16, 3, 32)
    process = Diffusion(Schedule(linear(1000)), "x0")
    to_bits = variational_bound(lambda x, t, cond=None: x0, process, x0, every=999)["prior"] / LOG2
    a = process.schedule.abar[-1]
    assert to_bits == pytest.approx(
        float((a * x0.double().square().mean() - a - torch.log1p(-a)) / 2 / LOG2), rel=1e-3
    )
    assert 3e-6 < to_bits < 3e-5


@pytest.mark.parametrize("first, bits", [(1e-7, 0.0), (1e-3, None)])
def test_perfect_decoder(first, bits):
    """A network that knows x0 pays for the width of its last Gaussian alone: nothing when that is far below
    a bin.
    """
    x0 = ((images(8, 3, 8) + 1) * 127.5).round().clamp(1, 254) / 127.5 - 1  # grey: bins with two sides
    betas = torch.cat([torch.tensor([first], dtype=torch.float64), cosine(50)])
    process = Diffusion(Schedule(betas), "x0")
    found = variational_bound(lambda x, t, cond=None: x0, process, x0)
    last = (
        first * float(betas[1]) / (1 - (1 - first) * (1 - float(betas[1])))
    )  # the variance of the step from t = 1
    expected = -math.log2(math.erf(1 / 255 / math.sqrt(2 * last))) if bits is None else bits
    assert (found["total"] - found["prior"]) / LOG2 == pytest.approx(expected, abs=1e-4)


def test_tails_are_not_cut_off():
    """log of Φ differences far out: their size is the Gaussian's, their gradient finite, so a sure and
    wrong decoder pays in full.
    """
    mean, variance = torch.zeros(4, requires_grad=True), torch.full((4,), 1e-4, requires_grad=True)
    x0 = torch.tensor([0.6, -0.6, 1.0, -1.0])
    log_p = pixel_log_prob(x0, mean, variance)
    z = (
        0.6 - 1 / 255
    ) / 0.01  # the nearer edge of the bin; beyond it lies exp(-z² / 2) / (z √2π), to a part in z²
    assert (
        torch.allclose(-log_p[:2], torch.tensor(z**2 / 2 + math.log(z * math.sqrt(2 * math.pi))), rtol=1e-4)
        and (log_p[2:] < -4000).all()
    )
    log_p.sum().backward()
    assert mean.grad.isfinite().all() and variance.grad.isfinite().all() and mean.grad[0] > 0 > mean.grad[1]


def test_bound_of_a_gaussian_is_exact():
    """For one Gaussian every true reverse step is Gaussian: what the bound exceeds the entropy by is the KL
    between known variances.
    """
    s, centre = 0.5, torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    x0 = centre + s * randn(0, 8000, 1, 2, 2)
    for variance in ("fixed_small", "fixed_large"):
        process = Diffusion(Schedule(cosine(8)), "x0", variance)
        abar, gap = process.schedule.abar, 0.0
        for i in range(process.T):
            before = abar[i - 1] if i else torch.ones(()).double()
            of_x0 = before.sqrt() * (1 - abar[i] / before) / (1 - abar[i])
            small = (1 - before) / (1 - abar[i]) * (1 - abar[i] / before)
            true = small + of_x0**2 * s**2 * (1 - abar[i]) / (abar[i] * s**2 + 1 - abar[i])
            used = (
                (1 - abar[i] / before)
                if variance == "fixed_large"
                else (small if i else process.smallest_variance())
            )
            gap += float((true / used - 1 - (true / used).log()) / 2)
        torch.manual_seed(1)
        over = variational_bound(ideal_denoiser(process, centre, s), process, x0, clip=False, discrete=False)[
            "each"
        ] + Normal(centre, s).log_prob(x0).mean((1, 2, 3))
        error = float(over.std()) / 8000**0.5
        assert abs(float(over.mean()) - gap) < 4 * error and gap > 8 * error  # there was something to find


def test_bound_meets_the_entropy_of_a_mixture():
    centres, s = torch.tensor([[-0.8, -0.8, 0.8, 0.8], [0.8, 0.8, -0.8, -0.8], [0.8, -0.8, 0.8, -0.8]]), 0.2
    data = MixtureSameFamily(Categorical(torch.ones(3)), Independent(Normal(centres, s), 1))
    torch.manual_seed(0)
    x0 = data.sample((6000,))
    gaps = []
    for T in (20, 400):
        process = Diffusion(Schedule(cosine(T)), "v", "fixed_large")
        each = variational_bound(
            ideal_denoiser(process, centres.reshape(3, 1, 2, 2), s),
            process,
            x0.reshape(-1, 1, 2, 2),
            clip=False,
            discrete=False,
        )["each"]
        over = each + data.log_prob(x0) / 4
        gaps.append(float(over.mean()))
        assert gaps[-1] > -3 * float(over.std()) / 6000**0.5
    assert gaps[0] > 0.05 and gaps[1] < 0.02


def test_stretches_estimate_the_same_sum():
    process, x0 = plain("x0", "fixed_large", T=23), images(400, 1, 4)
    net = lambda x, t, cond=None: 0.9 * x  # noqa: E731
    torch.manual_seed(0)
    whole, parts = (
        variational_bound(net, process, x0),
        [variational_bound(net, process, x0, every=5) for _ in range(20)],
    )
    assert len(whole["terms"]) == 23 and all(len(p["terms"]) == 1 + 5 for p in parts)  # 22 = 4 × 5 + 2
    totals = torch.tensor([p["total"] for p in parts])
    assert abs(totals.mean() - whole["total"]) < 4 * totals.std() / 20**0.5 + 0.01 * whole["total"]
    assert len(variational_bound(net, process, x0, every=1000)["terms"]) == 2


def test_no_signal_at_the_end():
    "Zero terminal SNR: the prior term vanishes, and loss and bound stay numbers."
    process = Diffusion(Schedule(zero_terminal_snr(linear(50, 0.001, 0.1))), "v", "fixed_large")
    x0, net = images(6), tiny()
    found = variational_bound(net, process, x0)
    assert found["prior"] == pytest.approx(0, abs=1e-12) and math.isfinite(found["total"])
    for weight in ddpm.loss_weightings:
        assert squared_errors(net, process, x0, torch.full((6,), 49), weight=weight).isfinite().all()


# ---------------------------------------------------------------- drawn times


def filled(T, seed):
    "A memory of random losses, of very different size."
    times, g = ImportantTimes(T), torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(T, generator=g))
    for _ in range(10):
        times.update(torch.arange(T), scale * torch.rand(T, generator=g))
    return times


@pytest.mark.parametrize("seed", range(5))
def test_importance_leaves_the_mean(seed):
    T, n = 30, 40000
    times, L = filled(T, seed), torch.rand(T, generator=torch.Generator().manual_seed(seed)) + 0.1
    assert times.seen.min() == 10 and times.shares().max() > 3 / T  # far from uniform
    torch.manual_seed(seed)
    t, share = times.draw(n)
    assert torch.allclose(t.bincount(minlength=T) / n, times.shares(), atol=5 * 0.5 / n**0.5)
    assert torch.allclose(share * times.shares()[t], torch.tensor(1 / T))
    for values in (torch.ones(T), L):
        weighted = share * values[t]
        assert abs(weighted.mean() - values.mean()) < 4 * weighted.std() / n**0.5


def test_memory_is_of_the_last_ten():
    times = ImportantTimes(3)
    for i in range(9):
        times.update(torch.arange(3), torch.full((3,), 100.0 + i))
        assert torch.allclose(times.shares(), torch.tensor(1 / 3))  # not seen enough
    times.update(torch.tensor([0, 0, 1]), torch.ones(3))
    assert torch.allclose(times.shares(), torch.tensor(1 / 3)) and times.seen.tolist() == [
        11,
        10,
        9,
    ]  # t = 2 lacks one
    times.update(torch.tensor([2] + 5 * [1]), torch.ones(6))
    assert times.shares().argmin() == 1 and (times.losses[1] == 1).sum() == 6
    times.update(torch.arange(3).repeat(4), torch.tensor([1.0, 2.0, 3.0]).repeat(4))
    times.update(torch.arange(3).repeat(6), torch.tensor([1.0, 2.0, 3.0]).repeat(6))
    assert torch.allclose(times.shares(), 0.999 * torch.tensor([1.0, 2.0, 3.0]) / 6 + 0.001 / 3)


def test_importance_is_for_training_only():
    system, batch = DDPM(tiny(), plain(T=4), times="importance"), Batch(images(64))
    torch.manual_seed(0)
    for _ in range(3):
        system.train().loss(batch)
    before = system.important.losses.clone()
    assert system.important.seen.sum() == 192 and system.important.seen.min() >= 10
    torch.manual_seed(1)
    with torch.no_grad():
        judged = system.eval().loss(batch)["loss"]
        torch.manual_seed(1)
        alone = diffusion_loss(system.denoiser, system.process, batch.x)
    assert torch.equal(judged, alone) and torch.equal(system.important.losses, before)


def test_importance_leaves_the_loss_of_a_system():
    "Its mean over many batches is that of uniform times, though the times are not."
    system = DDPM(LabelListener(), plain(T=8), "p2", "importance")
    x0, label, losses = torch.zeros(500, 1, 4, 4), torch.zeros(500, dtype=torch.long), []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(60):
            losses.append(system.train().loss(Batch(x0, label))["loss"])
        even = torch.stack([system.eval().loss(Batch(x0, label))["loss"] for _ in range(60)])
    drawn = torch.stack(losses[10:])
    assert system.important.shares().max() > 2 * system.important.shares().min()
    assert (
        abs(drawn.mean() - even.mean()) < 4 * (drawn.var() / 50 + even.var() / 60) ** 0.5 < 0.05 * even.mean()
    )


def test_checkpoint_carries_what_was_seen(tmp_path):
    """A training that is stopped and resumed ends bit for bit as an undisturbed one, whose drawn times
    depend on the memory; best has no raw weight in it.
    """
    settings = Settings(steps=12, batch_size=16, warmup=0, validation=0, checkpoint_every=4, device="cpu")
    ends = []
    for folder, stop in (("whole", 0), ("halves", 7)):
        for last in [stop, 0] if stop else [0]:
            torch.manual_seed(0)
            system = DDPM(tiny(patch=4), plain("v", T=3), times="importance")
            for progress in train(system, load("digits")[:100], settings, tmp_path / folder):
                if progress.step == last:
                    break
        assert system.important.seen.sum() == 12 * 16 and not torch.allclose(
            system.important.shares(), torch.tensor(1 / 3)
        )
        ends.append(system.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
    rebuilt = checkpoints.load_system(tmp_path / "whole" / "best.safetensors")
    assert torch.equal(rebuilt.important.losses, ends[0]["important.losses"]) and torch.equal(
        rebuilt.important.seen, ends[0]["important.seen"]
    )
    raw = dict(system.named_parameters())
    assert not [k for k, p in rebuilt.named_parameters() if torch.equal(p, raw[k])]


# ---------------------------------------------------------------- labels


class NeverDrops(DDPM):
    def condition_for(self, batch):
        return Cond(label=batch.label)


class DropsInValidation(DDPM):
    def condition_for(self, batch):
        return drop_parts(Cond(label=batch.label), self.label_drop)


class OneDraw(DDPM):
    def condition_for(self, batch):
        gone = self.training and torch.rand(()) < self.label_drop
        return Cond(label=torch.full_like(batch.label, -1) if gone else batch.label)


class TakesOthers(DDPM):
    "Shuffles in place of dropping."

    def condition_for(self, batch):
        return drop_parts(
            Cond(label=batch.label.flip(0) if self.training else batch.label),
            self.label_drop if self.training else 0.0,
        )


def labels_are_dropped_as_they_should(kind):
    system, labels = kind(LabelListener(), plain(), label_drop=0.2), torch.arange(300) % 3
    system.denoiser.heard.clear()
    torch.manual_seed(0)
    for _ in range(5):
        system.train().loss(Batch(images(300, 1, 4), labels))
    heard = system.denoiser.heard
    assert all(0.1 < (h == -1).float().mean() < 0.3 for h in heard), "not each sample by its own draw"
    assert not torch.equal(heard[0] == -1, heard[1] == -1) and all(
        torch.equal(h[h >= 0], labels[h >= 0]) for h in heard
    ), "other labels"
    heard.clear()
    validate(system, load("digits")[:50], 25)
    system.eval().loss(Batch(images(300, 1, 4), labels))
    assert not any((h == -1).any() for h in heard), "dropped in validation"


def test_labels():
    labels_are_dropped_as_they_should(DDPM)


@pytest.mark.parametrize(
    "mutant, notice",
    [
        (NeverDrops, "own draw"),
        (OneDraw, "own draw"),
        (DropsInValidation, "in validation"),
        (TakesOthers, "other labels"),
    ],
)
def test_labels_of_mutants(mutant, notice):
    with pytest.raises(AssertionError, match=notice):
        labels_are_dropped_as_they_should(mutant)


def test_sampling_drops_no_label_even_from_training_mode():
    system = DDPM(LabelListener(), plain(), label_drop=0.9).train()
    system.sample(6, steps=2)
    assert system.training and all(torch.equal(h, torch.arange(6) % 3) for h in system.denoiser.heard)
    for label, expected in (
        (2, [2, 2]),
        (-1, [-1, -1]),
        ([1, -1], [1, -1]),
        (torch.tensor([0, 2], dtype=torch.uint8), [0, 2]),
    ):
        assert (
            system.cond(2, label).label.tolist() == expected
            and system.cond(2, label).label.dtype == torch.int64
        )


def test_sampling_is_without_dropout():
    torch.manual_seed(0)
    system = DDPM(tiny(dropout=0.5), plain("v")).train()
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in system.parameters()]
    assert (
        torch.equal(system.sample(2, seeds=[1, 2], steps=3), system.sample(2, seeds=[1, 2], steps=3))
        and system.training
    )


def test_unconditional_networks_ignore_the_labels_of_a_batch():
    batch = Batch(images(4), torch.arange(4))
    assert DDPM(tiny(), plain()).loss(batch)["loss"].isfinite() and DDPM(tiny(), plain()).cond(4) is None


# ---------------------------------------------------------------- samples


def test_guidance_is_that_of_the_wrappers():
    torch.manual_seed(0)
    system = DDPM(tiny(classes=3), plain("v"), label_drop=0.1).eval()
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in system.parameters()]
    x_T, cond = samplers.Noise((4, 1, 16, 16), range(4))(), Cond(label=torch.tensor([0, 1, 2, 0]))
    how = dict(interval=(2.0, 15.0), rescale=0.5)
    by_hand = samplers.final_image(
        samplers.heun(cfg(system.denoiser, 1.5, **how), system.process, 0.7 * x_T, cond=cond, steps=4)
    )
    assert torch.equal(
        system.sample(4, guidance=1.5, sampler="heun", seeds=range(4), temperature=0.7, steps=4, **how),
        by_hand,
    )
    bare = samplers.final_image(samplers.ddim(system.denoiser, system.process, x_T, cond=cond, steps=4))
    assert torch.equal(system.sample(4, seeds=range(4), steps=4), bare) and not torch.equal(bare, by_hand)


def test_classifier_guides_a_network_without_classes():
    torch.manual_seed(0)
    process = plain("v")
    system, classifier = DDPM(tiny(), process).eval(), NoisyClassifier(16, 1, 3, process, width=8).eval()
    by_hand = samplers.final_image(
        samplers.ddim(
            classifier_guided(system.denoiser, classifier, 2.0),
            process,
            samplers.Noise((3, 1, 16, 16), range(3))(),
            cond=Cond(label=torch.arange(3)),
            steps=3,
        )
    )
    assert torch.equal(
        system.sample(3, guidance=2.0, classifier=classifier, seeds=range(3), steps=3), by_hand
    )
    with pytest.raises(ValueError, match="labels must be 3 whole numbers in 0 … 2"):
        system.steps(3, label=3, guidance=2.0, classifier=classifier)


@pytest.mark.parametrize("sampler", list(samplers.samplers_by_name))
def test_samples_follow_their_seeds_in_any_batch(sampler):
    torch.manual_seed(0)
    system = DDPM(tiny(12, 3, classes=4), plain("v"), label_drop=0.1)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in system.parameters()]
    how = dict(sampler=sampler, guidance=1.0, steps=4)
    crowd, one = system.sample(5, seeds=range(5), label=2, **how), system.sample(1, seeds=[3], label=2, **how)
    assert torch.allclose(crowd[3], one[0], atol=1e-4) and torch.equal(
        crowd, system.sample(5, seeds=range(5), label=2, **how)
    )


# ---------------------------------------------------------------- kinds of data, old files, bad input


@pytest.mark.parametrize("size, channels, batch", [(12, 1, 4), (24, 3, 2), (12, 3, 1), (16, 1, 1)])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_sizes_channels_and_a_batch_of_one(size, channels, batch, variance):
    process = plain("v", variance)
    torch.manual_seed(0)
    system = DDPM(
        tiny(size, channels, classes=2, outputs=process.outputs(channels)),
        process,
        "min_snr",
        "importance",
        0.5,
    )
    x0, label = images(batch, channels, size), torch.arange(batch) % 2
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = system.train().loss(Batch(x0, label))["loss"]
        loss.backward()
        assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())
    assert system.sample(batch, sampler="ddpm", guidance=1.0, steps=3).shape == x0.shape
    found = variational_bound(system.eval().denoiser, process, x0, system.cond(batch), every=7)
    assert found["each"].shape == (batch,) and found["each"].isfinite().all() and found["total"] > 0


def test_old_configs_and_weights_still_load():
    """Before there were weights, times and labels, a config had two arguments and a checkpoint the network
    alone.
    """
    old = DDPM(tiny(), plain("v"))
    config = {**old.config, "arguments": {k: old.config["arguments"][k] for k in ("denoiser", "process")}}
    rebuilt = checkpoints.build(config)
    assert (rebuilt.weight, rebuilt.important, rebuilt.label_drop) == ("simple", None, 0.0)
    assert all(k.startswith("denoiser.") for k in old.state_dict())
    checkpoints.restore(rebuilt, old.state_dict())


def test_learned_variance_needs_both_halves_of_channels():
    learned = plain(variance="learned_range")
    DDPM(tiny(channels=3, outputs=6), learned)
    with pytest.raises(ValueError, match="must return 6 channels, not 3; build it with outputs=6"):
        DDPM(tiny(channels=3), learned)
    with pytest.raises(ValueError, match="must return 1 channels, not 2; build it with outputs=1"):
        DDPM(tiny(outputs=2), plain())
    with pytest.raises(
        ValueError, match="must return 2 channels, not 1"
    ):  # says nothing of its outputs, so it returns what it takes
        DDPM(LabelListener(), learned)
    with pytest.raises(ValueError, match="continuous levels have none"):
        DDPM(tiny(outputs=2), Diffusion(Schedule(cosine(9)), "v", "learned_range", True)).loss(
            Batch(images(2))
        )


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(weight="snr"), "weight must be one of simple, min_snr, p2; got 'snr'"),
        (dict(times="sometimes"), "times must be one of uniform, importance; got 'sometimes'"),
        (dict(label_drop=-0.1), r"label_drop must lie in \[0, 1\], got -0.1"),
        (dict(label_drop=1.1), r"label_drop must lie in \[0, 1\], got 1.1"),
        (dict(label_drop=0.1), "build the network with classes"),
    ],
)
def test_what_cannot_be_built(how, message):
    with pytest.raises(ValueError, match=message):
        DDPM(tiny(), plain(), **how)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(label=3), "labels must be 2 whole numbers in 0 … 2"),
        (dict(label=[0, 1, 2]), "labels must be 2 whole numbers"),
        (dict(label=torch.tensor([0.0, 1.0])), "labels must be 2 whole numbers"),
        (dict(label=[0, -2]), "labels must be 2 whole numbers"),
        (dict(guidance=1.0), "guidance needs a null class"),
        (dict(steps=21), "steps must lie in 1 … 20"),
        (dict(eta=2.0), "eta must lie in"),
        (dict(spacing="even"), "spacing must be one of"),
        (dict(sampler="euler"), "sampler must be one of"),
        (dict(seeds=[1, 2, 3]), "3 seeds for 2 samples"),
    ],
)
def test_what_cannot_be_sampled_fails_before_the_first_step(how, message):
    system = DDPM(LabelListener(), plain())
    with pytest.raises(ValueError, match=message):
        system.steps(2, **how)
    assert not system.denoiser.heard


@pytest.mark.parametrize(
    "label, message",
    [
        (None, "the batch has no labels"),
        (torch.tensor([0, 1, 3]), "labels must lie in 0 … 2"),
        (torch.tensor([0, 1]), "label must have shape"),
    ],
)
def test_what_cannot_be_trained_on(label, message):
    with pytest.raises(ValueError, match=message):
        DDPM(tiny(classes=3), plain(), label_drop=0.1).eval().loss(Batch(images(3), label))


def test_labels_and_guidance_for_a_network_without_classes():
    system = DDPM(tiny(), plain())
    for how, message in (
        (dict(label=0), "built without classes"),
        (dict(guidance=1.0), "guidance needs a null class"),
    ):
        with pytest.raises(ValueError, match=message):
            system.steps(2, **how)


def test_diffusevae_trains_on_any_of_it():
    "The hybrid takes the same loss: continuous levels and a learned variance work there as well."
    from diffusevae.autoencoders.vae import VAE

    for process, outputs in ((plain("v", continuous=True), 1), (plain("eps", "learned_range"), 2)):
        torch.manual_seed(0)
        system = DiffuseVAE(
            VAE(16, z_dim=2, width=8), tiny(image_channels=1, outputs=outputs), process, form=2
        )
        loss = system.loss(Batch(images(4)))["loss"]
        loss.backward()
        assert loss.isfinite() and system.denoiser.head[-1].bias.grad.abs().min() > 0
