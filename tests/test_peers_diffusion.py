"""Schedules, process and samplers against diffusers, form 2 against its published equations, and schedules against checkpoints.

Formulas are compared in float64 with diffusers' `alphas_cumprod` replaced by ours, so that only the algebra is on trial; what its own
float32 table costs is measured apart, with the tolerance that it needs. Errors are relative, in the norm over a batch.
"""

import math

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from torch import nn

from diffusevae.autoencoders.vae import VAE
from diffusevae.core import checkpoints, images, training
from diffusevae.core.ema import Ema
from diffusevae.diffusion import samplers, schedules
from diffusevae.diffusion.conditions import Cond, drop
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE, shifted

T, STEPS, SHAPE, SEEDS = 1000, 25, (3, 1, 8, 8), [5, 6, 7]
CLOSE = 1e-5  # what is asked; in float64 the formulas agree far better
THEIR_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

every_prediction = pytest.mark.parametrize("predict", ["eps", "x0", "v"])
both_variances = pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
both_schedules = pytest.mark.parametrize("name", ["linear", "cosine"])
clip_or_not = pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])


class Net(nn.Module):
    "A small fixed random network that looks at x_t, t and the condition's image; float64."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.double().requires_grad_(False)

    def forward(self, x, t, cond=None):
        image = torch.zeros_like(x) if cond is None else cond.image
        h = torch.tanh(self.a(torch.cat([x, image], 1)) + (t / 300).to(x.dtype).reshape(-1, 1, 1, 1))
        return 1.5 * torch.tanh(3 * self.b(h))


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(ours, theirs):
    "Relative, in the norm; infinite when either holds no numbers."
    gap = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
    return gap if math.isfinite(gap) else math.inf


def their(kind, process, clip=True, exact=True, **settings):
    "diffusers' scheduler for the same process; `exact` gives it our float64 products in place of its own in float32."
    betas, prediction = process.schedule.betas.tolist(), THEIR_NAMES[process.predict]
    scheduler = kind(num_train_timesteps=process.T, trained_betas=betas, prediction_type=prediction, clip_sample=clip, **settings)
    if exact:
        scheduler.alphas_cumprod = process.schedule.abar.clone()
    return scheduler


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("quadratic", "scaled_linear")]
)
@pytest.mark.parametrize("steps", [10, 1000])
def test_betas(name, theirs, steps):
    """The discretisation is the same, the rounding is not: theirs is float32.

    Measured: betas within 3e-7; products within 1.4e-5, worst after the cosine's capped beta, where 1 - 0.999 loses digits.
    """
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule=theirs)
    ours = schedules.make(name, steps)
    assert torch.allclose(ours, scheduler.betas.double(), rtol=5e-7, atol=0)
    assert torch.allclose(Schedule(ours).abar, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0)


def test_sigmoid_is_another_schedule_there():
    "Same name, another formula (sigmoid betas): a warning to whoever compares by name."
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    assert (schedules.sigmoid() - scheduler.betas.double()).abs().max() > 0.1


# ---------------------------------------------------------------- process


@both_schedules
def test_noising_and_velocity(name):
    process = Diffusion(Schedule(schedules.make(name, T)), "v")
    peer, t = their(diffusers.DDPMScheduler, process), torch.arange(T)
    x0, eps = randn(1, (T, 3, 4, 4)), randn(2, (T, 3, 4, 4))
    assert error(process.add_noise(x0, eps, t), peer.add_noise(x0, eps, t)) < 1e-12
    assert error(process.target(x0, eps, t), peer.get_velocity(x0, eps, t)) < 1e-12
    own = their(diffusers.DDPMScheduler, process, exact=False)
    assert error(process.add_noise(x0.float(), eps.float(), t), own.add_noise(x0.float(), eps.float(), t)) < CLOSE


@both_schedules
@both_variances
@pytest.mark.parametrize("steps", [T, STEPS])
def test_posterior(name, variance, steps, monkeypatch):
    "Mean and variance of every step of a walk, from all its x_t at once; without noise, diffusers' step is its mean."
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    process = Diffusion(Schedule(schedules.make(name, T)), "x0", variance)
    peer = their(diffusers.DDPMScheduler, process, clip=False, variance_type=variance)
    peer.set_timesteps(steps)
    assert peer.timesteps.tolist() == samplers.timesteps(T, steps)
    t, stride = peer.timesteps, T // steps
    x0, x_t = randn(3, (steps, 1, 2, 2)), randn(4, (steps, 1, 2, 2))
    mean, posterior_variance = process.posterior(x0, x_t, t, (t - stride).clamp(min=-1))
    theirs = torch.cat([peer.step(x0[[i]], int(t[i]), x_t[[i]]).prev_sample for i in range(steps)])
    assert error(mean, theirs) < 1e-12
    used = process.reverse_variance(x_t, t, (t - stride).clamp(min=-1))
    theirs = torch.stack([peer._get_variance(int(i)) for i in t])
    assert torch.allclose(used[:, 0, 0, 0], theirs, rtol=1e-10, atol=1e-19)
    assert variance == "fixed_large" or torch.equal(used, posterior_variance)


