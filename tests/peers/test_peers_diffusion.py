"""Schedules, process and samplers against diffusers, form 2 against its published equations, and schedules
against checkpoints.

Formulas are compared in float64 with diffusers' `alphas_cumprod` replaced by ours, so that only the algebra
is on trial; what its own float32 table costs is measured apart, with the tolerance that it needs. Errors
are relative, in the norm over a batch.
"""

import math

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import nn

from diffusevae.autoencoders.vae import VAE
from diffusevae.core import checkpoints, images, training
from diffusevae.core.ema import Ema
from diffusevae.diffusion import process as processes
from diffusevae.diffusion import samplers, schedules
from diffusevae.diffusion.conditions import Cond, drop_parts
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.process import Diffusion, ideal_denoiser
from diffusevae.diffusion.schedules import NoiseLevels, Schedule, at_time, zero_terminal_snr
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

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, outputs, 3, padding=1)
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
    """diffusers' scheduler for the same process; `exact` gives it our float64 products in place of its own
    in float32.
    """
    betas, prediction = process.schedule.betas.tolist(), THEIR_NAMES[process.predict]
    scheduler = kind(
        num_train_timesteps=process.T,
        trained_betas=betas,
        prediction_type=prediction,
        clip_sample=clip,
        **settings,
    )
    if exact:
        scheduler.alphas_cumprod = process.schedule.abar.clone()
    return scheduler


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "name, theirs, ends",
    [
        ("linear", "linear", {}),
        ("cosine", "squaredcos_cap_v2", {}),
        ("quadratic", "scaled_linear", {}),
        ("scaled_linear", "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    ],
)
@pytest.mark.parametrize("steps", [10, 1000])
def test_betas(name, theirs, ends, steps):
    """The discretisation is the same, the rounding is not: theirs is float32.

    Measured: betas within 3e-7; products within 1.4e-5, worst after the cosine's capped beta, where 1 -
    0.999 loses digits.
    """
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule=theirs, **ends)
    ours = schedules.make_betas(name, steps)
    assert torch.allclose(ours, scheduler.betas.double(), rtol=5e-7, atol=0)
    assert torch.allclose(Schedule(ours).abar, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", list(schedules.schedules_by_name))
@pytest.mark.parametrize("steps", [10, 1000])
def test_zero_terminal_snr(name, steps):
    """The same algorithm: in float64 with their function, and with what float32 leaves of it in their
    scheduler.

    Measured at T = 1000: 5e-12 for each beta in float64; 7e-6 in the norm in float32, where single small
    betas lose up to 4e-3 to cancellation.
    """
    betas = schedules.make_betas(name, steps)
    ours = zero_terminal_snr(betas)
    assert ours[-1] == 1 and torch.allclose(
        ours, scheduling_ddim.rescale_zero_terminal_snr(betas), rtol=1e-11, atol=0
    )
    single = scheduling_ddim.rescale_zero_terminal_snr(betas.float()).double()
    assert ((ours - single).norm() / single.norm()) < CLOSE
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=steps, trained_betas=betas.tolist(), rescale_betas_zero_snr=True
    )
    assert (
        error(Schedule(ours).abar, scheduler.alphas_cumprod.double()) < CLOSE
        and scheduler.alphas_cumprod[-1] == 0
    )


def test_sigmoid_is_another_schedule_there():
    "Same name, another formula (sigmoid betas): a warning to whoever compares by name."
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    assert (schedules.sigmoid() - scheduler.betas.double()).abs().max() > 0.1


# ---------------------------------------------------------------- process


every_schedule = pytest.mark.parametrize("name", ["linear", "cosine", "rescaled"])
walk_lengths = pytest.mark.parametrize("steps", [T, STEPS])


def schedule_called(name):
    "One that exists by that name, or the one of latent diffusion rescaled to end without signal."
    return Schedule(
        zero_terminal_snr(schedules.scaled_linear()) if name == "rescaled" else schedules.make_betas(name, T)
    )


def noising_gap(process, exact=True, dtype=torch.float64):
    "How far x_t and v are from diffusers', at every t."
    peer, t = their(diffusers.DDPMScheduler, process, exact=exact), torch.arange(T)
    x0, eps = randn(1, (T, 3, 4, 4)).to(dtype), randn(2, (T, 3, 4, 4)).to(dtype)
    pairs = (process.add_noise, peer.add_noise), (process.target, peer.get_velocity)
    return max(error(ours(x0, eps, t), theirs(x0, eps, t)) for ours, theirs in pairs)


@every_schedule
def test_noising_and_velocity(name):
    process = Diffusion(schedule_called(name), "v")
    assert noising_gap(process) < 1e-12
    assert noising_gap(process, exact=False, dtype=torch.float32) < CLOSE


