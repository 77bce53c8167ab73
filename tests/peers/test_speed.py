"""Ratios: what a sampler costs beside its network calls, guidance beside one call on the doubled batch, the
training loop beside the step itself.
"""

import statistics
import time

import pytest
import torch

from diffusevae.core.images import load
from diffusevae.core.training import Settings, train
from diffusevae.diffusion import samplers
from diffusevae.diffusion.conditions import Cond
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.guidance import cfg
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet


@pytest.fixture(scope="module")
def ddpm():
    "The demo's network."
    torch.manual_seed(0)
    return DDPM(
        UNet(16, width=64, multipliers=(1, 1), patch=2), Diffusion(Schedule(cosine(1000)), "v")
    ).eval()


def seconds(f):
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def best_of(attempts, measure, limit):
    """The smallest of up to `attempts` measurements, stopping at the first within `limit`: other work on
    the machine only ever adds.
    """
    ratios = []
    for _ in range(attempts):
        ratios.append(measure())
        if ratios[-1] <= limit:
            break
        time.sleep(1)
    print(f"ratios {[round(r, 4) for r in ratios]}")
    return min(ratios)


WALKS = {
    "ddpm": (samplers.ddpm, {}),
    "ddpm with a seed a sample": (samplers.ddpm, {"seeds": range(64)}),
    "ddim": (samplers.ddim, {}),
    "ddim, eta 1": (samplers.ddim, {"eta": 1.0}),
    "ddim, dynamic threshold": (samplers.ddim, {"clip": 0.995}),
    "dpm_solver": (samplers.dpm_solver, {}),
    "heun": (samplers.heun, {}),
    "ddim_invert": (samplers.ddim_invert, {}),
    "ddim_invert, corrected": (samplers.ddim_invert, {"corrections": 1}),
}


def step_by_step(walk, bare, asked):
    """For each step of a walk, its seconds and those of as many bare network calls right after it, both per
    call; `asked` grows by one a call.
    """
    while True:
        before = len(asked)
        whole = seconds(lambda: next(walk, None))
        if not (calls := len(asked) - before):
            return
        yield whole / calls, seconds(lambda: [bare() for _ in range(calls)]) / calls


def undisturbed(pairs):
    "The ratio of the two columns' lower quartiles: what other work on the machine adds lies above them."
    ours, bare = (statistics.quantiles(column, n=4)[0] for column in zip(*pairs))
    return ours / bare


@pytest.mark.parametrize("name", WALKS)
def test_sampler_costs_its_network_calls_and_hardly_more(ddpm, name):
    """The steps of two walks, each timed beside its own calls; the last one of a walk does less and is left
    out. The best of several such ratios.
    """
    sampler, settings = WALKS[name]
    x, t, asked = torch.randn(64, 1, 16, 16), torch.full((64,), 500.0), []

    def counted(x, t, cond):
        asked.append(1)
        return ddpm.denoiser(x, t, cond)

    @torch.no_grad()
    def bare():
        ddpm.denoiser(x, t)

    def ratio():
        walks = [sampler(counted, ddpm.process, x, steps=12, **settings) for _ in range(2)]
        return undisturbed([pair for walk in walks for pair in list(step_by_step(walk, bare, asked))[:-1]])

    for _ in range(10):  # threads and memory warm up
        bare()
    assert best_of(10, ratio, 1.03) <= 1.03


def test_guidance_costs_one_call_on_the_doubled_batch():
    torch.manual_seed(0)
    net = UNet(16, width=64, multipliers=(1, 1), patch=2, classes=10).eval()
    x, t, label = torch.randn(64, 1, 16, 16), torch.full((64,), 500.0), torch.arange(64) % 10
    guided, cond = cfg(net, 2.0), Cond(label=label)
    doubled = torch.cat([x, x]), torch.cat([t, t]), Cond(label=torch.cat([label, torch.full_like(label, -1)]))

    @torch.no_grad()
    def ratio():
        return undisturbed(
            [(seconds(lambda: guided(x, t, cond)), seconds(lambda: net(*doubled))) for _ in range(21)]
        )

    assert best_of(5, ratio, 1.05) <= 1.05


class Stopwatch:
    "Seconds spent in the functions that it wraps, nested calls counted once."

    def __init__(self):
        self.total, self.depth = 0.0, 0

    def wrap(self, owner, name, monkeypatch):
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            started, self.depth = time.perf_counter(), self.depth + 1
            try:
                return inner(*args, **kwargs)
            finally:
                self.depth -= 1
                self.total += (time.perf_counter() - started) * (self.depth == 0)

        monkeypatch.setattr(owner, name, timed)


def test_training_loop_costs_under_three_percent_of_a_step(ddpm, tmp_path, monkeypatch):
    """Batch, EMA, clipping, schedule and log against forward, backward and optimizer; validation and
    checkpoints are work of their own, so they are off.
    """
    watch = Stopwatch()
    watch.wrap(DDPM, "loss", monkeypatch)
    watch.wrap(torch.Tensor, "backward", monkeypatch)
    watch.wrap(torch.optim.AdamW, "step", monkeypatch)
    watch.wrap(torch.optim.AdamW, "zero_grad", monkeypatch)
    images = load("digits")

    def ratio():
        settings = Settings(steps=1000, batch_size=64, validation=0.0, checkpoint_every=1000, device="cpu")
        records = train(DDPM(ddpm.denoiser, ddpm.process), images, settings, tmp_path / str(time.time_ns()))
        for _ in range(5):
            next(records)
        started, watch.total = time.perf_counter(), 0.0
        for _ in range(30):
            next(records)
        whole = time.perf_counter() - started
        return 1 - watch.total / whole

    assert best_of(5, ratio, 0.03) < 0.03


def test_stopwatch_sees_the_steps_own_work(monkeypatch):
    "The ruler itself: what it wraps is counted once, what it does not wrap is not."
    watch = Stopwatch()
    watch.wrap(time, "sleep", monkeypatch)
    time.sleep(0.05)
    sum(range(100_000))
    assert 0.05 <= watch.total < 0.2
