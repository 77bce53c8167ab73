"""The denoisers and the exchange format against diffusers: parameter counts, outputs with the same weights,
folders read by either side.

Weights are drawn anew wherever outputs are compared, since a fresh network of ours answers zero whatever it
is told.
"""

import json

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)
from diffusers import utils as diffusers_utils

from diffusevae.core.checkpoints import build
from diffusevae.core.layers import Attention, SelfAttention
from diffusevae.diffusion import samplers, schedules
from diffusevae.diffusion.conditions import Cond, drop_parts, null_condition
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.dit import DiT
from diffusevae.diffusion.exchange import (
    export_diffusers,
    from_diffusers,
    from_scheduler,
    import_diffusers,
    to_diffusers,
    to_scheduler,
)
from diffusevae.diffusion.networks import preset, published_dits
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule
from diffusevae.diffusion.unet import UNet, attention_maps

diffusers_utils.logging.set_verbosity_error()
diffusers_utils.logging.disable_progress_bar()


pytestmark = pytest.mark.usefixtures("one_thread")


def count(net):
    return sum(p.numel() for p in net.parameters())


def meta(make, *args, **how):
    with torch.device("meta"):
        return make(*args, **how)


def drawn(net, seed=0, scale=0.05):
    "The network with noise added to all of its parameters, in evaluation mode."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return net.eval().requires_grad_(False)


def error(ours, theirs):
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def theirs(**how):
    "diffusers' U-Net, small unless told otherwise, with weights drawn anew."
    down = how.pop("attention", (False, True))
    kinds = dict(
        down_block_types=["Attn" * a + "DownBlock2D" for a in down],
        up_block_types=["Attn" * a + "UpBlock2D" for a in down[::-1]],
    )
    how = {
        "sample_size": 16,
        "block_out_channels": [16, 32][: len(down)],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        **kinds,
        **how,
    }
    return drawn(UNet2DModel(**how))


def inputs(net, n=2, seed=1, dtype=torch.float32):
    "x_t, t and the labels of a denoiser's batch; None where it takes none."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, net.channels, net.size, net.size, generator=generator, dtype=dtype)
    return (
        x,
        torch.randint(1000, (n,), generator=generator),
        torch.randint(net.classes, (n,), generator=generator) if net.classes else None,
    )


