"""First stages against diffusers' AutoencoderKL and torchmetrics' LPIPS, files of every layout, and a duel
that is resumed.
"""

import re
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from diffusevae.autoencoders.distances import perceptual_distance
from diffusevae.autoencoders.first_stages import KLF, KLAutoEncoder, load_published, published_name
from diffusevae.core.checkpoints import load_system, save_system
from diffusevae.core.images import load
from diffusevae.core.training import Settings, train

TINY = {"ch": 32, "multipliers": (1, 2, 2), "blocks": 1, "z_channels": 3}


def peer(ch, multipliers, blocks, z_channels):
    "diffusers' autoencoder of the same size."
    from diffusers import AutoencoderKL

    widths = [ch * m for m in multipliers]
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    return AutoencoderKL(
        3,
        3,
        **kinds,
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=z_channels,
        sample_size=32,
    )


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(0)
    model = peer(**TINY).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def to_original(name, levels=3):
    "A name of diffusers in the layout of the first release, written down apart from the table under test."
    part, *rest = name.split(".")
    if part not in ("encoder", "decoder"):
        return name
    where, number, *rest = rest if rest[0] in ("down_blocks", "up_blocks") else (rest[0], None, *rest[1:])
    if where == "mid_block":
        kind, i, *rest = rest
        if kind == "resnets":
            return ".".join([part, "mid", f"block_{int(i) + 1}", *rest])
        new = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[rest[0]]
        return ".".join([part, "mid.attn_1", new, rest[-1]])
    if number is None:
        return ".".join([part, {"conv_norm_out": "norm_out"}.get(where, where), *rest])
    level = int(number) if where == "down_blocks" else levels - 1 - int(number)
    kind, i, *rest = rest
    if kind == "resnets":
        return ".".join(
            [
                part,
                where[:-7],
                str(level),
                "block",
                i,
                {"conv_shortcut": "nin_shortcut"}.get(rest[0], rest[0]),
                rest[1],
            ]
        )
    return ".".join([part, where[:-7], str(level), f"{where[:-7]}sample", *rest])


def agree(ours, theirs):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        q, p = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(q.mean, p.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(q.stddev, p.std, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(p.mean), theirs.decode(p.mean).sample, atol=1e-5, rtol=1e-5)
        assert q.mean.std() > 0.01 and ours.decode(p.mean).std() > 0.01, (
            "outputs that agree because they are nothing"
        )


def test_diffusers_layout(other, tmp_path):
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    model = KLF(32, **TINY).eval()
    model.scale.fill_(0.18215)
    assert load_published(model, tmp_path / "vae.safetensors") == [] and model.scale == 0
    agree(model, other)


def test_old_diffusers_names(other, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: old[m[0]], k): v for k, v in other.state_dict().items()
    }
    save_file(weights, tmp_path / "vae.safetensors")
    model = KLF(32, **TINY).eval()
    load_published(model, tmp_path / "vae.safetensors")
    agree(model, other)


def test_original_layout_within_a_whole_model(other, tmp_path):
    weights = {
        to_original(k): v[:, :, None, None] if v.ndim == 2 else v for k, v in other.state_dict().items()
    }
    known = """
        encoder.conv_in.weight encoder.down.0.block.0.norm1.weight encoder.down.1.block.0.nin_shortcut.bias
        encoder.down.1.downsample.conv.weight encoder.mid.block_1.conv2.bias encoder.mid.attn_1.norm.weight
        encoder.mid.attn_1.proj_out.weight encoder.norm_out.weight encoder.conv_out.bias
        quant_conv.weight post_quant_conv.bias
        decoder.conv_in.weight decoder.mid.attn_1.v.bias decoder.up.2.upsample.conv.weight
        decoder.up.0.block.1.conv2.bias decoder.up.0.block.0.nin_shortcut.weight
        decoder.norm_out.bias decoder.conv_out.weight
    """
    assert set(known.split()) <= set(weights) and not any("_blocks" in k or "to_" in k for k in weights)
    whole = {f"first_stage_model.{k}": v.half().float() for k, v in weights.items()}
    whole |= {"model.diffusion_model.out.0.weight": torch.ones(2), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "model.ckpt")
    model, reference = KLF(32, **TINY).eval(), peer(**TINY).eval()
    assert load_published(model, tmp_path / "model.ckpt") == [
        "loss.logvar",
        "model.diffusion_model.out.0.weight",
    ]
    reference.load_state_dict({k: v.half().float() for k, v in other.state_dict().items()})
    agree(model, reference)


