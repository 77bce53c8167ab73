"""Official checkpoints: both official networks written anew from their description, with random weights,
against what our loaders make of them; bad files; the recipes.
"""

import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from tiny import random_images

from diffusevae.autoencoders import autoencoder
from diffusevae.core.checkpoints import load_system, save_system
from diffusevae.core.parameters import find_notebook
from diffusevae.diffusion import samplers
from diffusevae.diffusion.conditions import Cond
from diffusevae.diffusion.networks import preset
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.published import (
    Mismatch,
    load_official,
    load_official_ddpm,
    load_official_vae,
    official_settings,
    read_lightning,
)

WIDTH, MULTIPLIERS, SIZE, HEADS, T = 32, (1, 2, 2), 16, 4, 12
STRINGS = dict(
    encoder="16x2,16d2,16t8,8x1,8d8,8t1,1x1",
    decoder="1x1,1u8,1t8,8x2,8u2,8t16,16x1",
    channels="16:16,8:24,1:8",
)
SMALL = {
    "vae": STRINGS,
    "unet": dict(
        official_settings["cifar10"]["unet"],
        size=SIZE,
        width=WIDTH,
        multipliers=MULTIPLIERS,
        blocks=2,
        attention=(4,),
        heads=HEADS,
    ),
}


# ---------------------------------------------------------------- the official networks, anew


class Store(dict):
    """Tensors by official name, each drawn when it is first asked for: what a network computes says which
    it has, and of which shapes.
    """

    def __call__(self, name, *shape):
        if name not in self:
            mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            self[name] = mean + torch.randn(shape) * (
                0.2 if len(shape) == 1 else 1.2 / math.prod(shape[1:]) ** 0.5
            )
        return self[name]

    def conv(self, name, x, c, k=3, bias=True, **how):
        return F.conv2d(
            x, self(f"{name}.weight", c, x.shape[1], k, k), self(f"{name}.bias", c) if bias else None, **how
        )

    def linear(self, name, x, c):
        return F.linear(x, self(f"{name}.weight", c, x.shape[1]), self(f"{name}.bias", c))

    def norm(self, name, x, eps):
        return F.group_norm(x, 32, self(f"{name}.weight", x.shape[1]), self(f"{name}.bias", x.shape[1]), eps)


def block(p, name, x, emb, c, layout, scale_shift=False):
    "One residual block of either layout."
    norm1, conv1, told, norm2, conv2, skip, eps = {
        "openai": (
            "in_layers.0",
            "in_layers.2",
            "emb_layers.1",
            "out_layers.0",
            "out_layers.3",
            "skip_connection",
            1e-5,
        ),
        "ddim": ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut", 1e-6),
    }[layout]
    h = p.conv(f"{name}.{conv1}", F.silu(p.norm(f"{name}.{norm1}", x, eps)), c, padding=1)
    e = p.linear(f"{name}.{told}", F.silu(emb), 2 * c if scale_shift else c)[:, :, None, None]
    if scale_shift:
        h = p.norm(f"{name}.{norm2}", h, eps) * (1 + e[:, :c]) + e[:, c:]
    else:
        h = p.norm(f"{name}.{norm2}", h + e, eps)
    h = p.conv(f"{name}.{conv2}", F.silu(h), c, padding=1)
    return h + (x if x.shape[1] == c else p.conv(f"{name}.{skip}", x, c, 1))