# ---------------------------------------------------------------- samplers


def ours(sampler, process, clip, dtype=torch.float64, **walk):
    x_T = randn(8).to(dtype)
    net = Net().to(dtype)
    steps = list(sampler(net, process, x_T, steps=STEPS, clip=clip, seeds=SEEDS, **walk))
    assert len(steps) == STEPS and all(s.x.dtype == dtype for s in steps)
    return steps, net, x_T


def theirs(peer, net, x, **step):
    "diffusers' walk: pairs of x and predicted x0."
    for t in peer.timesteps.tolist():
        out = peer.step(net(x, torch.full((len(x),), float(t))), t, x, **{k: f() for k, f in step.items()})
        x = out.prev_sample
        yield x, out.pred_original_sample


def compare(steps, walk, close=CLOSE):
    for i, (step, (x, x0)) in enumerate(zip(steps, walk, strict=True)):
        assert error(step.x0, x0) < close and error(step.x, x) < close, f"step {i}, t = {step.t}"


def double_noise():
    "The noise that the samplers use, for diffusers."
    noise = samplers.Noise(SHAPE, SEEDS, stream=1)
    return lambda *_, dtype=torch.float64, **__: noise().to(dtype)


@every_prediction
@both_variances
@both_schedules
@clip_or_not
def test_ddpm(predict, variance, name, clip, monkeypatch):
    process = Diffusion(Schedule(schedules.make(name, T)), predict, variance)
    steps, net, x_T = ours(samplers.ddpm, process, clip)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", double_noise())
    peer = their(diffusers.DDPMScheduler, process, clip, variance_type=variance)
    peer.set_timesteps(STEPS)
    compare(steps, theirs(peer, net, x_T))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddpm_spacings(spacing, monkeypatch):
    process = Diffusion(Schedule(schedules.linear()), "v")
    steps, net, x_T = ours(samplers.ddpm, process, True, spacing=spacing)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", double_noise())
    peer = their(diffusers.DDPMScheduler, process, timestep_spacing=spacing)
    peer.set_timesteps(STEPS)
    assert [s.t for s in steps] == peer.timesteps.tolist()
    if spacing == "trailing":  # diffusers draws no noise at t = 0 only, we at the last step: here they are not the same
        assert steps[-1].t > 0 and torch.equal(steps[-1].x, steps[-1].x0)
        compare(steps[:-1], list(theirs(peer, net, x_T))[:-1])
    else:
        compare(steps, theirs(peer, net, x_T))


@every_prediction
@both_schedules
@clip_or_not
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(predict, name, clip, eta):
    "With `use_clipped_model_output`, diffusers computes eps anew from the clipped x0; our sampler always does."
    process = Diffusion(Schedule(schedules.make(name, T)), predict)
    steps, net, x_T = ours(samplers.ddim, process, clip, eta=eta)
    peer = their(diffusers.DDIMScheduler, process, clip)
    peer.set_timesteps(STEPS)
    compare(steps, theirs(peer, net, x_T, eta=lambda: eta, use_clipped_model_output=lambda: True, variance_noise=double_noise()))


def test_ddim_trailing():
    process = Diffusion(Schedule(schedules.cosine()), "v")
    steps, net, x_T = ours(samplers.ddim, process, True, spacing="trailing")
    peer = their(diffusers.DDIMScheduler, process, timestep_spacing="trailing")
    peer.set_timesteps(STEPS)
    assert steps[0].t == T - 1 == peer.timesteps[0]
    compare(steps, theirs(peer, net, x_T, use_clipped_model_output=lambda: True))


def test_ddim_with_an_eps_from_before_the_clip_is_another_sampler():
    "The comparison above can fail: the clip is at work, and keeping the old eps shows."
    process = Diffusion(Schedule(schedules.linear()))
    steps, net, x_T = ours(samplers.ddim, process, True)
    assert any((s.x0.abs() == 1).any() for s in steps)
    peer = their(diffusers.DDIMScheduler, process)
    peer.set_timesteps(STEPS)
    assert max(error(s.x, x) for s, (x, _) in zip(steps, theirs(peer, net, x_T))) > 0.01