@pytest.mark.parametrize(
    "multipliers, z_channels, parameters",
    [((1, 2, 4), 3, None), ((1, 2, 4, 4), 4, 83_653_863)],
    ids=["f4", "f8"],
)
def test_full_size_names_and_shapes(multipliers, z_channels, parameters):
    with torch.device("meta"):
        ours, theirs = (
            KLF(256, multipliers=multipliers, z_channels=z_channels),
            peer(128, multipliers, 2, z_channels),
        )
    wanted = {k: tuple(v.shape) for k, v in ours.state_dict().items() if k != "scale"}
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) and parameters in (None, count)
    found = {}
    for name, v in theirs.state_dict().items():
        name, shape = (
            published_name(name, len(multipliers)),
            (*v.shape, 1, 1) if v.ndim == 2 else tuple(v.shape),
        )
        name, shape = (
            (re.sub(r"\.[qkv]\.", ".qkv.", name), (3 * shape[0], *shape[1:]))
            if re.search(r"attn_1\.[qkv]\.", name)
            else (name, shape)
        )
        found[name] = shape
    assert found == wanted


class Bomb:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_do_not_fit(other, tmp_path, capsys):
    model, file = KLF(32, **TINY), tmp_path / "vae.safetensors"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = other.state_dict()
    for wrong, message in (
        (
            {k: v for k, v in weights.items() if k != "decoder.mid_block.attentions.0.to_k.weight"},
            "decoder.mid.attn_1.qkv.weight is missing",
        ),
        ({**weights, "encoder.extra.weight": torch.zeros(1)}, "encoder.extra.weight is unknown"),
        (
            {**weights, "encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)},
            "encoder.conv_in.weight is (32, 1, 3, 3), not (32, 3, 3, 3)",
        ),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_published(model, file)
    torch.save({"state_dict": weights, "callbacks": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="holds no plain tensors"):
        load_published(model, tmp_path / "bomb.ckpt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="holds no plain tensors"):
        load_published(model, file)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_published(model, tmp_path / "none.ckpt")
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and "must not run" not in capsys.readouterr().out
    )


def test_lpips_is_torchmetrics():
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import vgg16

    torch.manual_seed(0)
    random = vgg16(weights=None)
    with patch("torchvision.models.vgg16", return_value=random):
        distance, metric = (
            perceptual_distance("lpips"),
            LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none"),
        )
    a, b = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b).flatten(), metric(a, b).flatten())
        grey = distance(a[:, :1], b[:, :1]).flatten()
        torch.testing.assert_close(
            grey, distance(a[:, :1].expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)).flatten()
        )
        assert (grey > 0).all() and distance(a, a).abs().max() == 0
    model = KLAutoEncoder(32, channels=3, width=8, perceptual=0.5)
    model.distances = [distance]
    terms, _ = model.terms(a)
    terms["perceptual"].backward()
    assert model.encoder[0].weight.grad.norm() > 0 and not any("net" in k for k in model.state_dict())


@pytest.mark.parametrize(
    "how", [{}, {"adversarial": 0.5, "start": 2, "perceptual": 0.1}], ids=["alone", "against a critic"]
)
def test_resume_is_bit_exact(how, tmp_path):
    def trained(folder, stop=None):
        torch.manual_seed(0)
        model = KLAutoEncoder(16, width=8, **how)
        for p in train(
            model,
            load("digits")[:64],
            Settings(steps=6, batch_size=8, validation=0.1, validate_every=3, device="cpu"),
            folder,
        ):
            if p.step == stop:
                break
        return model

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop=3)
    parts = trained(tmp_path / "parts")
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not how or whole.steps == 6
    whole.set_scale(load("digits")[:64])
    save_system(tmp_path / "kl.safetensors", whole)
    again = load_system(tmp_path / "kl.safetensors")
    assert again.scale == whole.scale > 0 and again.config == whole.config