@every_prediction
@every_schedule
def test_predicted_x0(predict, name):
    """What follows from an output, at every t.

    Where there is no signal, diffusers divides by 0 for eps, and we refuse.
    """
    schedule, x_t, out = schedule_called(name), randn(5, (T, 1, 2, 2)), randn(6, (T, 1, 2, 2))
    process = Diffusion(schedule, "v" if (predict, name) == ("eps", "rescaled") else predict)
    peer, t = their(diffusers.DDPMScheduler, process, clip=False), torch.arange(T)
    peer.register_to_config(prediction_type=THEIR_NAMES[predict])
    theirs = torch.cat([peer.step(out[[i]], i, x_t[[i]]).pred_original_sample for i in range(T)])
    if process.predict == predict:
        assert error(process.to_x0(out, x_t, t), theirs) < 1e-12
        assert (
            error(process.add_noise(theirs, process.to_eps(out, x_t, t), t), x_t) < CLOSE
        )  # the eps that agrees with it
    else:
        assert theirs[:-1].isfinite().all() and not theirs[-1].isfinite().any()
        with pytest.raises(ValueError, match="eps cannot be predicted where abar is 0"):
            Diffusion(schedule, predict)


def posterior_gap(process, steps, monkeypatch):
    """How far mean and variance are from diffusers' at every step of a walk, from all its x_t at once;
    without noise, their step is the mean.
    """
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape, dtype=torch.float64)
    )
    peer = their(diffusers.DDPMScheduler, process, clip=False, variance_type=process.variance)
    peer.set_timesteps(steps)
    assert peer.timesteps.tolist() == samplers.timesteps(T, steps)
    t, t_prev = peer.timesteps, (peer.timesteps - T // steps).clamp(min=-1)
    x0, x_t = randn(3, (steps, 1, 2, 2)), randn(4, (steps, 1, 2, 2))
    theirs = torch.cat([peer.step(x0[[i]], int(t[i]), x_t[[i]]).prev_sample for i in range(steps)])
    used = process.reverse_variance(x_t, t, t_prev)[:, 0, 0, 0]
    variance = torch.stack([peer._get_variance(int(i)) for i in t])
    gap = float(((used - variance).abs() / (variance + 1e-9)).max())  # theirs is 1e-20 where ours is 0
    return max(error(process.posterior(x0, x_t, t, t_prev)[0], theirs), gap)


@every_schedule
@both_variances
@walk_lengths
def test_posterior(name, variance, steps, monkeypatch):
    process = Diffusion(schedule_called(name), "x0", variance)
    assert posterior_gap(process, steps, monkeypatch) < 1e-10
    x, t = randn(4, (steps, 1, 2, 2)), torch.arange(0, T, T // steps)
    assert variance == "fixed_large" or torch.equal(
        process.reverse_variance(x, t), process.posterior(x, x, t)[1]
    )


def learned_gap(process, steps, dtype=torch.float64):
    """How far the learned variance is from diffusers', at every step of a walk but its last, as a ratio.

    There the posterior's variance is 0: for its logarithm they take 1e-20, we the variance of the step from
    t = 1 to 0, as the published code does. Neither adds noise at that step; in the variational bound it is
    the width of the decoder, and 1e-20 would make that meaningless.
    """
    peer = their(diffusers.DDPMScheduler, process, variance_type="learned_range")
    peer.set_timesteps(steps)
    t, out, x_t = peer.timesteps, randn(7, (steps, 2, 2, 2)).to(dtype), randn(4, (steps, 1, 2, 2))
    v = out[:, 1:].double()
    theirs = torch.cat([peer._get_variance(int(t[i]), predicted_variance=v[[i]]) for i in range(steps)]).exp()
    ours = process.reverse_variance(x_t, t, (t - T // steps).clamp(min=-1), out)
    stands_in = Diffusion(process.schedule, "v").reverse_variance(x_t[:1], torch.tensor([1]))[0]
    last = process.schedule.betas[0] ** ((1 + v[-1]) / 2) * stands_in ** ((1 - v[-1]) / 2)
    return float(torch.cat([(ours / theirs)[:-1], (ours[-1:] / last)]).sub(1).abs().max())


@every_schedule
@walk_lengths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_learned_variance(name, steps, dtype):
    assert learned_gap(Diffusion(schedule_called(name), "v", "learned_range"), steps, dtype) < 1e-9


# ---------------------------------------------------------------- process: the known traps, put back


def table(kind, level):
    "A method of `Diffusion` that reads `level(schedule, t)`, a function to abar in float64."
    root = (lambda a: a.sqrt()) if kind == "signal" else (lambda a: (1 - a).sqrt())
    return lambda self, t, x: at_time(root(level(self.schedule)), t, x)


WRONG_LEVELS = {
    "alpha for abar": lambda s: 1 - s.betas,
    "the level of t - 1": lambda s: torch.cat([torch.ones(1, dtype=torch.float64), s.abar[:-1]]),
    "the level of t + 1": lambda s: torch.cat([s.abar[1:], s.abar[-1:]]),
}


@pytest.mark.parametrize("trap", ["none", "a root too many", *WRONG_LEVELS])
def test_wrong_levels_are_noticed(trap, monkeypatch):
    if trap == "a root too many":  # √(1 - √abar)
        monkeypatch.setattr(
            Diffusion, "noise", lambda self, t, x: at_time((1 - self.schedule.sqrt_abar).sqrt(), t, x)
        )
    else:
        for kind in ("signal", "noise"):
            monkeypatch.setattr(Diffusion, kind, table(kind, WRONG_LEVELS.get(trap, lambda s: s.abar)))
    gap = noising_gap(Diffusion(schedule_called("linear"), "v"))
    assert gap < 1e-12 if trap == "none" else gap > 100 * CLOSE


WRONG_NEIGHBOURS = {
    "none": lambda p, x, t, t_prev: (p.abar(t, x), p.abar(t_prev, x)),
    "t for t - 1": lambda p, x, t, t_prev: (p.abar(t, x), p.abar((t_prev + 1).clamp(max=T - 1), x)),
    "both one too early": lambda p, x, t, t_prev: (p.abar(t - 1, x) - 1e-9, p.abar(t_prev - 1, x)),
    "alpha for abar": lambda p, x, t, t_prev: (
        at_time(1 - p.schedule.betas, t, x),
        torch.where(column(t_prev) < 0, 1.0, at_time(1 - p.schedule.betas, t_prev.clamp(min=0), x)),
    ),
    "always t - 1": lambda p, x, t, t_prev: (p.abar(t, x), p.abar(t - 1, x)),
}


def column(t):
    return t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("trap", list(WRONG_NEIGHBOURS))
@both_variances
@walk_lengths
def test_wrong_neighbours_are_noticed(trap, variance, steps, monkeypatch):
    process = Diffusion(schedule_called("linear"), "x0", variance)
    monkeypatch.setattr(Diffusion, "_abars", WRONG_NEIGHBOURS[trap])
    gap = posterior_gap(process, steps, monkeypatch)
    right = trap == "none" or (
        trap == "always t - 1" and steps == T
    )  # where no step is skipped, that is right
    assert gap < 1e-10 if right else gap > 100 * CLOSE


def test_swapped_ends_of_the_learned_variance_are_noticed(monkeypatch):
    right, process = processes.learned_variance, Diffusion(schedule_called("linear"), "v", "learned_range")
    monkeypatch.setattr(
        processes, "learned_variance", lambda out, x_t, large, small: right(out, x_t, small, large)
    )
    assert learned_gap(process, STEPS) > 0.1


# ---------------------------------------------------------------- samplers


def ours(sampler, process, clip, dtype=torch.float64, steps=STEPS, net=None, **walk):
    x_T = randn(8).to(dtype)
    net = (net or Net()).to(dtype)
    taken = list(sampler(net, process, x_T, steps=steps, clip=clip, seeds=SEEDS, **walk))
    assert len(taken) == steps and all(s.x.dtype == dtype for s in taken)
    return taken, net, x_T


def theirs(peer, net, x, times=None, **step):
    "diffusers' walk: pairs of x and predicted x0; `times` is what the network sees of `peer.timesteps`."
    for i, t in enumerate(peer.timesteps.tolist()):
        out = peer.step(
            net(x, torch.full((len(x),), float(times[i] if times else t))),
            t,
            x,
            **{k: f() for k, f in step.items()},
        )
        x = out.prev_sample
        yield x, getattr(out, "pred_original_sample", None)


def compare(steps, walk, close=CLOSE):
    for i, (step, (x, x0)) in enumerate(zip(steps, walk, strict=True)):
        assert error(step.x, x) < close and (x0 is None or error(step.x0, x0) < close), (
            f"step {i}, t = {step.t}"
        )


def differs(steps, walk):
    "The comparison notices."
    with pytest.raises(AssertionError, match="step"):
        compare(steps, walk)


def double_noise():
    "The noise that the samplers use, for diffusers."
    noise = samplers.Noise(SHAPE, SEEDS, stream=1)
    return lambda *_, dtype=torch.float64, **__: noise().to(dtype)


def visiting(kind, process, times, **settings):
    """diffusers' scheduler on the levels of `times` alone, so that its t - T // steps is their neighbour
    whatever the spacing.
    """
    peer = their(kind, process, **settings)
    peer.register_to_config(num_train_timesteps=len(times))
    peer.alphas_cumprod = process.schedule.abar[times[::-1]].clone()
    peer.set_timesteps(len(times))
    return peer


@every_prediction
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@both_schedules
@clip_or_not
def test_ddpm(predict, variance, name, clip, monkeypatch):
    process = Diffusion(Schedule(schedules.make_betas(name, T)), predict, variance)
    steps, net, x_T = ours(samplers.ddpm, process, clip, net=Net(process.outputs(1)))
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
    if (
        spacing == "trailing"
    ):  # diffusers draws no noise at t = 0 only, we at the last step: here they are not the same
        assert steps[-1].t > 0 and torch.equal(steps[-1].x, steps[-1].x0)
        compare(steps[:-1], list(theirs(peer, net, x_T))[:-1])
    else:
        compare(steps, theirs(peer, net, x_T))


@every_prediction
@both_schedules
@clip_or_not
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(predict, name, clip, eta):
    """With `use_clipped_model_output`, diffusers computes eps anew from the clipped x0; our sampler always
    does.
    """
    process = Diffusion(Schedule(schedules.make_betas(name, T)), predict)
    steps, net, x_T = ours(samplers.ddim, process, clip, eta=eta)
    peer = their(diffusers.DDIMScheduler, process, clip)
    peer.set_timesteps(STEPS)
    compare(
        steps,
        theirs(
            peer,
            net,
            x_T,
            eta=lambda: eta,
            use_clipped_model_output=lambda: True,
            variance_noise=double_noise(),
        ),
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", samplers.spacings)
def test_ddim_spacings(spacing, eta):
    """The same times, and the same steps between them.

    diffusers always steps down by T // steps, which is not where its own `linspace` goes next; on a table
    of the visited levels alone it is. It has neither `quad` nor `logsnr`, so there the times are ours
    alone.
    """
    process = Diffusion(Schedule(schedules.cosine()), "v")
    steps, net, x_T = ours(samplers.ddim, process, True, spacing=spacing, eta=eta)
    times = [s.t for s in steps]
    if spacing not in ("quad", "logsnr"):
        peer = their(diffusers.DDIMScheduler, process, timestep_spacing=spacing)
        peer.set_timesteps(STEPS)
        assert times == peer.timesteps.tolist()
    peer = visiting(diffusers.DDIMScheduler, process, times)
    compare(
        steps,
        theirs(
            peer,
            net,
            x_T,
            times,
            eta=lambda: eta,
            use_clipped_model_output=lambda: True,
            variance_noise=double_noise(),
        ),
    )


@both_schedules
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ddim_as_installed(name, predict, dtype):
    """With diffusers' own float32 table, and with float32 images too.

    Measured: 2.2e-5 where x0 is predicted on the cosine schedule (its eps is divided by √(1 - abar), which
    that table rounds at small t), below 1e-5 elsewhere.
    """
    close = 5e-5 if (predict, name) == ("x0", "cosine") else CLOSE
    process = Diffusion(Schedule(schedules.make_betas(name, T)), predict)
    steps, net, x_T = ours(samplers.ddim, process, True, dtype)
    peer = their(diffusers.DDIMScheduler, process, exact=False)
    peer.set_timesteps(STEPS)
    compare(steps, theirs(peer, net, x_T, use_clipped_model_output=lambda: True), close)


def their_sigmas(peer, process, times):
    "√(1 - abar) / √abar of the times and a 0 behind them, in float64 where diffusers keeps float32."
    abar = process.schedule.abar[times]
    return torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])


def multistep(process, times, clip=False):
    settings = dict(thresholding=True, dynamic_thresholding_ratio=clip, sample_max_value=1e9) if clip else {}
    peer = diffusers.DPMSolverMultistepScheduler(
        trained_betas=process.schedule.betas.tolist(),
        prediction_type=THEIR_NAMES[process.predict],
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        **settings,
    )
    assert (peer.config.algorithm_type, peer.config.solver_order, peer.config.solver_type) == (
        "dpmsolver++",
        2,
        "midpoint",
    )
    peer.alphas_cumprod = process.schedule.abar.clone()
    peer.set_timesteps(timesteps=times)
    peer.sigmas = their_sigmas(peer, process, times)
    return peer


@every_prediction
@both_schedules
@pytest.mark.parametrize("spacing", samplers.spacings)
@pytest.mark.parametrize("clip", [False, 0.9], ids=["free", "dynamic"])
def test_dpm_solver(predict, name, spacing, clip, monkeypatch):
    """Over 20 steps, on our times; of its own spacings only `trailing` is ours (`leading` and `linspace`
    there leave out t = 0).

    Its step goes through float32, which is taken out of the comparison.
    """
    process = Diffusion(Schedule(schedules.make_betas(name, T)), predict)
    steps, net, x_T = ours(samplers.dpm_solver, process, clip, steps=20, spacing=spacing)
    peer = multistep(process, [s.t for s in steps], clip)
    if spacing == "trailing":
        own = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
        own.set_timesteps(20)
        assert own.timesteps.tolist() == [s.t for s in steps]
    monkeypatch.setattr(torch, "float32", torch.float64)
    compare(steps, theirs(peer, net, x_T))


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_even_log_snr(steps):
    "Their `use_lu_lambdas`: the same times, as long as theirs do not repeat themselves near 0."
    schedule = Schedule(schedules.linear())
    peer = diffusers.DPMSolverMultistepScheduler(trained_betas=schedule.betas.tolist(), use_lu_lambdas=True)
    peer.set_timesteps(steps)
    assert samplers.timesteps(1000, steps, "logsnr", schedule.log_snr()) == peer.timesteps.tolist()


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_dpm_solver_as_installed(predict):
    "Its own tables and its own float32."
    process = Diffusion(Schedule(schedules.linear()), predict)
    steps, net, x_T = ours(samplers.dpm_solver, process, False, torch.float32, steps=20, spacing="trailing")
    peer = diffusers.DPMSolverMultistepScheduler(
        trained_betas=process.schedule.betas.tolist(),
        prediction_type=THEIR_NAMES[predict],
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    peer.set_timesteps(20)
    compare(steps, theirs(peer, net, x_T))


def sigma_heun(net, process, x_T, **walk):
    """Heun's method in σ = tan φ, as published and as diffusers has it: our own by the factor cos φ_prev /
    cos φ in its correction.
    """

    def update(now, t_prev):
        eps = process.eps_from_x0(now.x0, now.x, now.t)
        guess = process.add_noise(now.x0, eps, t_prev)
        sigma, sigma_prev = (process.noise(t, eps) / process.signal(t, eps) for t in (now.t, t_prev))
        change = process.eps_from_x0(now.again(guess, t_prev).x0, guess, t_prev) - eps
        return guess + process.signal(t_prev, eps) * (sigma_prev - sigma) * change / 2

    walk.pop("seeds")
    return samplers.reverse_walk(net, process, x_T, update, **walk)


def their_heun(process, net, x, times, clip):
    "diffusers' Heun, whose sample is x / √abar: pairs of x and None after each pair of network calls."
    peer = diffusers.HeunDiscreteScheduler(
        trained_betas=process.schedule.betas.tolist(),
        prediction_type=THEIR_NAMES[process.predict],
        clip_sample=clip,
    )
    peer.set_timesteps(timesteps=times)
    sigmas = their_sigmas(peer, process, times)
    peer.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    x = x * (1 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(peer.timesteps.tolist()):
        seen = peer.scale_model_input(x, t)
        x = peer.step(net(seen, torch.full((len(x),), t)), t, x).prev_sample
        if i % 2 or i == len(peer.timesteps) - 1:
            yield x / (1 + sigmas[i // 2 + 1] ** 2).sqrt(), None


@every_prediction
@clip_or_not
def test_heun(predict, clip):
    """diffusers' Heun takes the same times and calls, in another variable: with its variable, our walk is
    its walk.

    Ours is as exact where steps are small (the two differ by a third-order term), and is not thrown off by
    a first step from no signal at all.
    """
    process = Diffusion(Schedule(schedules.linear()), predict)
    steps, net, x_T = ours(sigma_heun, process, clip, spacing="linspace")
    times = [s.t for s in steps]
    compare(steps, their_heun(process, net, x_T, times, clip))
    differs(
        ours(samplers.heun, process, clip, spacing="linspace")[0], their_heun(process, net, x_T, times, clip)
    )


def test_heun_in_the_angle_is_heun():
    """Against the exact solution, on a mixture: of second order as the published variable is, and whole
    where that one blows up.
    """
    centres, x_T = (
        torch.tensor([-0.6, 0.1, 0.7]).double().reshape(3, 1, 1, 1),
        torch.linspace(-2, 2, 201).double().reshape(-1, 1, 1, 1),
    )

    def gaps(rule, betas):
        process = Diffusion(Schedule(betas), "v")
        model = ideal_denoiser(process, centres, 0.2)

        def walk(rule, n):
            steps = rule(model, process, x_T, steps=n, spacing="linspace", clip=False, seeds=None)
            return samplers.final_image(steps)

        exact = walk(samplers.heun, 1000)
        return [float((walk(rule, n) - exact).abs().mean()) for n in (20, 40, 80)]

    for rule in (samplers.heun, sigma_heun):
        a, b, c = gaps(rule, schedules.linear())
        assert a / b > 3 and b / c > 3
    assert gaps(samplers.heun, schedules.cosine())[0] < 0.01 < 0.1 < gaps(sigma_heun, schedules.cosine())[0]


@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inversion(spacing, predict):
    """diffusers' step takes the network's answer from the caller; given the one that we ask for, the two go
    up alike.

    Its pipelines ask at the upper time, the published inversion at the lower one, as we do (and at the
    first level where the image is clean).
    """
    process = Diffusion(Schedule(schedules.linear()), predict)
    net, x0 = Net(), randn(8)
    steps = list(samplers.ddim_invert(net, process, x0, steps=STEPS, spacing=spacing))
    peer = their(diffusers.DDIMInverseScheduler, process, clip=False, timestep_spacing=spacing)
    peer.set_timesteps(STEPS)
    times = peer.timesteps.tolist()
    assert [s.t for s in steps] == times
    if predict == "eps":  # from a clean image, no eps follows of x0 or v: the first step is ours alone
        compare(steps, ((x, None) for x, _ in theirs(peer, net, x0, times[:1] + times[:-1])))
    peer.timesteps = peer.timesteps[1:]
    compare(steps[1:], ((x, None) for x, _ in theirs(peer, net, steps[0].x, times[:-1])))


# ---------------------------------------------------------------- samplers: the known traps, put back


def wrong_walk(update, process, clip=True, eta=1.0, **walk):
    "A walk by a wrong rule beside diffusers' right one."
    noise = samplers.Noise(SHAPE, SEEDS, stream=1)

    def noisy_update(now, t_prev):
        return update(now, t_prev, noise())

    def rule(net, process, x_T, seeds, **walk):
        return samplers.reverse_walk(net, process, x_T, noisy_update, **walk)

    steps, net, x_T = ours(rule, process, clip, **walk)
    peer = their(diffusers.DDIMScheduler, process, clip)
    peer.set_timesteps(STEPS)
    return steps, theirs(
        peer, net, x_T, eta=lambda: eta, use_clipped_model_output=lambda: True, variance_noise=double_noise()
    )


def ddim_update(process, eta=1.0, swapped=False, stale=False):
    """DDIM's rule with the traps: abar_t and abar_prev swapped in eta's variance; the eps of the prediction
    before the clip.
    """

    def update(now, t_prev, noise):
        abar, prev = process.abar(now.t, now.x), process.abar(t_prev, now.x)
        variance = (
            (1 - abar) / (1 - prev) * (1 - abar / prev)
            if swapped
            else (1 - prev) / (1 - abar) * (1 - abar / prev)
        )
        eps = process.to_eps(now.out, now.x, now.t) if stale else process.eps_from_x0(now.x0, now.x, now.t)
        return (
            prev.sqrt() * now.x0
            + (1 - prev - eta**2 * variance).clamp(min=0).sqrt() * eps
            + eta * variance.sqrt() * noise
        )

    return update


def test_a_swapped_variance_and_a_stale_eps_are_noticed():
    process = Diffusion(Schedule(schedules.linear()))
    compare(*wrong_walk(ddim_update(process), process))  # the rule itself, without a trap, passes
    differs(*wrong_walk(ddim_update(process, swapped=True), process))
    steps, walk = wrong_walk(ddim_update(process, stale=True), process)
    assert any((s.x0.abs() == 1).any() for s in steps)  # the clip is at work
    differs(steps, walk)
    compare(
        *wrong_walk(ddim_update(process, stale=True), process, clip=False)
    )  # without a clip there is nothing stale


def test_noise_at_the_last_step_is_noticed(monkeypatch):
    "Put back into the walk: the rule is asked once more, with the larger variance and with x_prev = x0."
    process = Diffusion(Schedule(schedules.linear()), "v", "fixed_large")

    def noisy_walk(look, x, update, times):
        for t, t_prev in zip(times, [*times[1:], -1]):
            now = look(x, t)
            x = update(now, torch.tensor([t_prev]))
            yield samplers.Step(t, x, now.x0)

    def walks():
        steps, net, x_T = ours(samplers.ddpm, process, True)
        peer = their(diffusers.DDPMScheduler, process, variance_type="fixed_large")
        peer.set_timesteps(STEPS)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", double_noise())
        return steps, theirs(peer, net, x_T)

    compare(*walks())
    monkeypatch.setattr(samplers, "_walk", noisy_walk)
    differs(*walks())


def distinct_times(timesteps):
    times = timesteps(T, 50, "quad")
    assert len(set(times)) == 50 and len(times) == 50, f"{len(set(times))} different steps of 50"


def test_doubles_in_quadratic_spacing_are_noticed(monkeypatch):
    distinct_times(samplers.timesteps)
    monkeypatch.setattr(samplers, "distinct", lambda times, T: times)
    with pytest.raises(AssertionError, match="49 different steps of 50"):
        distinct_times(samplers.timesteps)


# ---------------------------------------------------------------- samplers: what all of them keep

HOW = {
    **{name: (f, {}) for name, f in samplers.samplers_by_name.items()},
    "ddim 1": (samplers.ddim, {"eta": 1.0}),
}
every_sampler = pytest.mark.parametrize("how", HOW)


def tiny_net(channels=1, outputs=1, dtype=torch.float32):
    torch.manual_seed(1)
    net = nn.Conv2d(channels, outputs * channels, 3, padding=1).to(dtype).requires_grad_(False)
    return lambda x, t, cond=None: torch.tanh(net(x) + (t / 500).to(x.dtype).reshape(-1, 1, 1, 1))


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, n, clip", [(1, 1, True), (3, 2, 0.9), (4, 1, False)])
def test_type_and_shape_stay(how, dtype, channels, n, clip):
    "Grey, colour and latents, a batch of one, odd sizes; what comes in is what goes out."
    sampler, settings = HOW[how]
    process = Diffusion(Schedule(schedules.zero_terminal_snr(schedules.linear(100))), "v", "learned_range")
    x_T = randn(3, (n, channels, 6, 5)).to(dtype)
    for seeds in (None, range(n)):
        for step in sampler(
            tiny_net(channels, 2, dtype),
            process,
            x_T,
            steps=4,
            spacing="trailing",
            clip=clip,
            seeds=seeds,
            **settings,
        ):
            assert (
                step.x.dtype == step.x0.dtype == dtype
                and step.x.shape == step.x0.shape == x_T.shape
                and step.x.isfinite().all()
            )
    *_, up = samplers.ddim_invert(
        tiny_net(channels, 2, dtype), process, x_T, steps=4, spacing="trailing", corrections=1
    )
    assert up.x.dtype == dtype and up.x.isfinite().all()


@every_sampler
def test_seeds_belong_to_samples(how):
    """Sample 7 is the same alone and among a hundred; a run repeats itself; one seed for all is one noise
    for all.
    """
    sampler, settings = HOW[how]
    process = Diffusion(Schedule(schedules.linear()), "v")

    def sample(seeds, net=tiny_net()):
        x_T = samplers.Noise((len(seeds), 1, 8, 8), seeds)()
        return samplers.final_image(sampler(net, process, x_T, steps=6, seeds=seeds, **settings))

    crowd = sample(range(100))
    torch.rand(3)  # the global random state has no say
    assert torch.equal(crowd, sample(range(100)))
    assert torch.allclose(crowd[7:8], sample([7]), atol=1e-5) and not torch.allclose(
        crowd[7], crowd[8], atol=0.1
    )
    shared = sample([3] * 4)
    assert torch.allclose(shared, crowd[3:4].expand(4, 1, 8, 8), atol=1e-5)


@every_sampler
@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(steps=0), "1 … 100"),
        (dict(steps=101), "1 … 100"),
        (dict(steps=10, start=100), "start must lie in 0 … 99"),
        (dict(steps=10, start=-1), "start must lie in"),
        (dict(steps=10, start=8), "1 … 9"),
        (dict(spacing="even"), "spacing must be one of leading"),
        (dict(clip=0.0), "clip must be True, False, or a quantile"),
        (dict(clip=1.0), "clip must be"),
        (dict(clip="yes"), "clip must be"),
        (dict(clip=None), "clip must be"),
        (dict(seeds=[1]), "1 seeds for 2 samples"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_the_call(how, bad, says):
    sampler, settings = HOW[how]
    with pytest.raises(ValueError, match=says):
        sampler(None, Diffusion(Schedule(schedules.linear(100))), torch.zeros(2, 1, 4, 4), **settings, **bad)


def test_bad_settings_of_single_samplers():
    process, x = Diffusion(Schedule(schedules.linear(100))), torch.zeros(2, 1, 4, 4)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta must lie in"):
            samplers.ddim(None, process, x, eta=eta)
    for sampler in (samplers.ddpm, samplers.ddim):
        with pytest.raises(ValueError, match="step_temperature must be a finite number of at least 0"):
            sampler(None, process, x, step_temperature=-1.0)
    for bad, says in (
        (dict(steps=101), "1 … 100"),
        (dict(spacing="even"), "spacing"),
        (dict(corrections=-1), "corrections must be a finite number of at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            samplers.ddim_invert(None, process, x, **bad)


@every_sampler
def test_no_sampler_waits_for_the_device(how):
    """`meta` tensors hold no numbers: whatever reads one on the way (`int(t)`, `if x > 0`) fails there, and
    would make a GPU wait.
    """
    sampler, settings = HOW[how]
    process = Diffusion(Schedule(schedules.linear(100)), "v", "learned_range").to("meta")

    def net(x, t, cond):
        return torch.cat([x, x], 1)

    x_T = torch.zeros(2, 1, 4, 4, device="meta")
    for seeds in (None, [1, 2]):
        assert len(list(sampler(net, process, x_T, steps=5, clip=0.9, seeds=seeds, **settings))) == 5
    assert len(list(samplers.ddim_invert(net, process, x_T, steps=5, corrections=2))) == 5


@pytest.mark.parametrize("name, calls", [("ddpm", 8), ("ddim", 8), ("dpm_solver", 8), ("heun", 15)])
def test_network_calls(name, calls):
    process = Diffusion(Schedule(schedules.linear(100)), "x0")
    asked = []

    def net(x, t, cond):
        asked.append(t)
        return x

    samplers.final_image(samplers.sampler_by_name(name)(net, process, torch.zeros(2, 1, 4, 4), steps=8))
    assert len(asked) == calls and all(
        t.shape == (2,) and t.dtype == torch.float32 and t.is_contiguous() for t in asked
    )


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_network_calls_of_an_inversion(corrections):
    asked, process = [], Diffusion(Schedule(schedules.linear(100)), "x0")
    for _ in samplers.ddim_invert(
        lambda x, t, cond: asked.append(t) or x,
        process,
        torch.zeros(2, 1, 4, 4),
        steps=8,
        corrections=corrections,
    ):
        pass
    assert len(asked) == 8 * (1 + corrections)


# ---------------------------------------------------------------- form 2


def transition(beta, first):
    """Published (equation 10): the weights of the state before and of x̂, and the variance, in one step of
    form 2's chain.
    """
    keep = math.sqrt(1 - beta)
    return keep, 1.0 if first else 1 - keep, beta


def composed(betas, start, stop):
    """The steps `start` … `stop` - 1 of the chain in one: weights of the state before them and of x̂, and
    the variance.
    """
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
    """Composing equation 10 gives x_t = √abar x0 + x̂ + √(1-abar) eps, which is what the wrapped network
    sees of the plain process.
    """
    betas, eps, seen = schedules.make_betas(name, T), randn(23), []
    process = Diffusion(Schedule(betas))
    network = shifted(lambda x, t, cond: seen.append(x), X_HAT)
    for t in (0, 1, 2, 10, 499, 998, 999):
        keep, shift, variance = composed(betas, 0, t + 1)
        abar = float(process.schedule.abar[t])
        assert (
            abs(keep / math.sqrt(abar) - 1) < 1e-9
            and abs(shift - 1) < 1e-12
            and abs(variance / (1 - abar) - 1) < 1e-9
        )
        network(process.add_noise(X0, eps, torch.tensor([t])), None, None)
        assert error(seen[-1], keep * X0 + shift * X_HAT + math.sqrt(variance) * eps) < CLOSE


@both_chains
@pytest.mark.parametrize("stride", [1, 40])
def test_form_2_posterior(name, stride):
    betas = schedules.make_betas(name, T)
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
        return (
            math.sqrt(abar[t_prev]) * x0
            + X_HAT
            + math.sqrt(1 - abar[t_prev] - sigma**2) * eps
            + (sigma * noise() if eta else 0)
        )

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
    process, net, y_T = Diffusion(Schedule(schedules.make_betas(name, T))), Net(), randn(25)
    kind, _, eta = kind.partition(" ")
    settings, move = (
        ({"eta": float(eta)}, ddim_move(process, float(eta))) if eta else ({}, bayes_move(process))
    )
    steps = list(
        samplers.samplers_by_name[kind](
            shifted(net, X_HAT), process, y_T, cond=Cond(image=X_HAT), steps=STEPS, seeds=SEEDS, **settings
        )
    )
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
    return DiffuseVAE(
        VAE(16, z_dim=2, width=8),
        UNet(16, width=8, multipliers=(1,), patch=4, image_channels=1),
        process,
        form=2,
    )


def run_without_schedule(kind, folder):
    """A short training, none of whose files may hold a table of the schedule, and what is rebuilt from them
    has it anew.
    """
    system, digits = tiny_system(kind), images.load("digits")[:64]
    before = system.process.schedule.abar.clone()
    settings = training.Settings(
        steps=3, batch_size=8, warmup=0, validation=0.25, validate_every=2, checkpoint_every=2, device="cpu"
    )
    for _ in training.train(system, digits, settings, folder):
        pass
    tables = [b for b in system.process.schedule.buffers()]
    assert len(tables) >= 2 and torch.equal(system.process.schedule.abar, before)
    for name in ("last", "best"):
        tensors, _ = checkpoints.load_tensors(folder / f"{name}.safetensors")
        assert tensors and not [k for k in tensors if "schedule" in k]
        assert not [k for k, v in tensors.items() if v.dtype == torch.float64 or v.shape == tables[0].shape]
    trained = [p for p in system.parameters() if p.requires_grad]
    averaged = [k for k in checkpoints.load_tensors(folder / "last.safetensors")[0] if k.startswith("ema.")]
    assert len(averaged) == len(trained)
    rebuilt = checkpoints.load_system(folder / "best.safetensors")
    assert rebuilt.process.schedule.abar.dtype == torch.float64 and torch.equal(
        rebuilt.process.schedule.abar, before
    )


def average_beside_schedule(averaged):
    "A schedule that changes while an average runs is the same inside `applied` as outside."
    system = tiny_system()
    ema = Ema(averaged(system), 0.9)
    for step in range(3):
        with torch.no_grad():
            for v in [*system.parameters(), *system.process.schedule.buffers()]:
                v *= 0.9
        ema.update(step)
    now = {k: v.clone() for k, v in system.named_buffers() if "schedule" in k}
    with ema.applied():
        assert now and all(torch.equal(v, now[k]) for k, v in system.named_buffers() if k in now)


def weights_under_another_schedule():
    """A network that was trained with one schedule can be sampled with another: loading weights does not
    bring the old tables along.
    """
    old, new = tiny_system(), tiny_system(betas=schedules.linear(20, 0.01, 0.5))
    before = new.process.schedule.abar.clone()
    checkpoints.restore(new, old.state_dict())
    assert torch.equal(new.process.schedule.abar, before) and not torch.equal(
        before, old.process.schedule.abar
    )


@pytest.mark.parametrize("kind", ["ddpm", "diffusevae"])
def test_no_schedule_in_checkpoints_or_averages(kind, tmp_path):
    run_without_schedule(kind, tmp_path)


def test_schedule_stays_where_weights_are_averaged_or_loaded():
    average_beside_schedule(lambda system: system.parameters())
    weights_under_another_schedule()


def test_saved_tables_are_noticed(tmp_path, monkeypatch):
    "The trap put back: tables that go into every state_dict, as buffers do unless told otherwise."

    def add_saved_tables(self, **tables):
        for name, values in tables.items():
            self.register_buffer(name, values)

    monkeypatch.setattr(NoiseLevels, "_add_tables", add_saved_tables)
    with pytest.raises(AssertionError, match="schedule"):
        run_without_schedule("ddpm", tmp_path)
    with pytest.raises(AssertionError):
        weights_under_another_schedule()


def test_averaged_tables_are_noticed(tmp_path, monkeypatch):
    "The trap put back: an average over everything that a system holds, its buffers too."

    def everything(system):
        return [*system.parameters(), *system.process.schedule.buffers()]

    with pytest.raises(AssertionError):
        average_beside_schedule(everything)
    real = training.averages_of
    tables = list(Schedule(schedules.cosine(20)).buffers())

    def averages_with_tables(parameters, *arguments, **keywords):
        return real([*parameters, *tables], *arguments, **keywords)

    monkeypatch.setattr(training, "averages_of", averages_with_tables)
    with pytest.raises(AssertionError, match="ema"):
        run_without_schedule("ddpm", tmp_path)


# ---------------------------------------------------------------- conditions


def test_drop_stays_on_the_device():
    """`meta` is a device that is not the CPU, and every machine has it: a draw on the wrong device fails
    there.
    """
    cond = Cond(
        image=torch.zeros(4, 1, 8, 8, dtype=torch.bfloat16, device="meta"),
        label=torch.zeros(4, dtype=torch.long, device="meta"),
    )
    parts = drop_parts(cond, 0.5).parts()
    assert {v.device.type for v in parts.values()} == {"meta"} and parts["image"].dtype == torch.bfloat16