@both_schedules
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ddim_as_installed(name, predict, dtype):
    """With diffusers' own float32 table, and with float32 images too.

    Measured: 2.2e-5 where x0 is predicted on the cosine schedule (its eps is divided by √(1 - abar), which that table rounds at small t),
    below 1e-5 elsewhere.
    """
    close = 5e-5 if (predict, name) == ("x0", "cosine") else CLOSE
    process = Diffusion(Schedule(schedules.make(name, T)), predict)
    steps, net, x_T = ours(samplers.ddim, process, True, dtype)
    peer = their(diffusers.DDIMScheduler, process, exact=False)
    peer.set_timesteps(STEPS)
    compare(steps, theirs(peer, net, x_T, use_clipped_model_output=lambda: True), close)


# ---------------------------------------------------------------- form 2


def transition(beta, first):
    "Published (equation 10): the weights of the state before and of x̂, and the variance, in one step of form 2's chain."
    keep = math.sqrt(1 - beta)
    return keep, 1.0 if first else 1 - keep, beta


def composed(betas, start, stop):
    "The steps `start` … `stop` - 1 of the chain in one: weights of the state before them and of x̂, and the variance."
    keep, shift, variance = 1.0, 0.0, 0.0
    for i in range(start, stop):
        k, c, v = transition(float(betas[i]), first=i == 0)
        keep, shift, variance = k * keep, k * shift + c, k * k * variance + v
    return keep, shift, variance


def bayes(betas, x0, x_t, x_hat, t, t_prev):
    "q(x_prev | x_t, x0, x̂) of that chain: the product of two Gaussians in x_prev, whose precisions add."
    keep, shift, variance = composed(betas, 0, t_prev + 1)  # q(x_prev | x0, x̂)
    mean = keep * x0 + shift * x_hat
    k, c, v = composed(betas, t_prev + 1, t + 1)  # q(x_t | x_prev, x̂)
    precision = 1 / variance + k * k / v
    return (mean / variance + k * (x_t - c * x_hat) / v) / precision, 1 / precision


X0, X_HAT = randn(21), 0.5 * randn(22)
both_chains = pytest.mark.parametrize("name", ["linear", "cosine"])


@both_chains
def test_form_2_marginal(name):
    "Composing equation 10 gives x_t = √abar x0 + x̂ + √(1-abar) eps, which is what the wrapped network sees of the plain process."
    betas, eps, seen = schedules.make(name, T), randn(23), []
    process = Diffusion(Schedule(betas))
    network = shifted(lambda x, t, cond: seen.append(x), X_HAT)
    for t in (0, 1, 2, 10, 499, 998, 999):
        keep, shift, variance = composed(betas, 0, t + 1)
        abar = float(process.schedule.abar[t])
        assert abs(keep / math.sqrt(abar) - 1) < 1e-9 and abs(shift - 1) < 1e-12 and abs(variance / (1 - abar) - 1) < 1e-9
        network(process.add_noise(X0, eps, torch.tensor([t])), None, None)
        assert error(seen[-1], keep * X0 + shift * X_HAT + math.sqrt(variance) * eps) < CLOSE


@both_chains
@pytest.mark.parametrize("stride", [1, 40])
def test_form_2_posterior(name, stride):
    betas = schedules.make(name, T)
    process, x_t = Diffusion(Schedule(betas)), randn(24) + X_HAT
    for t in (stride, 2 * stride, 480, T - stride, T - 1):
        mean, variance = process.posterior(X0, x_t - X_HAT, torch.tensor([t]), torch.tensor([t - stride]))
        expected = bayes(betas, X0, x_t, X_HAT, t, t - stride)
        assert error(mean + X_HAT, expected[0]) < CLOSE
        assert abs(float(variance[0, 0, 0, 0]) / expected[1] - 1) < CLOSE


def published_walk(net, process, x, noise, move):
    "Sampling in x_t with the published equations written out: pairs of x and x0; the last x is x0."
    abar, cond = process.schedule.abar.tolist(), Cond(image=X_HAT)
    times = samplers.timesteps(process.T, STEPS)
    for t, t_prev in zip(times, times[1:] + [None]):
        eps = net(x, torch.full((len(x),), float(t)), cond)
        x0 = ((x - X_HAT - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t])).clamp(-1, 1)
        x = x0 if t_prev is None else move(x0, x, t, t_prev, noise)
        yield x, x0


def ddim_move(process, eta):
    "A DDIM step of form 2: x_prev = √abar_prev x0 + x̂ + √(1 - abar_prev - σ²) eps + σ noise."
    abar = process.schedule.abar.tolist()

    def move(x0, x, t, t_prev, noise):
        sigma = eta * math.sqrt((1 - abar[t_prev]) / (1 - abar[t]) * (1 - abar[t] / abar[t_prev]))
        eps = (x - math.sqrt(abar[t]) * x0 - X_HAT) / math.sqrt(1 - abar[t])
        return math.sqrt(abar[t_prev]) * x0 + X_HAT + math.sqrt(1 - abar[t_prev] - sigma**2) * eps + (sigma * noise() if eta else 0)

    return move