def attend(p, name, x, layout, heads):
    """Attention of either layout: one map sorted by head and logits over the root of a head's channels;
    three maps and the root of all channels.
    """
    b, c, H, W = x.shape
    if layout == "openai":
        h = p.norm(f"{name}.norm", x, 1e-5).reshape(b, c, -1)
        qkv = F.conv1d(h, p(f"{name}.qkv.weight", 3 * c, c, 1), p(f"{name}.qkv.bias", 3 * c)).reshape(
            b * heads, 3 * c // heads, -1
        )
        (q, k, v), root = qkv.split(c // heads, dim=1), (c / heads) ** 0.5
    else:
        h, root = p.norm(f"{name}.norm", x, 1e-6), c**0.5
        q, k, v = (p.conv(f"{name}.{letter}", h, c, 1).reshape(b * heads, c // heads, -1) for letter in "qkv")
    mixed = (v @ (q.transpose(1, 2) @ k / root).softmax(2).transpose(1, 2)).reshape(b, c, -1)
    if layout == "openai":
        return x + F.conv1d(
            mixed, p(f"{name}.proj_out.weight", c, c, 1), p(f"{name}.proj_out.bias", c)
        ).reshape(b, c, H, W)
    return x + p.conv(f"{name}.proj_out", mixed.reshape(b, c, H, W), c, 1)


def unet_openai(p, x, t, x_hat=None, z=None, rate=4, blocks=2, heads=HEADS):
    """The U-Net of the main program: all blocks of a way in one row; attention where the image was halved
    to 1/`rate`.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles, dim = t.float()[:, None] * freqs, 4 * WIDTH
    emb = p.linear(
        "time_embed.2", F.silu(p.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), dim)), dim
    )
    emb = emb if z is None else emb + p.linear("proj.2", F.silu(p.linear("proj.0", z, dim)), dim)
    told = dict(layout="openai", scale_shift=z is not None)
    h = p.conv("input_blocks.0.0", x if x_hat is None else torch.cat([x, x_hat], 1), WIDTH, padding=1)
    skips, n = [h], 1
    for level, m in enumerate(MULTIPLIERS):
        for _ in range(blocks):
            h = block(p, f"input_blocks.{n}.0", h, emb, m * WIDTH, **told)
            h = attend(p, f"input_blocks.{n}.1", h, "openai", heads) if 2**level == rate else h
            skips, n = [*skips, h], n + 1
        if level + 1 < len(MULTIPLIERS):
            h = p.conv(f"input_blocks.{n}.0.op", h, h.shape[1], stride=2, padding=1)
            skips, n = [*skips, h], n + 1
    h = block(p, "middle_block.0", h, emb, h.shape[1], **told)
    h = block(p, "middle_block.2", attend(p, "middle_block.1", h, "openai", heads), emb, h.shape[1], **told)
    n = 0
    for level, m in reversed(list(enumerate(MULTIPLIERS))):
        for i in range(blocks + 1):
            h, part = (
                block(p, f"output_blocks.{n}.0", torch.cat([h, skips.pop()], 1), emb, m * WIDTH, **told),
                1,
            )
            if 2**level == rate:
                h, part = attend(p, f"output_blocks.{n}.1", h, "openai", heads), 2
            if level and i == blocks:
                h = p.conv(
                    f"output_blocks.{n}.{part}.conv", F.interpolate(h, scale_factor=2), h.shape[1], padding=1
                )
            n += 1
    return p.conv("out.2", F.silu(p.norm("out.0", h, 1e-5)), 3, padding=1)


def unet_ddim(p, x, t, x_hat=None, z=None, pixels=4, blocks=2, heads=HEADS):
    "The U-Net of the branch for CIFAR-10: blocks by level, attention where so many pixels are left."
    freqs = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2 - 1))
    angles, dim = t.float()[:, None] * freqs, 4 * WIDTH
    emb = p.linear(
        "temb.dense.1", F.silu(p.linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1), dim)), dim
    )
    skips = [p.conv("conv_in", x if x_hat is None else torch.cat([x, x_hat], 1), WIDTH, padding=1)]
    for level, m in enumerate(MULTIPLIERS):
        for i in range(blocks):
            h = block(p, f"down.{level}.block.{i}", skips[-1], emb, m * WIDTH, "ddim")
            skips.append(attend(p, f"down.{level}.attn.{i}", h, "ddim", heads) if h.shape[2] == pixels else h)
        if level + 1 < len(MULTIPLIERS):
            skips.append(
                p.conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), m * WIDTH, stride=2)
            )
    h = block(p, "mid.block_1", skips[-1], emb, m * WIDTH, "ddim")
    h = block(p, "mid.block_2", attend(p, "mid.attn_1", h, "ddim", heads), emb, m * WIDTH, "ddim")
    for level, m in reversed(list(enumerate(MULTIPLIERS))):
        for i in range(blocks + 1):
            h = block(p, f"up.{level}.block.{i}", torch.cat([h, skips.pop()], 1), emb, m * WIDTH, "ddim")
            h = attend(p, f"up.{level}.attn.{i}", h, "ddim", heads) if h.shape[2] == pixels else h
        h = (
            p.conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2), h.shape[1], padding=1)
            if level
            else h
        )
    return p.conv("conv_out", F.silu(p.norm("norm_out", h, 1e-6)), 3, padding=1)


NETWORKS = {"openai": unet_openai, "ddim": unet_ddim}


def blocks_of_vae(p, name, x, text):
    "A row of the VAE's blocks, each word of the string read here once more."
    widths, n = {int(r): int(c) for r, c in (w.split(":") for w in STRINGS["channels"].split(","))}, 0
    for word in text.split(","):
        op = next(c for c in word if c in "xdut")
        r, m = (int(v) for v in word.split(op))
        for _ in range(m if op == "x" else 1):
            at = f"{name}.block_mod.{n}"
            if op == "u":
                x = F.interpolate(x, scale_factor=m)
            elif op == "t":
                x = p.conv(at, x, widths[m], 1, bias=False)
            else:
                h, k = x, 3 if r > 1 else 1
                for i, (c, size) in enumerate(
                    [(widths[r] // 2, 1), (widths[r] // 2, k), (widths[r] // 2, k), (widths[r], 1)], 1
                ):
                    h = p.conv(f"{at}.c{i}", F.gelu(h), c, size, padding=size // 2)
                x = F.avg_pool2d(x + h, m) if op == "d" else x + h
            n += 1
    return x


def vae_encode(p, u):
    "Mean and log-variance, `(B, d, 1, 1)`, of images in [0, 1]."
    h = blocks_of_vae(p, "enc", p.conv("enc.in_conv", u, 16, padding=1, bias=False), STRINGS["encoder"])
    return p.conv("enc.mu", h, h.shape[1], 1, bias=False), p.conv("enc.logvar", h, h.shape[1], 1, bias=False)


def vae_decode(p, z):
    "Codes `(B, d, 1, 1)` to images in [0, 1]."
    return p.conv("dec.last_conv", blocks_of_vae(p, "dec", z, STRINGS["decoder"]), 3, padding=1).sigmoid()


def official_walk(network, form, betas, x_T, x_hat, noises):
    """Ancestral sampling as the official program does it, form 2 in x_t with the shift taken off at the
    end, the large variance.
    """
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    x, shift = x_T, x_hat if form == 2 else torch.zeros_like(x_hat)
    for t in reversed(range(len(betas))):
        eps = network(x, torch.full((len(x),), t))
        x0 = ((x - shift) / abar[t] ** 0.5 - (1 / abar[t] - 1) ** 0.5 * eps).clamp(-1, 1)
        of_x0, of_x = (
            betas[t] * before[t] ** 0.5 / (1 - abar[t]),
            (1 - betas[t]) ** 0.5 * (1 - before[t]) / (1 - abar[t]),
        )
        x = of_x0 * x0 + of_x * x + (1 - of_x) * shift + (betas[t] ** 0.5 * next(noises) if t else 0)
    return (x - shift).float()


# ---------------------------------------------------------------- checkpoints


class ModelCheckpoint:
    "Stands for Lightning's, under whose class older checkpoints file the callbacks' state."


def lightning(path, tensors, monkeypatch=None):
    """Write a checkpoint as Lightning 1.4 does, with its class in it where `monkeypatch` may set up a
    module of that name.
    """
    callbacks = {"ModelCheckpoint": {"best_model_path": "x.ckpt", "best_model_score": None}}
    if monkeypatch:
        ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            "pytorch_lightning.callbacks.model_checkpoint",
        ):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = ModelCheckpoint
        callbacks = {ModelCheckpoint: callbacks["ModelCheckpoint"], "last": ModelCheckpoint()}
    torch.save(
        {
            "epoch": 7,
            "global_step": 70,
            "pytorch-lightning_version": "1.4.9",
            "state_dict": tensors,
            "callbacks": callbacks,
            "optimizer_states": [
                {
                    "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
                    "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}],
                }
            ],
            "lr_schedulers": [{"base_lrs": [2e-4], "last_epoch": 7, "lr_lambdas": [None]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"alpha": 1.0},
        },
        path,
    )
    return path


def images(n=2, seed=1):
    return random_images(n, 3, SIZE, seed)


def second_stage(layout, form=1, z=None, x_hat=True):
    "Random tensors of a whole second stage, with the averaged network's `Store` and its betas."
    torch.manual_seed(form)
    networks = {which: Store() for which in ("target_network", "online_network")}
    for p in networks.values():
        NETWORKS[layout](p, images(), torch.zeros(2), images() if x_hat else None, z)
    betas = torch.linspace(1e-3, 0.3, T).double()
    tables = {
        "betas": betas,
        "sqrt_alpha_bar": torch.cumprod(1 - betas, 0) ** 0.5,
        "post_variance": betas,
        **({"post_coeff_3": betas} if form == 2 else {}),
    }
    tensors = {f"{which}.decoder.{k}": v for which, p in networks.items() for k, v in p.items()}
    return (
        tensors | {f"{which}.{k}": v for which in networks for k, v in tables.items()},
        networks["target_network"],
        betas,
    )


@pytest.fixture(scope="module")
def first_stage():
    torch.manual_seed(0)
    p = Store()
    vae_decode(p, vae_encode(p, images())[0])
    return p


# ---------------------------------------------------------------- the same function


@torch.no_grad()
def test_the_vae_computes_what_the_official_one_does(tmp_path, first_stage, monkeypatch):
    vae = load_official_vae(lightning(tmp_path / "vae.ckpt", dict(first_stage), monkeypatch), SMALL)
    for x in (images(3), images(1, seed=2)):
        mean, logvar = vae_encode(first_stage, x * 0.5 + 0.5)
        q = vae.encode(x)
        assert torch.allclose(q.mean, mean.flatten(1), atol=1e-5) and torch.allclose(
            q.stddev, (logvar / 2).exp().flatten(1), atol=1e-5
        )
        assert torch.allclose(vae.decode(q.mean), 2 * vae_decode(first_stage, mean) - 1, atol=1e-5)
    save_system(tmp_path / "ours.safetensors", vae)
    assert torch.equal(
        load_system(tmp_path / "ours.safetensors").sample(2, seeds=[0, 1]), vae.sample(2, seeds=[0, 1])
    )


@torch.no_grad()
@pytest.mark.parametrize("layout", NETWORKS)
@pytest.mark.parametrize("heads", [HEADS, 1])
def test_the_unet_computes_what_the_official_one_does(tmp_path, layout, heads):
    tensors, p, betas = second_stage(layout)
    denoiser, process, form = load_official_ddpm(
        lightning(tmp_path / "ddpm.ckpt", tensors), SMALL, heads=heads
    )
    t = torch.tensor([0, 999, 333])
    theirs = NETWORKS[layout](p, images(3), t, images(3, seed=2), heads=heads)
    assert (
        form == 1
        and torch.equal(process.schedule.betas, betas)
        and (process.predict, process.variance) == ("eps", "fixed_large")
    )
    assert (
        torch.allclose(denoiser(images(3), t.float(), Cond(image=images(3, seed=2))), theirs, atol=1e-5)
        and theirs.std() > 0.1
    )
    online = load_official_ddpm(tmp_path / "ddpm.ckpt", SMALL, average=False, heads=heads)[0]
    assert not torch.allclose(online(images(3), t.float(), Cond(image=images(3, seed=2))), theirs, atol=0.1)


@torch.no_grad()
def test_z_and_plain_ddpms(tmp_path, first_stage):
    z = torch.randn(2, 8)
    tensors, p, _ = second_stage("openai", z=z)
    whole = {**tensors, **{f"vae.{k}": v for k, v in first_stage.items()}}
    model = load_official(lightning(tmp_path / "z.ckpt", whole), networks=SMALL)
    t = torch.tensor([5, 800])
    theirs = unet_openai(p, images(), t, images(seed=2), z)
    assert model.use_z and torch.allclose(
        model.denoiser(images(), t.float(), Cond(image=images(seed=2), z=z)), theirs, atol=1e-5
    )
    assert not torch.allclose(theirs, unet_openai(p, images(), t, images(seed=2), z + 1), atol=1e-2)
    save_system(tmp_path / "z.safetensors", model)
    again = load_system(tmp_path / "z.safetensors")
    assert torch.equal(again.sample(2, seeds=[0, 1], steps=3), model.sample(2, seeds=[0, 1], steps=3))

    tensors, p, _ = second_stage("ddim", x_hat=False)
    denoiser = load_official_ddpm(lightning(tmp_path / "plain.ckpt", tensors), SMALL)[0]
    assert denoiser.image_channels == 0 and torch.allclose(
        denoiser(images(), t.float()), unet_ddim(p, images(), t), atol=1e-5
    )
    with pytest.raises(ValueError, match="image_channels=3"):  # which no DiffuseVAE can use
        load_official(tmp_path / "plain.ckpt", lightning(tmp_path / "vae.ckpt", dict(first_stage)), SMALL)


@torch.no_grad()
@pytest.mark.parametrize("layout, form", [("openai", 1), ("openai", 2), ("ddim", 2)])
def test_a_walk_ends_where_the_official_one_does(tmp_path, first_stage, layout, form):
    tensors, p, betas = second_stage(layout, form)
    vae, ddpm = (
        lightning(tmp_path / "vae.ckpt", dict(first_stage)),
        lightning(tmp_path / "ddpm.ckpt", tensors),
    )
    model, seeds, temperature = load_official(ddpm, vae, SMALL, form=form), [3, 4], 0.8
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    x_hat = 2 * vae_decode(first_stage, z[:, :, None, None]) - 1
    assert torch.allclose(model.vae.decode(z), x_hat, atol=1e-5) and model.form == form
    start, step = (samplers.Noise(x_hat.shape, seeds, stream=stream) for stream in (0, 1))
    x_T = temperature * start() + (x_hat if form == 2 else 0)
    theirs = official_walk(
        lambda x, t: NETWORKS[layout](p, x.float(), t, x_hat), form, betas, x_T, x_hat, iter(step, None)
    )
    ours = samplers.final_image(
        model.steps(
            model.vae.decode(z),
            sampler="ddpm",
            steps=T,
            spacing="trailing",
            seeds=seeds,
            temperature=temperature,
        )
    )
    assert torch.allclose(ours, theirs, atol=2e-4) and ours.abs().max() <= 1


# ---------------------------------------------------------------- what does not fit


class Bomb:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_bad_files(tmp_path, first_stage, monkeypatch):
    good = lightning(tmp_path / "good.ckpt", dict(first_stage), monkeypatch)
    assert set(read_lightning(good)) == set(first_stage)
    torch.save(
        {"state_dict": dict(first_stage), "callbacks": {Bomb(tmp_path / "boom"): 1}}, tmp_path / "bomb.ckpt"
    )
    with pytest.raises(
        ValueError, match=r"bomb.ckpt names (posix|nt).mkdir, which weights do not need.*weights_only=False"
    ):
        load_official_vae(tmp_path / "bomb.ckpt", SMALL)
    assert not (tmp_path / "boom").exists()
    for n, name in ((0, "empty"), (500, "start"), (good.stat().st_size - 200, "half")):
        (tmp_path / name).write_bytes(good.read_bytes()[:n])
        with pytest.raises(ValueError, match="holds no plain tensors"):
            load_official_vae(tmp_path / name, SMALL)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_official(tmp_path / "none.ckpt")
    save_file(dict(first_stage), tmp_path / "converted.safetensors")
    assert load_official_vae(tmp_path / "converted.safetensors", SMALL).z_dim == 8
    with pytest.raises(
        ValueError, match="networks must be one of cifar10, celeba64, celebahq256; got 'mnist'"
    ):
        load_official_vae(good, "mnist")


def test_everything_that_does_not_match_is_named(tmp_path, first_stage):
    tensors, _, _ = second_stage("openai")
    at = "target_network.decoder."
    odd = {k: v for k, v in tensors.items() if k != f"{at}out.2.bias"} | {
        f"{at}extra": torch.ones(1),
        "critic.weight": torch.ones(1),
        f"{at}out.2.weight": torch.ones(3, 4, 3, 3),
    }
    with pytest.raises(Mismatch) as caught:
        load_official_ddpm(lightning(tmp_path / "odd.ckpt", odd), SMALL)
    assert caught.value.wrong == [
        "out.2.bias is missing",
        "extra is unknown",
        "critic.weight is unknown",
        "out.2.weight is (3, 4, 3, 3), not (3, 32, 3, 3)",
    ]
    assert all(sentence in str(caught.value) for sentence in caught.value.wrong)

    with pytest.raises(
        Mismatch
    ) as caught:  # another architecture altogether: the first twenty are shown, the others are there
        load_official_ddpm(
            lightning(tmp_path / "ddpm.ckpt", tensors),
            {**SMALL, "unet": {**SMALL["unet"], "multipliers": (1, 2)}},
        )
    assert len(caught.value.wrong) > 100 and f"and {len(caught.value.wrong) - 20} more" in str(caught.value)
    partly = {k: v for k, v in second_stage("ddim")[0].items() if not k.endswith("mid.attn_1.k.weight")}
    attention = r"mid\.attn_1"
    missing = rf"{attention}\.qkv\.weight is missing"
    unknown = rf"{attention}\.q\.weight is unknown; {attention}\.v\.weight is unknown"
    with pytest.raises(ValueError, match=f"{missing}; {unknown}"):
        load_official_ddpm(lightning(tmp_path / "partly.ckpt", partly), SMALL)
    with pytest.raises(
        ValueError, match="3 heads do not divide 64 channels|3 heads do not divide 32 channels"
    ):
        load_official_ddpm(tmp_path / "ddpm.ckpt", SMALL, heads=3)
    with pytest.raises(ValueError, match="trained in form 1, not 2"):
        load_official(tmp_path / "ddpm.ckpt", networks=SMALL, form=2)
    vae = lightning(tmp_path / "vae.ckpt", dict(first_stage))
    with pytest.raises(ValueError, match="has no target_network.betas"):
        load_official_ddpm(vae, SMALL)
    with pytest.raises(Mismatch, match="enc.in_conv.weight is missing"):  # no VAE in the second stage's file
        load_official(tmp_path / "ddpm.ckpt", networks=SMALL)


# ---------------------------------------------------------------- the recipes

COUNTS = {
    "cifar10": (9_243_107, 35_746_307),
    "celeba64": (14_011_907, 78_700_803),
    "celebahq256": (32_632_579, 113_673_219),
}  # the U-Net without x̂


@pytest.mark.parametrize("name", COUNTS)
def test_the_recipes_build_the_published_networks(name):
    runs = yaml.safe_load(
        find_notebook(f"diffusevae_{name}_published", "recipe").read_text(encoding="utf-8")
    )["runs"]
    vae, forms = runs["vae"]["parameters"], [runs[f"form{i}"]["parameters"] for i in (1, 2)]
    strings = autoencoder.published_blocks[vae["model"]]
    with torch.device("meta"):
        parts = [
            autoencoder.BlockEncoder(strings["encoder"], strings["channels"]),
            autoencoder.BlockDecoder(strings["decoder"], strings["channels"]),
        ]
        unets = [
            preset(form["network"], size=form["size"], dropout=form["dropout"], image_channels=channels)
            for form in forms
            for channels in (0, 3)
        ]
    assert sum(p.numel() for part in parts for p in part.parameters()) == COUNTS[name][0]
    assert [sum(p.numel() for p in net.parameters()) - COUNTS[name][1] for net in unets] == [
        0,
        3 * 9 * 128,
    ] * 2
    assert parts[0].size == vae["size"] == unets[0].size and {type(net) for net in unets} == {UNet}
    told = [{k: v for k, v in form.items() if k != "form"} for form in forms]
    assert told[0] == told[1] and [form["form"] for form in forms] == [
        1,
        2,
    ]  # the forms differ in nothing else
    assert vae["sigma"] == 2**0.5 and (vae["lr"], vae["ema"], vae["schedule"]) == (1e-4, 0.0, "constant")
    assert all(
        f"evaluate_form{i}" in runs and runs[f"evaluate_form{i}"]["parameters"]["features"] == "inception"
        for i in (1, 2)
    )