def both(net, peer, n=2, dtype=torch.float32):
    "The outputs of our network and of diffusers' for one batch."
    x, t, label = inputs(net, n, dtype=dtype)
    image = (
        torch.randn(n, net.image_channels, net.size, net.size, dtype=dtype) if net.image_channels else None
    )
    told = torch.cat([x, image], 1) if net.image_channels else x
    with torch.no_grad():
        return net(x, t.float(), Cond(image=image, label=label)), peer(told, t, class_labels=label).sample


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "name, widths, at, size, count_is",
    [
        ("ddpm_cifar10", [128, 256, 256, 256], 16, 32, 35_746_307),
        ("diffusevae_celeba64", [128, 256, 256, 256, 512], 16, 64, None),
        ("ddpm_celebahq256", [128, 128, 256, 256, 512, 512], 16, 256, 113_673_219),
    ],
)
def test_published_unets(name, widths, at, size, count_is):
    """The networks of Ho et al.

    Have as many parameters as diffusers' U-Net built from the same plan, and as published.
    """
    ours = meta(preset, name, image_channels=0)
    attend = [size // 2**i == at for i in range(len(widths))]
    peer = meta(
        UNet2DModel,
        sample_size=size,
        block_out_channels=widths,
        attention_head_dim=None,
        down_block_types=["Attn" * a + "DownBlock2D" for a in attend],
        up_block_types=["Attn" * a + "UpBlock2D" for a in attend[::-1]],
    )
    assert count(ours) == count(peer) and count_is in (None, count(ours))
    expected, config = {name: v.shape for name, v in peer.state_dict().items()}, to_diffusers(ours)[0]
    assert {name: v.shape for name, v in to_diffusers(ours)[1].items()} == expected
    assert (
        config["freq_shift"],
        config["downsample_padding"],
        config["norm_eps"],
        config["norm_num_groups"],
    ) == (1, 0, 1e-6, 32)


def test_attention_is_named_by_resolution():
    """`attention=(16,)` is at 16 pixels.

    Read as a down-sampling rate it would be nowhere in a network that halves three times but at the bottom,
    which has it anyway: one block, where there are six (two down, three up, one at the bottom), and fewer
    parameters than published.
    """
    ours = meta(preset, "ddpm_cifar10")
    at = [name for name, m in ours.named_modules() if isinstance(m, SelfAttention)]
    assert (
        len(at) == 6
        and [name.split(".")[-3:-1] for name in at if "lower.first" not in name].count(["down", "0"]) == 1
    )
    ours = drawn(UNet(32, width=8, multipliers=(1, 1, 1, 1), blocks=2, attention=(16,)))
    maps = attention_maps(ours, *inputs(ours)[:2])
    assert sorted(m.shape[2] ** 0.5 for m in maps.values()) == [4, 16, 16, 16, 16, 16]
    with pytest.warns(UserWarning, match="attention at .2. has no effect"):
        assert (
            sum(
                isinstance(m, SelfAttention)
                for m in meta(UNet, 32, multipliers=(1, 1, 1, 1), blocks=2, attention=(2,)).modules()
            )
            == 1
        )


OFFICIAL = {"S/2": 32_865_056, "B/2": 130_315_808, "L/2": 457_840_672, "XL/2": 674_834_720}


@pytest.mark.parametrize("name", [name for name in published_dits if "/" in name])
def test_published_dits(name):
    """diffusers keeps the embedding of time and label once in each block; without the repeats its counts
    are ours, and the published ones.
    """
    how, ours = published_dits[name], meta(preset, name)
    peer = meta(
        DiTTransformer2DModel,
        how["heads"],
        how["width"] // how["heads"],
        out_channels=8,
        num_layers=how["depth"],
        patch_size=how["patch"],
    )
    repeated = sum(
        p.numel()
        for i, block in enumerate(peer.transformer_blocks)
        if i
        for p in block.norm1.emb.parameters()
    )
    assert count(ours) == count(peer) - repeated == OFFICIAL.get(name.removeprefix("DiT-"), count(ours))
    if name == "DiT-XL/2":
        assert ours.places.numel() == 294_912 and count(ours) + ours.places.numel() == 675_129_632


def test_unknown_presets_list_the_known():
    listed = "network must be one of ddpm_cifar10, .*digits, shapes, .*; got 'cifar'"
    with pytest.raises(ValueError, match=listed):
        preset("cifar")
    with pytest.raises(ValueError, match="network must be one of .*, DiT-S/2, .*; got 'DiT-XXL/2'"):
        preset("DiT-XXL/2")


# ---------------------------------------------------------------- U-Net: outputs

KINDS = {
    "default": {},
    "grey": dict(in_channels=1, out_channels=1, attention=(True, False)),
    "24 pixels": dict(sample_size=24, attention=(False, True), layers_per_block=2),
    "12 pixels, three levels": dict(
        sample_size=12, block_out_channels=[8, 24, 16], attention=(True, False, True)
    ),
    "as Ho et al.": dict(
        freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, norm_eps=1e-6, attention_head_dim=None
    ),
    "scale and shift": dict(
        resnet_time_scale_shift="scale_shift", norm_num_groups=4, attn_norm_num_groups=4, attention_head_dim=4
    ),
    "classes": dict(num_class_embeds=7, dropout=0.3),
    "learned variance": dict(in_channels=1, out_channels=2),
    "image beside": dict(in_channels=6, out_channels=3),
    "one level, attention": dict(attention=(True,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_diffusers(kind):
    peer = theirs(**KINDS[kind])
    ours = from_diffusers(dict(peer.config), peer.state_dict())
    assert count(ours) == count(peer) + (
        ours.embedding.label.weight[0].numel() if ours.classes else 0
    )  # the row for no class
    for n in (2, 1):
        assert error(*both(ours, peer, n)) < 1e-5
    assert error(*both(ours.double(), peer.double(), dtype=torch.float64)) < 1e-10  # what is left is rounding


OURS = {
    "default": dict(size=16, channels=3, width=16, multipliers=(1, 2), attention=(8,)),
    "grey, 24, attention on top": dict(
        size=24, channels=1, width=8, multipliers=(1, 2, 2), attention=(24, 6), head_channels=8, blocks=2
    ),
    "12, additive": dict(
        size=12,
        channels=3,
        width=8,
        multipliers=(1, 1.5, 2),
        groups=4,
        scale_shift=False,
        resample="same",
        freq_shift=1,
        norm_eps=1e-6,
    ),
    "classes, image, learned": dict(
        size=8,
        channels=3,
        width=8,
        multipliers=(1, 1),
        attention=(4,),
        heads=2,
        classes=5,
        image_channels=3,
        outputs=6,
    ),
}


@pytest.mark.parametrize("kind", OURS)
def test_to_diffusers_and_back(kind):
    ours = drawn(UNet(**OURS[kind]))
    config, tensors = to_diffusers(ours)
    peer = UNet2DModel.from_config(json.loads(json.dumps(config))).eval()
    peer.load_state_dict(tensors)
    assert count(peer) == count(ours)
    for n in (2, 1):
        assert error(*both(ours, peer, n)) < 1e-5
    again = from_diffusers(config, tensors)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True)
    )
    assert error(*both(ours.double(), peer.double(), dtype=torch.float64)) < 1e-10


def test_null_label_is_diffusers_last_row():
    ours = drawn(UNet(8, channels=1, width=8, multipliers=(1,), classes=5))
    config, tensors = to_diffusers(ours)
    peer = UNet2DModel.from_config(config).eval()
    peer.load_state_dict(tensors)
    x, t, _ = inputs(ours)
    told = Cond(label=torch.tensor([2, 4]))
    with torch.no_grad():
        free = peer(x, t, class_labels=torch.tensor([5, 5])).sample
        for said in (null_condition(told), drop_parts(told, 1.0)):
            assert error(ours(x, t.float(), said), free) < 1e-5
        assert error(ours(x, t.float(), told), free) > 1e-3
    # diffusers forgets private keys when it saves a config again; then the caller says what the last row is
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    assert (
        from_diffusers(config, tensors).classes == 6
        and from_diffusers(config, tensors, null_class=True).classes == 5
    )


def test_the_network_of_the_speed_comparison():
    "7 to 9 M parameters at 32 × 32 × 3: equal outputs and gradients, and channels_last from end to end."
    peer = theirs(
        sample_size=32,
        block_out_channels=[64, 128, 128, 128],
        layers_per_block=2,
        norm_num_groups=32,
        attention=(False, True, False, False),
    )
    assert 7e6 < count(peer) == 8_952_067 < 9e6
    ours = from_diffusers(dict(peer.config), peer.state_dict())
    outs = both(ours, peer)
    assert error(*outs) < 1e-5 and outs[0].is_contiguous(memory_format=torch.channels_last)
    orders = []
    for m in ours.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(
                lambda m, args, out: orders.append(
                    all(v.is_contiguous(memory_format=torch.channels_last) for v in (args[0], out, m.weight))
                )
            )
    ours.requires_grad_(True), peer.requires_grad_(True)
    x, t, _ = inputs(ours, 1)
    ours(x, t.float()).square().sum().backward(), peer(x, t).sample.square().sum().backward()
    assert len(orders) > 40 and all(orders)
    grads = to_diffusers_grads(ours)
    assert all(
        error(grads[name], p.grad) < 1e-4 for name, p in peer.named_parameters() if ".to_k.bias" not in name
    )  # a bias of all keys changes nothing


def to_diffusers_grads(net):
    "Our gradients under diffusers' names."
    twin = build(net.config)
    for p, q in zip(twin.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.grad)
    config, grads = to_diffusers(twin)
    name, half = "time_embedding.linear_1.weight", twin.embedding.width // 2
    return {**grads, name: grads[name].roll(half, dims=1)}  # diffusers' default has the cosines first


# ---------------------------------------------------------------- DiT: outputs


def copied(ours):
    "diffusers' DiT with the weights of ours."
    how = ours.config["arguments"]
    peer = DiTTransformer2DModel(
        how["heads"],
        how["width"] // how["heads"],
        ours.channels,
        ours.outputs,
        how["depth"],
        sample_size=ours.size,
        patch_size=ours.patch,
        num_embeds_ada_norm=ours.classes,
    ).eval()
    state, e = {}, ours.embedding
    for name, m in {
        "pos_embed.proj": ours.stem,
        "proj_out_1": ours.head.modulation[1],
        "proj_out_2": ours.head.linear,
    }.items():
        state |= {f"{name}.{k}": v for k, v in m.state_dict().items()}
    first = e.time[0].weight.roll(128, dims=1)  # cosines first there
    for i, block in enumerate(ours.blocks):
        emb = f"transformer_blocks.{i}.norm1.emb"
        state |= {
            f"{emb}.timestep_embedder.linear_1.weight": first,
            f"{emb}.timestep_embedder.linear_1.bias": e.time[0].bias,
            f"{emb}.class_embedder.embedding_table.weight": e.label.weight,
        }
        parts = {
            "norm1.emb.timestep_embedder.linear_2": e.time[2],
            "norm1.linear": block.modulation[1],
            "attn1.to_out.0": block.attention.out,
            "ff.net.0.proj": block.mlp[0],
            "ff.net.2": block.mlp[2],
        }
        for name, m in parts.items():
            state |= {f"transformer_blocks.{i}.{name}.{k}": v for k, v in m.state_dict().items()}
        for kind, v in block.attention.qkv.state_dict().items():
            state |= {
                f"transformer_blocks.{i}.attn1.to_{x}.{kind}": part for x, part in zip("qkv", v.chunk(3))
            }
    peer.load_state_dict(state)
    for block in peer.transformer_blocks:
        block.norm3.eps = 1e-6  # the other norms of a block have the published 1e-6 there, this one 1e-5
    return peer


@pytest.mark.parametrize(
    "how",
    [
        dict(size=8, channels=4, outputs=8),
        dict(size=24, channels=1, patch=4),
        dict(size=12, channels=3, patch=3, depth=3),
    ],
)
def test_dit_outputs(how):
    """With two settings of diffusers matched (frequencies to 1 / 10000 exactly, and the second norm's ε),
    outputs are equal.

    Its table of places is made in float64 and ours in float32: that is what is left, and in float64 the
    table is copied.
    """
    ours = drawn(DiT(**{"width": 32, "depth": 2, "heads": 4, "classes": 6, "freq_shift": 1, **how}))
    peer = copied(ours)
    assert torch.allclose(ours.places, peer.pos_embed.pos_embed[0], atol=1e-6)
    for n in (2, 1):
        assert error(*both(ours, peer, n)) < 1e-5
    ours, peer = ours.double(), peer.double()
    ours.places.copy_(peer.pos_embed.pos_embed[0])
    assert error(*both(ours, peer, dtype=torch.float64)) < 1e-10
    x, t, _ = inputs(ours, dtype=torch.float64)
    none, told = torch.full((2,), -1), torch.full((2,), 6)
    assert error(ours(x, t.float(), Cond(label=none)), peer(x, t, class_labels=told).sample) < 1e-10


# ---------------------------------------------------------------- both denoisers, one contract

NETS = {
    "unet": lambda size, channels, **more: UNet(size, channels, width=8, attention=(size // 2,), **more),
    "dit": lambda size, channels, **more: DiT(size, channels, 2, 32, 2, 2, **more),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


@every_net
@pytest.mark.parametrize("size, channels, n", [(24, 1, 1), (12, 3, 2), (16, 4, 1)])
def test_contract(make, size, channels, n):
    net = drawn(make(size, channels, classes=3, z_dim=5, image_channels=2, outputs=2 * channels))
    assert (net.size, net.channels, net.image_channels, net.classes, net.outputs) == (
        size,
        channels,
        2,
        3,
        2 * channels,
    )
    assert net.takes == {"image": (2, size, size), "z": (5,), "label": ()}
    x, t, label = inputs(net, n)
    cond = Cond(image=torch.randn(n, 2, size, size), z=torch.randn(n, 5), label=label)
    out = net(x, t.float(), cond)
    assert (
        out.shape == (n, 2 * channels, size, size)
        and error(net(x[:1], t[:1].float(), cond[:1]), out[:1]) < 1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert error(net(x, t.float(), cond), out) < 0.05
    assert error(net(x.to(memory_format=torch.channels_last), t.float(), cond), out) < 1e-5
    again = build(json.loads(json.dumps(net.config))).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, t.float(), cond), out)
    maps = attention_maps(net, x, t.float(), cond)
    assert len(maps) == sum(isinstance(m, Attention) for m in net.modules()) and all(
        (m.sum(3) - 1).abs().max() < 1e-5 for m in maps.values()
    )


@every_net
def test_bad_inputs(make):
    net = make(8, 1, classes=3)
    x, t, label = inputs(net)
    t = t.float()
    for bad, said in [
        (dict(cond=None), "label is missing"),
        (dict(cond=Cond(label=torch.tensor([1, 3]))), "labels must lie in 0 … 2, or be -1"),
        (dict(cond=Cond(label=torch.tensor([1, -2]))), "labels must lie in 0 … 2, or be -1"),
        (dict(cond=Cond(label=torch.tensor([1, 2, 2]))), r"label must have shape \(2,\), got \(3,\)"),
        (dict(cond=Cond(label=label, z=torch.zeros(2, 4))), "z is given, but this .* was built without it"),
        (dict(cond=Cond(label=label), x_t=x[:, :, 1:]), r"takes images of \(B, 1, 8, 8\)"),
        (dict(cond=Cond(label=label), t=t[:1]), "one time for each of the 2 images"),
    ]:
        with pytest.raises(ValueError, match=said):
            net(**{"x_t": x, "t": t, **bad})


@every_net
def test_continuous_levels_can_be_told_apart(make):
    "√abar lies in [0, 1]: without a scale all of it looks alike to the sinusoids, with 1000 it does not."
    level, far = torch.tensor([0.2, 0.25]), {}
    for scale in (1.0, 1000.0):
        e = drawn(make(8, 1, time_scale=scale)).embedding
        h = e(level, Cond())
        far[scale] = error(h[:1], h[1:])
    assert far[1000.0] > 5 * far[1.0]


# ---------------------------------------------------------------- schedules and folders


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"])
@pytest.mark.parametrize(
    "predict, variance",
    [("epsilon", "fixed_small"), ("v_prediction", "fixed_large"), ("sample", "learned_range")],
)
def test_schedules_are_read(name, predict, variance):
    "Of any kind that diffusers writes; its tables are float32, ours float64."
    betas = (
        dict(trained_betas=[0.01 * (i + 1) for i in range(20)])
        if name == "trained"
        else dict(beta_schedule=name)
    )
    peer = DDPMScheduler(
        num_train_timesteps=20 if name == "trained" else 200,
        prediction_type=predict,
        variance_type=variance,
        **betas,
    )
    ours = from_scheduler(dict(peer.config))
    assert (
        torch.allclose(ours.schedule.abar, peer.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
        and ours.variance == variance
    )
    assert ours.predict == {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[predict]


def test_zero_terminal_snr_is_read():
    peer = DDIMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    assert torch.allclose(
        from_scheduler(dict(peer.config)).schedule.sqrt_abar[:-1],
        peer.alphas_cumprod[:-1].double().sqrt(),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "betas",
    [schedules.linear(40, 1e-3, 0.4), schedules.cosine(40), schedules.sigmoid(40)],
    ids=["linear", "cosine", "sigmoid"],
)
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_pipeline_walks_the_same_way(betas, predict, variance, tmp_path):
    """diffusers loads our folder and, from the same noise, takes the same steps: DDIM, and the mean and the
    variance of DDPM, over all of T.
    """
    process = Diffusion(Schedule(betas), predict, variance)
    net = drawn(UNet(8, channels=1, width=8, multipliers=(1,), outputs=process.outputs(1)))
    export_diffusers(tmp_path, DDPM(net, process))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.unet, UNet2DModel) and isinstance(pipe.scheduler, DDPMScheduler)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = list(samplers.ddim(net, process, x, steps=10))
    pipe.unet.config.out_channels, peer = (
        net.outputs,
        DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True),
    )
    peer.set_timesteps(10)
    walk = x
    with torch.no_grad():
        for t, step in zip(peer.timesteps, ours, strict=True):
            now = peer.step(pipe.unet(walk, t).sample[:, :1], t, walk, use_clipped_model_output=True)
            walk = now.prev_sample
            assert (
                int(t) == step.t
                and error(step.x0, now.pred_original_sample) < 1e-4
                and error(step.x, walk) < 1e-4
            )


def test_ddpm_steps_of_the_pipeline(tmp_path):
    "All of T by diffusers' own loop, with the noise that it draws given to ours."
    process = Diffusion(Schedule(schedules.cosine(20)), "v", "fixed_small")
    net = drawn(UNet(8, channels=3, width=8, multipliers=(1,)))
    export_diffusers(tmp_path, DDPM(net, process))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    drew = torch.Generator().manual_seed(5)
    images = pipe(batch_size=2, generator=drew, num_inference_steps=20, output_type="pt").images
    drew, shape = torch.Generator().manual_seed(5), (2, 3, 8, 8)
    x = torch.randn(shape, generator=drew)
    with torch.no_grad():
        for t in reversed(range(20)):
            t = torch.full((2,), t)
            x0 = process.to_x0(net(x, process.time_input(t)), x, t).clamp(-1, 1)
            mean, variance = process.posterior(x0, x, t)
            x = mean + (variance.sqrt() * torch.randn(shape, generator=drew) if t[0] else 0)
    assert error((x / 2 + 0.5).clamp(0, 1), images) < 1e-4


def test_folders_of_diffusers_are_read(tmp_path):
    peer = theirs(in_channels=1, out_channels=1)
    for kind, scheduler in {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}.items():
        part = (
            DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
            if kind == "ddpm"
            else DDIMScheduler()
        )
        scheduler(unet=peer, scheduler=part).save_pretrained(tmp_path / kind)
        net, process = import_diffusers(tmp_path / kind)
        assert (
            error(*both(net, peer)) < 1e-5
            and process.T == 1000
            and process.predict == ("v" if kind == "ddpm" else "eps")
        )
        assert DDPM(net, process).sample(1, steps=3).shape == (1, 1, 16, 16)
        export_diffusers(tmp_path / f"{kind} again", DDPM(net, process))
        again = UNet2DModel.from_pretrained(tmp_path / f"{kind} again" / "unet").eval()
        assert error(*both(net, again)) < 1e-5


def test_written_schedule_is_ours():
    for betas in (schedules.linear(), schedules.cosine(), schedules.sigmoid(), schedules.quadratic()):
        process = Diffusion(Schedule(betas), "v")
        peer = DDPMScheduler.from_config(to_scheduler(process))
        assert torch.allclose(peer.alphas_cumprod.double(), process.schedule.abar, rtol=2e-4, atol=1e-7)


def test_attention_at_a_resolution_that_there_is_not_is_none():
    "17 pixels folded by 2 are not the 8 of the first level."
    with pytest.warns(UserWarning, match="attention at .17. has no effect"):
        net = UNet(16, width=8, patch=2, attention=(17,))
    modules = [
        sum(isinstance(m, SelfAttention) for m in n.modules()) for n in (net, UNet(16, width=8, patch=2))
    ]
    assert modules[0] == modules[1]
