"""Flows: log-determinants against autograd, densities against zuko, and densities in the plane that they
must learn better than any Gaussian.

zuko's networks, masks, couplings, autoregressive passes and distributions are its own; it is given our
weights only.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import zuko
from torch import nn
from torch.distributions import AffineTransform, IndependentTransform, MultivariateNormal

from diffusevae.autoencoders.flows import IAF, Autoregressive, Coupling, Flow, Planar, RealNVP
from diffusevae.core.checkpoints import load_system, save_system

FLOWS = [Planar, RealNVP, IAF]
each_flow = pytest.mark.parametrize("make", FLOWS)
both_precisions = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"]
)


def randomised(flow, seed=0, std=0.2):
    "The same flow with every parameter drawn from N(0, std²)."
    g = torch.Generator().manual_seed(seed)
    for p in flow.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return flow.requires_grad_(False)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- determinants and inverses


@each_flow
@both_precisions
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16])
def test_log_determinant(make, dtype, tolerance, dim):
    if dim == 1 and make is not Planar:
        with pytest.raises(ValueError, match="dim of at least 2"):
            make(1)
        return
    for seed, layers in ((0, 1), (1, 4), (2, 5)):
        flow, z = randomised(make(dim, layers=layers), seed).to(dtype), normal(12, dim, seed=seed).to(dtype)
        out, log_det = flow(z)
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(z)[0].sum(0), z).permute(1, 0, 2)
        assert out.shape == (12, dim) and log_det.shape == (12,) and log_det.dtype == out.dtype == dtype
        assert log_det.abs().max() > 1e-3, "near the identity nothing is tested"
        assert (log_det - torch.linalg.slogdet(jacobian.double()).logabsdet).abs().max() <= tolerance


@each_flow
def test_inverse(make):
    flow, z = randomised(make(6)), normal(64, 6).float()
    back, log_det = flow.inverse(flow(z)[0])
    assert (back - z).abs().max() <= 1e-5 and torch.allclose(log_det, -flow(z)[1], atol=1e-4)
    assert flow.inverse(z[:1])[0].shape == (1, 6) and flow(z[:1])[1].shape == (1,)


@each_flow
def test_starts_near_the_identity_and_survives_saving(make, tmp_path):
    torch.manual_seed(0)
    flow, z = make(4), normal(9, 4).float()
    out, log_det = flow(z)
    assert torch.allclose(out, z, atol=1e-5) and log_det.abs().max() < 1e-5
    save_system(tmp_path / "flow.safetensors", randomised(flow))
    again = load_system(tmp_path / "flow.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again(z), flow(z)))


@each_flow
def test_density_integrates_to_one(make):
    """Of what a flow does to a Gaussian, in the plane: the formula's density, found through the inverse,
    summed over a grid.
    """
    flow = randomised(make(2), std=0.3).double()
    side = torch.linspace(-9, 9, 241, dtype=torch.float64)
    z, log_det = flow.inverse(torch.cartesian_prod(side, side))
    assert (
        abs(float(((-(z**2).sum(1) / 2 + log_det).exp() / (2 * math.pi)).sum() * (18 / 240) ** 2) - 1) < 0.01
    )


def test_planar_constraint_holds_for_hostile_parameters():
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        flow = Planar(3, layers=8).double().requires_grad_(False)
        for p in flow.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g, dtype=torch.float64)
                * 10 ** (4 * torch.rand((), generator=g) - 2)
            )
        flow.u -= 5 * flow.w
        u, slope = flow.constrained()
        assert ((flow.w * u).sum(1) >= -1 - 1e-6).all() and (slope > 0).all()
        assert flow(normal(20, 3))[1].isfinite().all()


# ---------------------------------------------------------------- against zuko


def copied(ours, theirs, columns=slice(None), rows=slice(None)):
    "Our three linear layers' weights in zuko's network."
    a, b, c = (m for m in ours if hasattr(m, "weight"))
    x, y, z = (m for m in theirs if hasattr(m, "weight"))
    for new, weight, bias in (
        (x, a.weight[:, columns], a.bias),
        (y, b.weight, b.bias),
        (z, c.weight[rows], c.bias[rows]),
    ):
        new.weight.data, new.bias.data = weight.clone(), bias.clone()
    theirs[3] = nn.Tanh()  # ours has another activation there; the rest is theirs
    return theirs.double()


def by(network):
    "What a network's output means: exp(tanh(raw))·z + shift, as torch's distribution transforms."

    def transform(x):
        raw, shift = network(x).chunk(2, dim=-1)
        return IndependentTransform(AffineTransform(shift, raw.tanh().exp()), 1)

    return transform


def as_zuko(layer, dim, hidden):
    "zuko's twin of one of our layers."
    if isinstance(layer, Coupling):
        keep = layer.mask.bool()
        changed = (~keep).nonzero().squeeze(1)
        net = zuko.nn.MLP(int(keep.sum()), 2 * len(changed), [hidden, hidden], activation=nn.SiLU)
        return zuko.transforms.CouplingTransform(
            by(copied(layer.network, net, keep, torch.cat([changed, dim + changed]))), keep
        )
    earlier = torch.ones(dim, dim).tril(-1).bool().repeat(2, 1)
    net = copied(layer.network, zuko.nn.MaskedMLP(earlier, [hidden, hidden], activation=nn.SiLU))
    return zuko.transforms.AutoregressiveTransform(by(net), passes=dim)


def twin(flow, hidden):
    "The distribution of flow(ε), ε ~ N(0, I), built by zuko."
    parts = []
    for layer in flow.maps:
        parts.append(as_zuko(layer, flow.dim, hidden))
        if isinstance(layer, Autoregressive):
            parts.append(zuko.transforms.PermutationTransform(torch.arange(flow.dim).flip(0)))
    zero = torch.zeros(flow.dim, dtype=torch.float64)
    return zuko.distributions.NormalizingFlow(
        zuko.transforms.ComposedTransform(*parts).inv, zuko.distributions.DiagNormal(zero, zero + 1)
    )


@pytest.mark.parametrize("make", [RealNVP, IAF])
@pytest.mark.parametrize("dim", [2, 5, 16])
def test_density_agrees_with_zuko(make, dim):
    flow = randomised(make(dim, layers=5, hidden=32)).double()
    theirs = twin(flow, 32)
    data = flow(normal(40, dim))[0] + 0.1 * normal(40, dim, seed=2)
    z, log_det = flow.inverse(data)
    ours = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double()).log_prob(z) + log_det
    assert ours.std() > 0.5 and (ours - theirs.log_prob(data)).abs().max() <= 1e-5


# ---------------------------------------------------------------- densities in the plane

CELLS, REACH = 240, 6.0
AXIS = (torch.arange(CELLS) + 0.5) / CELLS * 2 * REACH - REACH
GRID, AREA = torch.cartesian_prod(AXIS, AXIS), (2 * REACH / CELLS) ** 2


def bump(a, std):
    return -0.5 * (a / std) ** 2


def sine(z):
    return torch.sin(math.pi * z[:, 0] / 2)


def moons(z):
    """Energy 1 of Rezende and Mohamed 2015, table 1; `wave` and `split` are 2 and 4 with a factor that
    makes them integrable.
    """
    return -bump(z.norm(dim=1) - 2, 0.4) - torch.logaddexp(bump(z[:, 0] - 2, 0.6), bump(z[:, 0] + 2, 0.6))


def wave(z):
    return -bump(z[:, 1] - sine(z), 0.4) - bump(z[:, 0], 2.0)


def split(z):
    off = 3 * torch.sigmoid((z[:, 0] - 1) / 0.3)
    return -torch.logaddexp(bump(z[:, 1] - sine(z), 0.4), bump(z[:, 1] - sine(z) + off, 0.35)) - bump(
        z[:, 0], 2.0
    )


def rings(z):
    return -torch.logaddexp(bump(z.norm(dim=1) - 1, 0.25), bump(z.norm(dim=1) - 3, 0.25))


def crescents(z):
    def half(c, s):
        return bump((z - torch.tensor([c, -s / 2])).norm(dim=1) - 2, 0.25) - F.softplus(
            -4 * s * (z[:, 1] + s / 2)
        )

    return -torch.logaddexp(half(-1.0, -1.0), half(1.0, 1.0))


def log_z(energy):
    return torch.logsumexp(-energy(GRID), 0) + math.log(AREA)


class Gaussian(Flow):
    "z ↦ Lz + μ."

    def __init__(self):
        super().__init__(2, 1)
        self.mean, self.free = nn.Parameter(torch.randn(2)), nn.Parameter(torch.zeros(2, 2))

    def steps(self, z):
        yield (
            z @ (self.free.tril(-1) + self.free.diag().exp().diag()).T + self.mean,
            self.free.diag().sum().expand(len(z)),
        )


def log_normal(z):
    return bump(z, 1.0).sum(1) - math.log(2 * math.pi)


def fitted(flow, loss, steps, lr):
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(), decay.step()
    return flow


def reverse_kl(make, energy, steps, lr, seed=0):
    "D(q‖p) in nats, of a flow that is trained on the energy alone."
    torch.manual_seed(seed)
    flow = make()

    def loss(n=256):
        z = torch.randn(n, 2)
        out, log_det = flow(z)
        return (log_normal(z) - log_det + energy(out)).mean()

    fitted(flow, loss, steps, lr)
    with torch.no_grad():
        return float(loss(20_000) + log_z(energy))


def test_normalisers():
    "Sheared Gaussians have known ones, and no mass lies outside the grid."
    assert abs(float(log_z(wave)) - math.log(2 * math.pi * 0.4 * 2.0)) < 0.01
    for energy in (moons, wave, split, rings, crescents):
        edge = (-energy(GRID) - log_z(energy)).reshape(CELLS, CELLS)
        assert max(edge[0].max(), edge[-1].max(), edge[:, 0].max(), edge[:, -1].max()) < -5


@pytest.mark.parametrize("energy", [moons, wave, split])
def test_reverse_kl(energy):
    "Planar and IAF, trained on the energy, come to at most half of the best Gaussian's divergence."
    gauss = min(reverse_kl(Gaussian, energy, 250, 0.05, seed) for seed in range(3))
    planar = reverse_kl(lambda: Planar(2, layers=8), energy, 700, 0.03)
    iaf = reverse_kl(lambda: IAF(2, hidden=32), energy, 500, 0.01)
    print(f"\n{energy.__name__}: Gaussian {gauss:.3f}, planar {planar:.3f}, IAF {iaf:.3f}")
    assert -0.02 < planar <= gauss / 2 and -0.02 < iaf <= gauss / 2


@pytest.mark.parametrize("energy", [moons, rings, crescents])
def test_forward_kl(energy):
    """RealNVP, trained on samples, comes to at most half of the divergence of the Gaussian with the data's
    moments; both by quadrature.
    """
    torch.manual_seed(0)
    log_p = -energy(GRID) - log_z(energy)
    data = (
        GRID[torch.multinomial(log_p.exp(), 20_000, replacement=True)]
        + (torch.rand(20_000, 2) - 0.5) * AREA**0.5
    )
    flow = RealNVP(2, hidden=32)

    def log_q(x):
        z, log_det = flow(x)
        return log_normal(z) + log_det

    fitted(flow, lambda: -log_q(data[torch.randint(len(data), (256,))]).mean(), 600, 0.01)
    with torch.no_grad():
        gauss = MultivariateNormal(data.mean(0), data.T.cov()).log_prob(GRID)
        kl, best = (float((log_p.exp() * (log_p - q)).sum() * AREA) for q in (log_q(GRID), gauss))
    print(f"\n{energy.__name__}: Gaussian {best:.3f}, RealNVP {kl:.3f}")
    assert 0 < kl <= best / 2
