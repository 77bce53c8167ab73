"""Guidance: closed forms on Gaussian mixtures, diffusers' guider, the noisy classifier, and the traps of
the field put back one by one.

On a mixture with classes everything is known: the ideal denoiser of a class is the conditional network,
that of all the unconditional one, and the exact classifier follows by Bayes' rule from densities that are
written down here once more.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers.guiders import ClassifierFreeGuidance
from tiny import LabelListener, shaken
from torch import nn

from diffusevae.core import checkpoints, images, training
from diffusevae.core.pixels import Batch, to_float
from diffusevae.diffusion import conditions, guidance, samplers
from diffusevae.diffusion.conditions import Cond, check_labels, drop_parts, null_condition
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.dit import DiT
from diffusevae.diffusion.guidance import (
    NoisyClassifier,
    cfg,
    class_gradient,
    classifier_guided,
    guidance_factor,
)
from diffusevae.diffusion.process import Diffusion, ideal_denoiser
from diffusevae.diffusion.schedules import Schedule, cosine, linear, zero_terminal_snr
from diffusevae.diffusion.unet import Embedding, UNet

K, S = 3, 0.25  # classes of the mixture, and the width of its clouds
every_prediction = pytest.mark.parametrize("predict", ["eps", "x0", "v"])
grey_and_colour = pytest.mark.parametrize(
    "shape", [(1, 6, 6), (3, 4, 4), (2, 1, 1)], ids=["grey", "colour", "plane"]
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def process_of(predict="eps", betas=None, **how):
    return Diffusion(Schedule(cosine(1000) if betas is None else betas), predict, **how)


class Mixture:
    "Six clouds, two a class, in images of `shape`: denoisers and classifier of one `process`, float64."

    def __init__(self, process, shape=(2, 1, 1)):
        spread = torch.randn(6, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.process, self.centres = (
            process,
            0.8 * spread / spread.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1),
        )
        self.of = torch.arange(6) % K

    def __call__(self, x, t, cond=None):
        label = torch.full((len(x),), -1) if cond is None else cond.label
        answers = [ideal_denoiser(self.process, self.centres[self.of == c], S)(x, t) for c in range(K)] + [
            ideal_denoiser(self.process, self.centres, S)(x, t)
        ]
        return torch.stack(answers)[label, torch.arange(len(x))]  # -1 is the last, all of them

    def joint(self, x, t):
        "log p_t(x, c) up to a constant, `(B, K)`: the exact classifier's logits."
        abar = self.process.schedule.abar[t.long()].reshape(-1, 1)
        d2 = (x.flatten(1)[:, None] - abar.sqrt()[:, None] * self.centres.flatten(1)).square().sum(2)
        log_p = -d2 / (2 * (abar * S**2 + 1 - abar))
        return torch.stack([log_p[:, self.of == c].logsumexp(1) for c in range(K)], dim=1)

    def tilted_score(self, x, t, label, power):
        "∇ log p_t(x)·p_t(c | x)^power, by autograd."
        x = x.clone().requires_grad_()
        joint = self.joint(x, t)
        log_p = joint.logsumexp(1)
        return torch.autograd.grad((log_p + power * (joint[range(len(x)), label] - log_p)).sum(), x)[0]


def places(shape, n=60):
    "Noisy images `(n, …)`, times and labels all over the schedule."
    return (
        torch.randn(n, *shape, dtype=torch.float64),
        torch.linspace(20, 940, n).round(),
        torch.arange(n) % K,
    )


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------- closed forms


def guides_rightly(guide, shape=(2, 1, 1)):
    "Does `guide(model, w)` give the score of p(x)·p(c | x)^(1 + w)?"
    mixture, (x, t, label) = Mixture(process_of(), shape), places(shape)
    sigma = (1 - mixture.process.abar_seen(t, x)).sqrt()
    scores = [
        (-guide(mixture, w)(x, t, Cond(label=label)) / sigma, mixture.tilted_score(x, t, label, 1 + w))
        for w in (-1.0, 0.0, 0.5, 2.0, 7.0)
    ]
    return all(relative(ours, true) < 1e-6 for ours, true in scores)


@grey_and_colour
def test_the_score_is_that_of_the_tilted_density(shape):
    assert guides_rightly(cfg, shape)
    mixture = Mixture(process_of(), shape)
    assert guides_rightly(
        lambda model, w: (
            classifier_guided(model, mixture.joint, w, mixture.process) if w >= 0 else cfg(model, w)
        ),
        shape,
    )


MIXED = {
    "g for w": lambda out, free, w: free + w * (out - free),
    "w + 2 for w + 1": lambda out, free, w: (2 + w) * out - (1 + w) * free,
    "weights that sum to -1": lambda out, free, w: w * out - (1 + w) * free,
    "weights that sum to 1 + 2w": lambda out, free, w: (1 + w) * out + w * free,
    "null and condition swapped": lambda out, free, w: (1 + w) * free - w * out,
    "weights that sum to 0": lambda out, free, w: (1 + w) * (out - free),
}


@pytest.mark.parametrize("mutant", MIXED)
def test_mixed_conventions_are_caught(mutant):
    def guide(model, w):
        return lambda x, t, cond: MIXED[mutant](model(x, t, cond), model(x, t, null_condition(cond)), w)

    assert guides_rightly(
        lambda model, w: (
            lambda x, t, cond: (1 + w) * model(x, t, cond) - w * model(x, t, null_condition(cond))
        )
    )
    assert not guides_rightly(guide)


@grey_and_colour
def test_what_is_predicted_does_not_matter(shape):
    x, t, label = places(shape)
    for guide in (lambda m: cfg(m, 3.0), lambda m: classifier_guided(m, m.joint, 3.0, m.process)):
        x0 = [
            (p := process_of(predict)).to_x0(guide(Mixture(p, shape))(x, t, Cond(label=label)), x, t.long())
            for predict in ("eps", "x0", "v")
        ]
        assert relative(x0[1], x0[0]) < 1e-6 and relative(x0[2], x0[0]) < 1e-6


@every_prediction
@pytest.mark.parametrize(
    "sampler, how",
    [("ddim", {}), ("ddim", {"eta": 1.0}), ("ddpm", {}), ("dpm_solver", {}), ("heun", {})],
    ids=["ddim", "ddim eta 1", "ddpm", "dpm_solver", "heun"],
)
def test_both_kinds_meet_on_whole_walks(predict, sampler, how):
    """The exact classifier on the conditional model at w, on the unconditional one at 1 + w, and the ideal
    denoisers.
    """
    mixture = Mixture(process_of(predict))
    n, w = 12, 2.0
    cond, x_T = Cond(label=torch.arange(n) % K), torch.randn(n, 2, 1, 1, dtype=torch.float64)
    guided = [
        cfg(mixture, w),
        classifier_guided(mixture, mixture.joint, w, mixture.process),
        classifier_guided(lambda x, t, cond=None: mixture(x, t), mixture.joint, 1 + w, mixture.process),
    ]
    walk = functools.partial(
        samplers.samplers_by_name[sampler],
        process=mixture.process,
        x_T=x_T,
        cond=cond,
        steps=20,
        clip=False,
        seeds=range(n),
        **how,
    )
    free, told, untold = ([s.x for s in walk(g)] for g in guided)
    assert (
        max((a - b).abs().max() for a, b in zip(free, told)) < 1e-4
        and max((a - b).abs().max() for a, b in zip(free, untold)) < 1e-4
    )
    assert (samplers.final_image(walk(mixture)) - free[-1]).abs().max() > 0.05, "guidance did nothing"


def test_more_weight_is_more_certain_and_less_diverse():
    mixture, n = Mixture(process_of()), 300
    angles = torch.tensor([90.0, 210.0, 330.0], dtype=torch.float64).deg2rad()
    ways = torch.stack([angles.cos(), angles.sin()], dim=1)[:, :, None, None]
    mixture.centres = torch.cat(
        [0.3 * ways, 0.8 * ways]
    )  # an inner cloud of each class, close to the other classes, and an outer one
    cond, x_T = Cond(label=torch.zeros(n, dtype=torch.long)), torch.randn(n, 2, 1, 1, dtype=torch.float64)

    def drawn(model):
        x = samplers.final_image(
            samplers.dpm_solver(
                model, mixture.process, x_T, cond=cond, steps=20, spacing="trailing", clip=False
            )
        )
        return float((mixture.joint(x, torch.zeros(n)).argmax(1) == 0).double().mean()), float(
            x.flatten(1).var(0).sum()
        )

    right, spread = zip(*(drawn(cfg(mixture, w)) for w in (-1.0, 0.0, 1.0, 4.0)))
    assert right[0] < 0.5 < right[1] < right[2] <= right[3] and right[3] > 0.99
    assert spread[0] > spread[1] > 1.2 * spread[2] > 1.2 * spread[3]
    low = drawn(cfg(mixture, 4.0, interval=(0, 300)))
    assert low[0] > right[1] and low[1] > 1.2 * spread[3], "an interval of low noise leaves more diversity"


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("g", [1.0, 2.0, 7.5])
def test_agrees_with_diffusers(g, rescale):
    "Both of their formulations: null + g·(cond - null), and cond + w·(cond - null)."
    out, free = torch.randn(2, 4, 3, 8, 8) + torch.arange(4).reshape(4, 1, 1, 1)

    def model(x, t, cond):
        return torch.cat([out, free])[: len(x)]

    ours = cfg(model, g - 1, rescale=rescale)(
        torch.zeros(4, 3, 8, 8), torch.zeros(4), Cond(label=torch.arange(4))
    )
    for scale, original in ((g, False), (g - 1, True)):
        theirs = ClassifierFreeGuidance(
            guidance_scale=scale, guidance_rescale=rescale, use_original_formulation=original
        )
        theirs._step, theirs._num_inference_steps, theirs._timestep = 0, 10, torch.tensor(900)
        if theirs._is_cfg_enabled():
            assert relative(ours, theirs.forward(out, free).pred) < 1e-5
        else:  # with g = 1 they call the network once, as we do, and leave it at that
            assert torch.equal(ours, out)


# ---------------------------------------------------------------- the call


def test_calls_are_counted():
    net, process = LabelListener(classes=10), process_of(betas=linear(1000))
    x_T, cond = torch.randn(3, 1, 4, 4), Cond(label=torch.tensor([0, 9, -1]))
    twice, once = [0, 9, -1, -1, -1, -1], [0, 9, -1]

    def heard(w, sampler=samplers.ddim, **how):
        net.heard.clear()
        samplers.final_image(sampler(cfg(net, w, **how), process, x_T, cond=cond, steps=10))
        return [labels.tolist() for labels in net.heard]

    assert (
        heard(2.0) == [twice] * 10 and heard(0.0) == [once] * 10 and heard(2.0, samplers.heun) == [twice] * 19
    )
    assert heard(2.0, interval=(200, 700)) == [once] * 2 + [twice] * 6 + [once] * 2
    assert heard(2.0, interval=[950, 999]) == [once] * 10  # between two steps of the walk


def test_the_interval_holds_for_each_sample():
    mixture, (x, t, label) = Mixture(process_of()), places((2, 1, 1))
    cond = Cond(label=label)
    always, never, part = (
        cfg(mixture, 2.0, interval=i)(x, t, cond) for i in (None, (2000, 3000), (300, 600))
    )
    inside = (t >= 300) & (t <= 600)
    assert (
        torch.allclose(part[inside], always[inside])
        and torch.allclose(part[~inside], never[~inside])
        and 0 < inside.sum() < len(t)
    )
    assert torch.equal(never, mixture(x, t, cond)) and torch.equal(
        cfg(mixture, 0.0, rescale=1.0)(x, t, cond), never
    )
    assert torch.allclose(cfg(mixture, 2.0, interval=(0, 999))(x, t, cond), always)


def test_the_interval_speaks_of_the_time_input():
    "Under continuous noise levels that is √abar, large where noise is small."
    net, process = LabelListener(classes=10), process_of(betas=linear(1000), continuous=True)
    samplers.final_image(
        samplers.ddim(
            cfg(net, 1.0, interval=(0.5, 1.0)),
            process,
            torch.randn(1, 1, 4, 4),
            cond=Cond(label=torch.tensor([3])),
            steps=10,
        )
    )
    wanted = [2 if process.schedule.sqrt_abar[t] >= 0.5 else 1 for t in samplers.timesteps(1000, 10)]
    assert [len(h) for h in net.heard] == wanted and {1, 2} == set(wanted)


NETS = {
    "unet": lambda **how: UNet(12, width=8, **how),
    "unet folded": lambda **how: UNet(24, width=8, patch=2, multipliers=(1, 1, 1), **how),
    "dit": lambda **how: DiT(12, patch=2, width=16, depth=1, heads=2, **how),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "n, channels", [(1, 1), (1, 3), (3, 3)], ids=["one grey", "one in colour", "three in colour"]
)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_networks(name, n, channels, variance):
    """An image, a code and a label as the condition, all dropped together; the learned variance is the
    conditional one.
    """
    process = process_of("eps", linear(50), variance=variance)
    net = shaken(
        NETS[name](channels=channels, image_channels=2, z_dim=5, classes=4, outputs=process.outputs(channels))
    )
    x, t = torch.randn(n, channels, net.size, net.size), torch.full((n,), 20.0)
    cond = Cond(torch.randn(n, 2, net.size, net.size), torch.randn(n, 5), torch.arange(n))
    with torch.no_grad():
        told, free, out = net(x, t, cond), net(x, t, null_condition(cond)), cfg(net, 1.5)(x, t, cond)
        assert relative(out[:, :channels], 2.5 * told[:, :channels] - 1.5 * free[:, :channels]) < 1e-4
        assert relative(told[:, :channels], free[:, :channels]) > 1e-2 and out.shape == told.shape
        assert torch.allclose(out[:, channels:], told[:, channels:], atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = cfg(net, 1.5, rescale=0.5)(x, t, cond)
        assert (
            half[:, :channels].dtype == torch.float32
            and relative(half[:, :channels], cfg(net, 1.5, rescale=0.5)(x, t, cond)[:, :channels]) < 0.1
        )
    how = dict(steps=4, clip=True, seeds=range(n))
    x_T = samplers.Noise(x.shape, range(n))()
    crowd = samplers.final_image(samplers.ddpm(cfg(net, 1.5), process, x_T, cond=cond, **how))
    alone = samplers.final_image(
        samplers.ddpm(cfg(net, 1.5), process, x_T[-1:], cond=cond[-1], **{**how, "seeds": [n - 1]})
    )
    assert crowd.shape == x.shape and torch.allclose(crowd[-1:], alone, atol=1e-4)


def test_channels_last_is_kept():
    net = shaken(UNet(12, channels=3, width=8, classes=4))
    x, t, cond = (
        torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last),
        torch.ones(2),
        Cond(label=torch.tensor([1, 2])),
    )
    seen = []
    net.stem.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    cfg(net, 1.0, rescale=0.5)(x, t, cond)
    classifier = NoisyClassifier(12, 3, 4, process_of(), width=8)
    classifier.stem.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    assert class_gradient(classifier, x, t, cond.label).shape == x.shape
    assert seen == [True, True] and classifier.stages[0].residual.conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )


def test_rescaling_survives_a_network_that_answers_zero():
    net = UNet(12, width=8, classes=4)
    assert not cfg(net, 3.0, rescale=0.7)(
        torch.randn(2, 1, 12, 12), torch.ones(2), Cond(label=torch.tensor([1, 2]))
    ).any()


# ---------------------------------------------------------------- traps, put back


def null_has_a_row_of_its_own(embedding, classes):
    "Does the label -1 hear a row that no class hears?"
    t = torch.zeros(classes + 1)
    heard = embedding(t, Cond(label=torch.cat([torch.arange(classes), torch.tensor([-1])])))
    return bool((heard[:-1] - heard[-1]).abs().amax(1).min() > 1e-3)


def test_no_null_row_is_caught():
    class Wraps(Embedding):
        "-1 as Python reads it: the last class."

        def forward(self, t, cond):
            return self.time[0].weight.new_zeros(len(t), 1) + self.label.weight[:-1][cond.label]

    class Clamps(Embedding):
        "-1 as the first class."

        def forward(self, t, cond):
            return self.label(cond.label.clamp(min=0))

    assert null_has_a_row_of_its_own(Embedding(8, 16, classes=5), 5)
    assert not null_has_a_row_of_its_own(Wraps(8, 16, classes=5), 5) and not null_has_a_row_of_its_own(
        Clamps(8, 16, classes=5), 5
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(8, width=8, multipliers=(1,), classes=5),
        lambda: DiT(8, channels=1, patch=2, width=16, depth=1, heads=2, classes=5),
    ],
    ids=["unet", "dit"],
)
def test_the_null_row_is_neither_the_last_class_nor_any_other(make):
    """Of whole networks: changing the row after the last class changes the answer to -1, changing the
    others' does not.
    """
    net = shaken(make())
    table = next(m for m in net.modules() if isinstance(m, nn.Embedding)).weight
    x, t = torch.randn(6, 1, 8, 8), torch.full((6,), 5.0)
    cond = Cond(label=torch.tensor([0, 1, 2, 3, 4, -1]))
    with torch.no_grad():
        before = net(x, t, cond)
        table[:5] += 1
        classes_moved = (net(x, t, cond) - before).abs().amax((1, 2, 3)) > 1e-5
        table[:5] -= 1
        table[5] += 1
        null_moved = (net(x, t, cond) - before).abs().amax((1, 2, 3)) > 1e-4
    assert (
        table.shape[0] == 6
        and classes_moved.tolist() == [True] * 5 + [False]
        and null_moved.tolist() == [False] * 5 + [True]
    )


def drops_rightly(dropped, p=0.2, B=50, draws=300):
    """Per sample, at the right rate, the whole condition at once?

    The mean, the spread over batches, and the parts together.
    """
    whole = Cond(image=torch.ones(B, 1, 2, 2), z=torch.ones(B, 3), label=torch.zeros(B, dtype=torch.long))
    batches = [dropped(whole, p) for _ in range(draws)]
    gone = torch.stack([c.label == -1 for c in batches]).double()
    parts = all(
        torch.equal(c.label == -1, c.image.sum((1, 2, 3)) == 0)
        and torch.equal(c.label == -1, c.z.sum(1) == 0)
        for c in batches
    )
    rate = abs(gone.mean() - p) < 5 * (p * (1 - p) / (draws * B)) ** 0.5
    return bool(parts and rate and abs(gone.mean(1).var() * B / (p * (1 - p)) - 1) < 0.5)


def one_draw_a_batch(cond, p):
    return null_condition(cond) if torch.rand(()) < p else cond


def parts_apart(cond, p):
    return cond.map(lambda name, v: getattr(drop_parts(Cond(**{name: v}), p), name))


WRONG_DROPS = {
    "one draw a batch": one_draw_a_batch,
    "never": lambda cond, p: cond,
    "always": lambda cond, p: null_condition(cond),
    "kept with p": lambda cond, p: drop_parts(cond, 1 - p),
    "parts apart": parts_apart,
    "the label alone": lambda cond, p: Cond(cond.image, cond.z, drop_parts(Cond(label=cond.label), p).label),
    "the same samples always": lambda cond, p: cond.map(
        lambda name, v: torch.cat(
            [getattr(null_condition(cond), name)[: round(p * len(v))], v[round(p * len(v)) :]]
        )
    ),
}


@pytest.mark.parametrize("mutant", WRONG_DROPS)
def test_wrong_drops_are_caught(mutant):
    assert drops_rightly(drop_parts)
    assert not drops_rightly(WRONG_DROPS[mutant])


def keeps_labels_outside_training(system):
    """Do all labels reach the network in samples, whatever mode the system was left in, and in the loss of
    a validation?
    """
    x, label = torch.zeros(64, 1, 4, 4), torch.arange(64) % 10
    heard = system.denoiser.heard
    for mode in (True, False):
        heard.clear()
        system.train(mode).sample(64, label=label, steps=2)
        if not all(torch.equal(h, label) for h in heard):
            return False
    heard.clear()
    system.eval().loss(Batch(x, label))
    kept = len(heard) == 1 and torch.equal(heard[0], label)
    heard.clear()
    system.train().loss(Batch(x, label))
    return kept and 10 < heard[0].tolist().count(-1) < 54


class DropsInTheNetwork(LabelListener):
    "Drops labels itself, as starter kits do: right as long as somebody remembers eval()."

    def forward(self, x, t, cond=None):
        return super().forward(x, t, drop_parts(cond, 0.5) if self.training else cond)


class DropsAlways(DDPM):
    "The loss of validation drops as well."

    def condition_for(self, batch):
        return drop_parts(Cond(label=batch.label), self.label_drop)


class SamplesAsItIs(DDPM):
    "Sampling in whatever mode the system was left in."

    def sample(self, n, **how):
        return samplers.final_image(self.steps(n, **how))


def test_labels_that_drop_outside_training_are_caught():
    process = process_of("eps", linear(20))
    assert keeps_labels_outside_training(DDPM(LabelListener(classes=10), process, label_drop=0.5))
    assert not keeps_labels_outside_training(DropsAlways(LabelListener(classes=10), process, label_drop=0.5))
    careless = DropsInTheNetwork(classes=10)
    assert not keeps_labels_outside_training(SamplesAsItIs(careless, process))
    careless.heard.clear()
    DDPM(careless, process).train().sample(8, label=3, steps=2)
    assert [labels.tolist() for labels in careless.heard] == [[3] * 8] * 2, (
        "sample() leaves training mode, so even such a network is safe in it"
    )


def test_a_null_class_that_was_never_trained_is_refused():
    net = UNet(8, width=8, multipliers=(1,), classes=5)
    with pytest.raises(ValueError, match="null class"):
        DDPM(net, process_of()).sample(2, guidance=1.0, steps=2)
    assert DDPM(net, process_of(), label_drop=0.1).sample(2, guidance=1.0, steps=2).shape == (2, 1, 8, 8)


# ---------------------------------------------------------------- the noisy classifier


def classifier_of(size=8, channels=1, process=None, **how):
    return shaken(NoisyClassifier(size, channels, 4, process or process_of(), width=8, **how))


@pytest.mark.parametrize(
    "channels, how", [(1, {}), (3, {"patch": 2}), (2, {"multipliers": (1, 1, 2)}), (1, {"multipliers": (1,)})]
)
def test_the_gradient_against_finite_differences(channels, how):
    classifier = classifier_of(12, channels, **how).double()
    x, t, label = (
        torch.randn(4, channels, 12, 12, dtype=torch.float64),
        torch.tensor([0.0, 100.0, 500.0, 999.0]),
        torch.arange(4),
    )
    with torch.no_grad():
        gradient = class_gradient(classifier, x, t, label)
        along, h = torch.randn_like(x), 1e-5
        high, low = (F.log_softmax(classifier(x + d * along, t), 1)[range(4), label] for d in (h, -h))
    assert torch.allclose((high - low) / (2 * h), (gradient * along).sum((1, 2, 3)), rtol=1e-4, atol=1e-7)
    assert gradient.abs().sum((1, 2, 3)).min() > 0 and not gradient.requires_grad
    assert all(p.grad is None for p in classifier.parameters()), (
        "sampling must leave the classifier's own gradients alone"
    )
    assert torch.allclose(class_gradient(classifier, x[2:3], t[2:3], label[2:3]), gradient[2:3], atol=1e-9), (
        "a sample depends on its neighbours"
    )
    assert not class_gradient(classifier, x, t, torch.full((4,), -1)).any()


def test_the_gradient_under_autocast():
    classifier, x, t, label = (
        classifier_of(8, 3),
        torch.randn(2, 3, 8, 8),
        torch.tensor([10.0, 300.0]),
        torch.tensor([1, 2]),
    )
    exact = class_gradient(classifier, x, t, label)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = class_gradient(classifier, x, t, label)
        out = classifier_guided(shaken(UNet(8, channels=3, width=8)), classifier, 1.0)(
            x, t, Cond(label=label)
        )
    assert half.dtype == out.dtype == torch.float32 and relative(half, exact) < 0.1


@every_prediction
def test_the_classifier_shifts_what_is_predicted(predict):
    """By eps - w·√(1 - abar)·gradient in each of the three, next to a learned variance, for a network that
    takes the label and one that does not.
    """
    process = process_of(predict, linear(100), variance="learned_range")
    classifier, t = classifier_of(8, 3, process), torch.tensor([3, 60])
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([3, -1])
    for how in ({}, {"classes": 4}, {"image_channels": 1}, {"image_channels": 1, "classes": 4}):
        net = shaken(UNet(8, channels=3, width=8, outputs=6, **how))
        cond = Cond(image=torch.randn(2, 1, 8, 8) if net.image_channels else None, label=label)
        with torch.no_grad():
            own = net(x, t.float(), cond if net.classes else Cond(image=cond.image))
            out = classifier_guided(net, classifier, 2.5)(x, t.float(), cond)
        change = process.to_eps(out, x, t) - process.to_eps(own, x, t)
        shift = -2.5 * process.noise(t, x) * class_gradient(classifier, x, t.float(), label)
        assert (
            torch.allclose(change, shift, rtol=1e-3, atol=1e-4)
            and shift[0].abs().max() > 1e-3
            and not shift[1].any()
        )
        assert torch.equal(out[:, 3:], own[:, 3:])


def test_where_no_signal_is_left():
    "abar = 0: an image that says nothing cannot be read, and no infinite factor may come of it."
    x = torch.ones(2, 1, 1, 1)
    for predict in ("x0", "v"):
        process = process_of(predict, zero_terminal_snr(linear(100)))
        factor = guidance_factor(process, torch.tensor([99.0, 50.0]), x).flatten()
        assert factor[0] == 0 and factor.isfinite().all() and factor[1] != 0


def test_continuous_levels():
    "A classifier that was trained on √abar serves any schedule of the same kind."
    trained, inference = process_of(continuous=True), process_of("v", linear(10, 1e-6, 0.8), continuous=True)
    classifier, net = classifier_of(8, 1, trained), shaken(UNet(8, width=8, time_scale=1000.0))
    x = samplers.final_image(
        samplers.ddim(
            classifier_guided(net, classifier, 1.0, inference),
            inference,
            torch.randn(2, 1, 8, 8),
            cond=Cond(label=torch.tensor([0, 1])),
            steps=10,
        )
    )
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="another noise schedule"):
        classifier_guided(net, classifier, 1.0, process_of())
    seen = torch.tensor([0.2, 0.9])
    assert (
        classifier(torch.zeros(2, 1, 8, 8), seen)[0] - classifier(torch.zeros(2, 1, 8, 8), seen)[1]
    ).abs().max() > 1e-3, "it does not hear the level"


def test_training_and_saving(tmp_path):
    """A system like any other: the training loop's, its checkpoint rebuilds it, and it reads little noise
    better than much.
    """
    data = images.load("digits")
    settings = training.Settings(
        steps=80,
        batch_size=32,
        lr=4e-3,
        warmup=10,
        validation=0.05,
        validate_every=80,
        checkpoint_every=80,
        seed=0,
        device="cpu",
    )
    for _ in training.train(
        NoisyClassifier(16, 1, 10, process_of(), width=24, patch=2), data, settings, tmp_path
    ):
        pass
    classifier = checkpoints.load_system(tmp_path / "best.safetensors")
    test = images.load("digits", "test")
    x = to_float(test.images)

    def right(t):
        x_t = classifier.process.add_noise(x, torch.randn_like(x), torch.tensor([t]))
        return float(
            (classifier(x_t, torch.full((len(x),), float(t))).argmax(1) == test.labels).float().mean()
        )

    with torch.no_grad():
        assert right(0) > 0.5 and right(0) > right(700) > right(995) and right(995) < 0.25


# ---------------------------------------------------------------- wrong input


def unet(**how):
    return UNet(8, width=8, multipliers=(1,), **how)


CFG_ERRORS = {
    "w below -1": (
        lambda: cfg(unet(classes=4), -1.01),
        "w must be a finite number of at least -1, got -1.01",
    ),
    "w not a number": (lambda: cfg(unet(classes=4), float("nan")), "w must be a finite number"),
    "w infinite": (lambda: cfg(unet(classes=4), float("inf")), "w must be a finite number"),
    "no null class": (
        lambda: cfg(unet(), 1.0),
        "this UNet takes no condition, so there is nothing to guide by; build it with classes",
    ),
    "rescale": (lambda: cfg(unet(classes=4), 1.0, rescale=-0.1), r"rescale must lie in \[0, 1\], got -0.1"),
    "interval upside down": (
        lambda: cfg(unet(classes=4), 1.0, interval=(9, 3)),
        r"interval must be \(low, high\)",
    ),
    "interval of one": (lambda: cfg(unet(classes=4), 1.0, interval=5), r"interval must be \(low, high\)"),
    "interval of three": (
        lambda: cfg(unet(classes=4), 1.0, interval=(1, 2, 3)),
        r"interval must be \(low, high\)",
    ),
    "interval with nan": (
        lambda: cfg(unet(classes=4), 1.0, interval=(float("nan"), 3)),
        r"interval must be \(low, high\)",
    ),
}


@pytest.mark.parametrize("case", CFG_ERRORS)
def test_settings_are_refused_before_the_first_step(case):
    make, says = CFG_ERRORS[case]
    with pytest.raises(ValueError, match=says):
        make()


def test_conditions_are_refused():
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    for cond in (None, Cond()):
        for w in (0.0, 1.0):
            with pytest.raises(ValueError, match="guidance needs a condition to compare with none"):
                cfg(unet(classes=4), w)(x, t, cond)
    for label in ([0, 4], [0, 1, 2], [1]):
        with pytest.raises(ValueError, match="label"):
            cfg(unet(classes=4), 1.0)(x, t, Cond(label=torch.tensor(label)))
        with pytest.raises(ValueError, match="label"):
            classifier_guided(unet(), classifier_of(), 1.0)(x, t, Cond(label=torch.tensor(label)))
    for cond in (None, Cond(), Cond(z=torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="classifier guidance needs labels"):
            classifier_guided(unet(), classifier_of(), 1.0)(x, t, cond)


CLASSIFIER_ERRORS = {
    "negative w": (
        lambda: classifier_guided(unet(), classifier_of(), -0.5),
        "w must be a finite number of at least 0, got -0.5",
    ),
    "w infinite": (
        lambda: classifier_guided(unet(), classifier_of(), float("inf")),
        "w must be a finite number",
    ),
    "another size": (
        lambda: classifier_guided(unet(), classifier_of(12), 1.0),
        "images of size 12, the denoiser for size 8",
    ),
    "other channels": (
        lambda: classifier_guided(unet(), classifier_of(8, 3), 1.0),
        "images of channels 3, the denoiser for channels 1",
    ),
    "another schedule": (
        lambda: classifier_guided(unet(), classifier_of(), 1.0, process_of(betas=linear(1000))),
        "another noise schedule",
    ),
    "another length": (
        lambda: classifier_guided(unet(), classifier_of(), 1.0, process_of(betas=linear(50))),
        "another noise schedule",
    ),
    "no process": (lambda: classifier_guided(unet(), lambda x, t: x, 1.0), "no process of its own"),
    "a plain model's images": (
        lambda: classifier_guided(lambda x, t, cond: x, classifier_of(12), 1.0)(
            torch.zeros(2, 1, 8, 8), torch.zeros(2), Cond(label=torch.tensor([0, 1]))
        ),
        r"takes images of \(B, 1, 12, 12\), got \(2, 1, 8, 8\)",
    ),
    "a size that does not fold": (
        lambda: NoisyClassifier(9, 1, 4, process_of(), patch=2),
        "size 9 cannot be folded by 2",
    ),
    "training without labels": (
        lambda: classifier_of().loss(Batch(torch.zeros(2, 1, 8, 8))),
        "2 samples need 2 labels, one for each, got none",
    ),
    "training without a class": (
        lambda: classifier_of().loss(Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]))),
        "labels must lie in 0 … 3; got -1 … 0",
    ),
    "labels that are no integers": (
        lambda: check_labels(torch.tensor([0.5]), 1, 4),
        "labels must be int64, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", CLASSIFIER_ERRORS)
def test_classifiers_are_refused(case):
    make, says = CLASSIFIER_ERRORS[case]
    with pytest.raises(ValueError, match=says):
        make()


def test_the_null_label_is_one_thing():
    assert conditions.null_label == -1 and guidance.with_null(
        Cond(label=torch.tensor([2]))
    ).label.tolist() == [2, -1]