def bayes_move(process):
    "An ancestral step of form 2 by the posterior of its chain."

    def move(x0, x, t, t_prev, noise):
        mean, variance = bayes(process.schedule.betas, x0, x, X_HAT, t, t_prev)
        return mean + math.sqrt(variance) * noise()

    return move


@both_chains
@pytest.mark.parametrize("kind", ["ddim 0", "ddim 1", "ddpm"])
def test_form_2_sampling(name, kind):
    "The plain samplers in y = x - x̂ walk the published chain in x, and end in x0 itself."
    process, net, y_T = Diffusion(Schedule(schedules.make(name, T))), Net(), randn(25)
    kind, _, eta = kind.partition(" ")
    settings, move = ({"eta": float(eta)}, ddim_move(process, float(eta))) if eta else ({}, bayes_move(process))
    steps = list(samplers.by_name[kind](shifted(net, X_HAT), process, y_T, cond=Cond(image=X_HAT), steps=STEPS, seeds=SEEDS, **settings))
    noise = samplers.Noise(SHAPE, SEEDS, stream=1)
    walk = list(published_walk(net, process, y_T + X_HAT, lambda: noise().double(), move))
    for step, (x, x0) in zip(steps[:-1], walk[:-1], strict=True):
        assert error(step.x + X_HAT, x) < CLOSE and error(step.x0, x0) < CLOSE, f"t = {step.t}"
    assert error(steps[-1].x, walk[-1][0]) < CLOSE


# ---------------------------------------------------------------- checkpoints and averages


def tiny_system(kind="ddpm", betas=None):
    torch.manual_seed(0)
    process = Diffusion(Schedule(schedules.cosine(20) if betas is None else betas), "v")
    if kind == "ddpm":
        return DDPM(UNet(16, width=8, multipliers=(1,), patch=4), process)
    return DiffuseVAE(VAE(16, z_dim=2, width=8), UNet(16, width=8, multipliers=(1,), patch=4, image_channels=1), process, form=2)


@pytest.mark.parametrize("kind", ["ddpm", "diffusevae"])
def test_no_schedule_in_checkpoints_or_averages(kind, tmp_path):
    system, digits = tiny_system(kind), images.load("digits")[:64]
    before = system.process.schedule.abar.clone()
    settings = training.Settings(steps=3, batch_size=8, warmup=0, validation=0.25, validate_every=2, checkpoint_every=2, device="cpu")
    for _ in training.train(system, digits, settings, tmp_path):
        pass
    tables = [b for b in system.process.schedule.buffers()]
    assert len(tables) >= 2 and torch.equal(system.process.schedule.abar, before)
    for name in ("last", "best"):
        tensors, _ = checkpoints.load(tmp_path / f"{name}.safetensors")
        assert tensors and not [k for k in tensors if "schedule" in k]
        assert not [k for k, v in tensors.items() if v.dtype == torch.float64 or v.shape == tables[0].shape]
    trained = [p for p in system.parameters() if p.requires_grad]
    averaged = [k for k in checkpoints.load(tmp_path / "last.safetensors")[0] if k.startswith("ema.")]
    assert len(averaged) == len(trained)
    rebuilt = checkpoints.load_system(tmp_path / "best.safetensors")
    assert rebuilt.process.schedule.abar.dtype == torch.float64 and torch.equal(rebuilt.process.schedule.abar, before)


def test_average_leaves_the_schedule_alone():
    system = tiny_system()
    before = {k: v.clone() for k, v in system.named_buffers() if "schedule" in k}
    assert before
    ema = Ema(system.parameters(), 0.9)
    for step in range(3):
        with torch.no_grad():
            for p in system.parameters():
                p += 1
        ema.update(step)
    with ema.applied():
        assert all(torch.equal(v, before[k]) for k, v in system.named_buffers() if k in before)


def test_weights_of_one_schedule_load_into_another():
    "A network that was trained with one schedule can be sampled with another: loading weights does not bring the old tables along."
    old, new = tiny_system(), tiny_system(betas=schedules.linear(20, 0.01, 0.5))
    before = new.process.schedule.abar.clone()
    checkpoints.restore(new, old.state_dict())
    assert torch.equal(new.process.schedule.abar, before) and not torch.equal(before, old.process.schedule.abar)


# ---------------------------------------------------------------- conditions


def test_drop_stays_on_the_device():
    "`meta` is a device that is not the CPU, and every machine has it: a draw on the wrong device fails there."
    cond = Cond(image=torch.zeros(4, 1, 8, 8, dtype=torch.bfloat16, device="meta"), label=torch.zeros(4, dtype=torch.long, device="meta"))
    parts = drop(cond, 0.5).parts()
    assert {v.device.type for v in parts.values()} == {"meta"} and parts["image"].dtype == torch.bfloat16
