"""Latent diffusion: the seam between two models, its traps put back one by one, the cache, resumed
trainings, and what is refused.
"""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from diffusevae.autoencoders.autoencoder import AutoEncoder
from diffusevae.autoencoders.first_stages import KLF, KLAutoEncoder
from diffusevae.autoencoders.vae import VAE
from diffusevae.autoencoders.vqvae import VQVAE
from diffusevae.core.checkpoints import load_system, load_tensors, pretrained, save_system
from diffusevae.core.images import load as load_images
from diffusevae.core.pixels import Batch, ImageSet
from diffusevae.core.training import Settings, make_batch, train
from diffusevae.diffusion import latent
from diffusevae.diffusion.bound import bound_term
from diffusevae.diffusion.conditions import Cond
from diffusevae.diffusion.dit import DiT
from diffusevae.diffusion.guidance import cfg
from diffusevae.diffusion.latent import LatentDiffusion, LatentSet, cached_latents, encode_all, tensors_hash
from diffusevae.diffusion.process import Diffusion, ideal_denoiser
from diffusevae.diffusion.samplers import Noise, ddim, final_image
from diffusevae.diffusion.schedules import Schedule, cosine, linear
from diffusevae.diffusion.unet import UNet

T = 50


def pictures(n=24, channels=1, size=16, classes=3, seed=0):
    "Smooth random images with labels."
    g = torch.Generator().manual_seed(seed)
    x = nn.functional.interpolate(
        torch.rand(n, channels, 4, 4, generator=g), size=(size, size), mode="bilinear"
    )
    return ImageSet(
        (x * 255).round().to(torch.uint8), torch.arange(n) % classes, tuple("abcdefghij"[:classes])
    )


def stage_of(kind, channels=1, size=16, **more):
    "A little first stage with random weights and its own scale."
    torch.manual_seed(1)
    make = {
        "kl": lambda: KLAutoEncoder(size, channels, 4, width=8, **more),
        "vq": lambda: VQVAE(size, channels, 16, 4, width=8, **more),
    }[kind]
    stage = make().eval()
    stage.set_scale(pictures(64, channels, size))
    return stage


def shaken(net):
    "The same network, its zeroes left behind."
    torch.manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def denoiser_of(kind, size, classes=0, outputs=None):
    make = {
        "unet": lambda: UNet(size, 4, width=8, multipliers=(1,), classes=classes, outputs=outputs),
        "dit": lambda: DiT(size, 4, patch=1, width=16, depth=2, heads=2, classes=classes, outputs=outputs),
    }[kind]
    torch.manual_seed(3)
    return shaken(make())


def model_of(stage, net="unet", classes=0, predict="v", cls=LatentDiffusion, **more):
    return cls(
        stage,
        denoiser_of(net, stage.latent_shape[1], classes),
        Diffusion(Schedule(cosine(T)), predict),
        **more,
    )


@pytest.fixture(scope="module")
def kl():
    return stage_of("kl")


# ---------------------------------------------------------------- every combination


@pytest.mark.parametrize(
    "size, channels", [(16, 1), (24, 3), (12, 3)], ids=["grey16", "colour24", "colour12"]
)
@pytest.mark.parametrize("net", ["unet", "dit"])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_first_stage_with_every_denoiser(kind, net, size, channels):
    stage = stage_of(kind, channels, size)
    model, images = model_of(stage, net, classes=3, label_drop=0.5), pictures(6, channels, size)
    z = encode_all(stage, images)
    assert z.x.shape == (6, 4, size // 4, size // 4) and z.x.dtype == torch.float32 and not z.x.requires_grad
    model.train()
    for batch in (make_batch(z, torch.arange(6)), make_batch(z, torch.tensor([4]))):
        model.loss(batch)["loss"].backward()
    assert all(p.grad is not None for p in model.denoiser.parameters()) and all(
        p.grad is None for p in stage.parameters()
    )
    one, many = (
        model.sample(1, steps=3, seeds=[5], label=2),
        model.sample(3, steps=3, seeds=[4, 5, 6], label=2),
    )
    assert many.shape == (3, channels, size, size) and many.abs().max() <= 1 and many.dtype == torch.float32
    assert torch.allclose(one[0], many[1], atol=1e-4)
    assert model.training and not stage.training


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("net", ["unet", "dit"])
def test_low_precision(kind, net):
    stage = stage_of(kind)
    model, images = model_of(stage, net), pictures(8)
    plain = encode_all(stage, images)
    with torch.autocast("cpu", torch.bfloat16):
        z = encode_all(stage, images)
        loss = model.loss(Batch(z.x))["loss"]
        loss.backward()
        x = model.sample(2, steps=3, seeds=[1, 2])
    assert (
        z.x.dtype == x.dtype == torch.float32
        and loss.isfinite()
        and x.isfinite().all()
        and x.abs().max() <= 1
    )
    assert torch.allclose(z.x, plain.x, atol=0.2) and all(
        p.grad.isfinite().all() for p in model.denoiser.parameters()
    )


def test_channels_last_changes_nothing(kl):
    images, model = pictures(8), model_of(copy.deepcopy(kl)).eval()
    z = encode_all(model.first_stage, images)
    rows = model.view(z.x)
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(model.view(z.x.contiguous(memory_format=torch.channels_last)), rows, atol=1e-5)
    assert torch.allclose(encode_all(model.first_stage, images).x, z.x, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moves_between_devices(kl, tmp_path):
    model, images = model_of(copy.deepcopy(kl), classes=3, label_drop=0.1), pictures(16)
    here, how = encode_all(model.first_stage, images, flip=True), dict(steps=3, seeds=[1, 2], guidance=1.0)
    x = model.sample(2, **how)
    model.to("cuda")
    there = encode_all(model.first_stage, images, flip=True)
    assert there.x.device == images.images.device and torch.allclose(there.x, here.x, atol=1e-3)
    assert model.sample(2, **how).is_cuda and torch.allclose(model.sample(2, **how).cpu(), x, atol=1e-2)
    assert tensors_hash(model.first_stage.state_dict()) == tensors_hash(kl.state_dict())
    settings = Settings(steps=3, batch_size=4, checkpoint_every=3, device="cuda")
    assert [p.step for p in train(model, there, settings, tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------- the traps, each put back


class Perfect(nn.Module):
    "A denoiser that knows the latents by heart: what comes out wrong is not the network's fault."

    def __init__(self, process, latents):
        super().__init__()
        self.channels, self.size, self.classes, self.outputs = (
            latents.shape[1],
            latents.shape[2],
            0,
            latents.shape[1],
        )
        self.answer, self.weight = ideal_denoiser(process, latents, 0.0), nn.Parameter(torch.zeros(()))
        self.config = {}

    def forward(self, x_t, t, cond=None):
        return self.answer(x_t, t, cond)


def gap(make=LatentDiffusion, scaled=lambda stage: None, decoded=lambda stage: None):
    """How far samples of a perfect denoiser are from the first stage's reconstructions: mean squared
    distance, a pixel, to the nearest one.
    """
    images, stage = load_images("digits")[:100], copy.deepcopy(pretrained("digits_kl"))
    reconstructions = stage.reconstruct(images.x)
    scaled(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = encode_all(stage, images)
    decoded(stage)
    process = Diffusion(Schedule(cosine(200)), "v")
    x = make(stage, Perfect(process, latents.x), process).sample(
        30, steps=40, spacing="linspace", seeds=range(30)
    )
    return float(torch.cdist(x.flatten(1), reconstructions.flatten(1)).min(1).values.square().mean()) / 256


class Clipping(LatentDiffusion):
    "The trap: clipped as in pixels."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def steps(self, n, clip=True, **how):
        return super().steps(n, clip=clip, **how)


class Undivided(LatentDiffusion):
    "The trap: the scale forgotten in decoding."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def view(self, z):
        return self.first_stage.image(z).clamp(-1, 1).detach()


def test_a_perfect_denoiser_gives_the_training_images():
    assert gap() < 1e-4


def test_mutant_clips_latents():
    assert gap(Clipping) > 1e-2


def test_mutant_forgets_the_scale():
    assert gap(Undivided) > 1e-3


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_mutant_decodes_with_another_scale(ratio):
    assert gap(decoded=lambda stage: stage.scale.mul_(ratio)) > 1e-2


def test_one_scale_for_both_ways_is_kept_even_if_borrowed():
    """Consistently wrong: a perfect network does not mind, but whoever encodes is told, and training
    suffers (see the notebook).
    """
    assert gap(scaled=lambda stage: stage.scale.fill_(0.18215)) < 1e-2
    stage = copy.deepcopy(pretrained("digits_kl"))
    stage.scale.fill_(0.18215)
    with pytest.warns(UserWarning, match="standard deviation 0.23, not 1: is the scale another model's"):
        z = encode_all(stage, load_images("digits")[:300])
    assert abs(float(z.x.std()) - 0.225) < 0.02


def test_own_scale_is_that_of_the_data(recwarn):
    for name, data in (("digits_kl", "digits"), ("digits_vqvae", "digits")):
        assert abs(float(encode_all(pretrained(name), load_images(data)).x.std()) - 1) < 1e-3
    assert not recwarn


def test_latents_are_no_pixels_to_the_bound(kl):
    "With a learned variance the last term is a density; taken for 8-bit pixels it would cut latents at ±1."
    assert LatentDiffusion.discrete is False
    process = Diffusion(Schedule(linear(T)), "eps", "learned_range")
    model = LatentDiffusion(kl, denoiser_of("unet", 4, outputs=8), process).eval()
    x0 = 2.5 * torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    loss = model.loss(Batch(x0))["loss"]
    torch.manual_seed(0)
    t = torch.randint(T, (64,))
    noise = torch.randn_like(x0)
    x_t = process.add_noise(x0, noise, t)
    out = model.denoiser(x_t, t.float())
    squares = (out[:, :4] - noise).square().mean((1, 2, 3))
    terms = bound_term(process, out, x0, x_t, t, clip=False, discrete=False)
    assert torch.allclose(loss, (squares + 1e-3 * T * terms).mean(), rtol=1e-4)
    with pytest.raises(ValueError, match="must return 8 channels, not 4"):
        LatentDiffusion(kl, denoiser_of("unet", 4), process)


# ---------------------------------------------------------------- the system


def test_clip_only_when_asked(kl):
    model = model_of(kl).eval()
    loud = dict(steps=3, seeds=range(4), temperature=3.0)
    free, held = list(model.steps(4, **loud)), list(model.steps(4, clip=True, **loud))
    assert max(float(s.x0.abs().max()) for s in free) > 1.5 and all(s.x0.abs().max() <= 1 for s in held)
    assert torch.equal(model.sample(4, **loud), model.view(free[-1].x)) and torch.equal(
        model.sample(4, clip=True, **loud), model.view(held[-1].x)
    )
    assert all(s.x0.abs().max() <= 1 for s in model.steps(4, clip=0.9, **loud))


def test_every_sampler_walks_in_latents(kl):
    model = model_of(kl).eval()
    for name in ("ddpm", "ddim", "dpm_solver", "heun"):
        a, b = (model.sample(2, sampler=name, steps=4, seeds=[1, 2]) for _ in range(2))
        assert torch.equal(a, b) and a.shape == (2, 1, 16, 16) and a.isfinite().all()


def test_guidance(kl):
    model = model_of(kl, classes=3, label_drop=0.2).eval()
    how = dict(steps=4, seeds=[1, 2, 3])
    guided, plain = model.sample(3, label=1, guidance=1.5, **how), model.sample(3, label=1, **how)
    x_T = Noise((3, 4, 4, 4), [1, 2, 3])()
    by_hand = final_image(
        ddim(
            cfg(model.denoiser, 1.5),
            model.process,
            x_T,
            cond=Cond(label=torch.full((3,), 1)),
            steps=4,
            clip=False,
        )
    )
    assert torch.allclose(guided, model.view(by_hand), atol=1e-5) and not torch.allclose(
        guided, plain, atol=1e-3
    )
    assert torch.equal(model.sample(3, **how), model.sample(3, label=[0, 1, 2], **how))
    with pytest.raises(ValueError, match="null class"):
        model_of(kl, classes=3).steps(2, guidance=1.0)
    with pytest.raises(ValueError, match="0 … 2, or"):
        model.steps(2, label=3)


def test_only_the_denoiser_learns(kl):
    model = model_of(copy.deepcopy(kl), classes=3, label_drop=0.9)
    before = tensors_hash(model.first_stage.state_dict())
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"denoiser"} and any(k.startswith("first_stage.") for k in model.state_dict())
    assert model.train().training and not any(m.training for m in model.first_stage.modules())
    assert not model.eval().training and not any(m.training for m in model.modules())
    assert tensors_hash(model.first_stage.state_dict()) == before


def test_labels_are_dropped_in_training_only(kl):
    model, z = model_of(kl, classes=3, label_drop=1.0), encode_all(kl, pictures(12))
    batch = Batch(z.x, z.labels)
    assert (model.train().condition_for(batch).label == -1).all() and torch.equal(
        model.eval().condition_for(batch).label, z.labels
    )


@pytest.mark.parametrize(
    "stage, more",
    [
        (lambda: stage_of("vq"), {}),
        (lambda: stage_of("kl"), {"times": "importance", "weight": "min_snr"}),
        (lambda: stage_of("kl", adversarial=0.5), {}),
        (lambda: stage_of("vq", size=24, channels=3), {}),
    ],
    ids=["vq", "importance", "critic", "colour"],
)
def test_checkpoint_rebuilds_equal_samples(stage, more, tmp_path):
    model = model_of(stage(), "dit", classes=3, label_drop=0.1, **more).eval()
    save_system(tmp_path / "m.safetensors", model, note="latent")
    again = load_system(tmp_path / "m.safetensors")
    assert (
        again.config == model.config
        and type(again.first_stage) is type(model.first_stage)
        and float(again.first_stage.scale) > 0
    )
    assert again.first_stage.scale == model.first_stage.scale and not again.first_stage.training
    assert not any(p.requires_grad for p in again.first_stage.parameters()) and all(
        p.requires_grad for p in again.denoiser.parameters()
    )
    how = dict(steps=4, seeds=[7, 8], guidance=1.0)
    assert torch.equal(again.sample(2, **how), model.sample(2, **how))


def test_published_first_stage():
    """The published networks are first stages like any other; their decoder has no range of its own, and
    images have.
    """
    torch.manual_seed(0)
    stage = shaken(KLF(16, ch=32, multipliers=(1, 2, 2), blocks=1, z_channels=4)).eval()
    stage.set_scale(pictures(32, 3))
    z = encode_all(stage, pictures(5, 3))
    model = model_of(stage)
    x = model.sample(2, steps=2, temperature=20.0)
    assert z.x.shape == (5, 4, 4, 4) and x.shape == (2, 3, 16, 16) and x.abs().max() <= 1


# ---------------------------------------------------------------- encoding


def test_order_batches_and_mirrors(kl):
    images = pictures(11)
    whole, parts = encode_all(kl, images, flip=True), encode_all(kl, images, flip=True, batch_size=3)
    assert torch.allclose(whole.x, parts.x, atol=1e-5) and len(whole) == 22
    assert torch.allclose(whole.x[:11], encode_all(kl, images).x, atol=1e-5)
    mirrored = ImageSet(images.images.flip(3), images.labels, images.classes)
    assert torch.allclose(whole.x[11:], encode_all(kl, mirrored).x, atol=1e-5)
    assert torch.equal(whole.labels, torch.cat([images.labels] * 2)) and whole.classes == images.classes
    assert not torch.allclose(whole.x[11:], whole.x[:11].flip(3), atol=1e-2)


def test_attributes_and_unlabelled_images(kl):
    images = pictures(4)
    bare = encode_all(kl, ImageSet(images.images), flip=True)
    assert bare.labels is None and bare.attributes is None and make_batch(bare, torch.arange(3)).label is None
    known = ImageSet(images.images, attributes=torch.arange(8.0).reshape(4, 2), attribute_names=("a", "b"))
    assert torch.equal(encode_all(kl, known, flip=True).attributes, known.attributes.repeat(2, 1))
    assert torch.equal(make_batch(encode_all(kl, known), torch.tensor([2])).attributes, known.attributes[2:3])


def test_mode_and_weights_are_left_as_they_were():
    stage = stage_of("vq").train()
    before = tensors_hash(stage.state_dict())
    encode_all(stage, pictures(8))
    assert (
        stage.training and tensors_hash(stage.state_dict()) == before
    )  # a codebook in training mode would have moved
    with pytest.raises(ValueError, match="takes images"):
        encode_all(stage, pictures(4, size=24))
    assert stage.training


def test_progress_bar_for_large_sets_only(capsys):
    torch.manual_seed(0)
    stage = KLAutoEncoder(4, width=4, levels=1)
    images = ImageSet(torch.randint(0, 256, (10_000, 1, 4, 4), dtype=torch.uint8))
    stage.set_scale(images)
    encode_all(stage, images[:9_999], batch_size=5_000)
    assert "encoding" not in capsys.readouterr().err
    encode_all(stage, images, batch_size=5_000)
    assert "encoding: 100%" in capsys.readouterr().err


# ---------------------------------------------------------------- the cache


@pytest.fixture
def encodings(monkeypatch):
    "How often encode_all was called."
    calls, plain = [], latent.encode_all
    monkeypatch.setattr(latent, "encode_all", lambda *a, **k: calls.append(a) or plain(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cache_is_reused(kl, tmp_path, encodings, dtype):
    file, images = tmp_path / "deep" / "z.safetensors", pictures(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (cached_latents(file, kl, images, flip=True, dtype=dtype) for _ in range(2))
    assert len(encodings) == 1 and torch.equal(first.x, second.x) and first.x.dtype == torch.float32
    assert load_tensors(file)[0]["x"].dtype == getattr(torch, dtype) and torch.equal(
        first.labels, second.labels
    )
    plain = encode_all(kl, images, flip=True).x
    assert torch.equal(first.x, plain) if dtype == "float32" else torch.allclose(first.x, plain, atol=5e-3)
    relabelled = ImageSet(images.images, images.labels.flip(0), images.classes)
    assert (
        torch.equal(
            cached_latents(file, kl, relabelled, flip=True, dtype=dtype).labels[:9], images.labels.flip(0)
        )
        and len(encodings) == 1
    )


def nudge(stage):
    "The least change of one weight."
    p = next(stage.decoder.parameters())
    with torch.no_grad():
        p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: nudge(a["first_stage"]), "another first stage;"),
        (lambda a: a["first_stage"].scale.fill_(0.18215), "another first stage;"),
        (lambda a: a["images"].images[3].add_(1), "another images;"),
        (lambda a: a.update(images=a["images"][torch.arange(8, -1, -1)]), "another images;"),
        (lambda a: a.update(flip=True), "another flip;"),
        (lambda a: a.update(dtype="float16"), "another dtype;"),
        (lambda a: a.update(images=a["images"][:5], dtype="float16"), "another images and dtype;"),
    ],
    ids=["weight", "scale", "pixel", "order", "flip", "dtype", "two"],
)
def test_cache_of_anything_else_is_made_anew(kl, tmp_path, encodings, change, said):
    arguments = {"first_stage": copy.deepcopy(kl), "images": pictures(9), "flip": False, "dtype": "float32"}
    cached_latents(tmp_path / "z", **arguments)
    change(arguments)
    with pytest.warns(UserWarning, match=f"were made with {said} they are encoded anew"):
        z = cached_latents(tmp_path / "z", **arguments)
    assert len(encodings) == 2 and len(z) == len(arguments["images"]) * (1 + arguments["flip"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached_latents(tmp_path / "z", **arguments).x, z.x) and len(encodings) == 2


def test_cache_survives_a_move_in_memory(kl, tmp_path, encodings):
    cached_latents(tmp_path / "z", kl, pictures(5))
    other = copy.deepcopy(kl).to(memory_format=torch.contiguous_format).train().requires_grad_(False)
    cached_latents(tmp_path / "z", other, pictures(5))
    assert len(encodings) == 1


def test_files_that_are_no_cache_stay(kl, tmp_path):
    file = tmp_path / "best.safetensors"
    save_system(file, kl)
    content = file.read_bytes()
    with pytest.raises(
        ValueError, match=re.escape("best.safetensors holds no latents; give the cache a file of its own")
    ):
        cached_latents(file, kl, pictures(4))
    file.write_bytes(content[:500])
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        cached_latents(file, kl, pictures(4))
    assert file.read_bytes() == content[:500]
    with pytest.raises(ValueError, match="dtype must be one of float32, float16; got 'bfloat16'"):
        cached_latents(tmp_path / "z", kl, pictures(4), dtype="bfloat16")


def test_a_failed_encoding_leaves_no_file(kl, tmp_path):
    with pytest.raises(ValueError, match="takes images"):
        cached_latents(tmp_path / "z", kl, pictures(4, size=24))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- training


def settings(steps, **more):
    return Settings(
        **{
            **dict(
                steps=steps,
                batch_size=8,
                lr=2e-3,
                warmup=2,
                checkpoint_every=3,
                validate_every=4,
                log_every=2,
                validation=0.2,
                device="cpu",
            ),
            **more,
        }
    )


@pytest.mark.parametrize("net, times", [("unet", "uniform"), ("dit", "importance")])
def test_training_resumes_bit_for_bit(net, times, kl, tmp_path):
    z = encode_all(kl, pictures(20), flip=True)

    def fresh():
        return model_of(copy.deepcopy(kl), net, classes=3, label_drop=0.3, times=times)

    straight = [float(p.loss) for p in train(fresh(), z, settings(9), tmp_path / "a")]
    steps = train(fresh(), z, settings(9), tmp_path / "b")
    for _ in range(5):
        next(steps)
    steps.close()
    resumed = [float(p.loss) for p in train(fresh(), z, settings(9), tmp_path / "b")]
    assert len(resumed) == 4 and resumed == straight[5:]
    a, b = (load_tensors(tmp_path / run / "last.safetensors") for run in "ab")
    assert a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    best = load_system(tmp_path / "a" / "best.safetensors")
    assert tensors_hash(best.first_stage.state_dict()) == tensors_hash(kl.state_dict())
    assert best.sample(2, steps=2, guidance=1.0).shape == (2, 1, 16, 16)


def test_first_stage_is_not_averaged(kl, tmp_path):
    model = model_of(copy.deepcopy(kl))
    list(train(model, encode_all(kl, pictures(20)), settings(3), tmp_path))
    tensors = load_tensors(tmp_path / "last.safetensors")[0]
    trained = sum(1 for _ in model.denoiser.parameters())
    assert sum(1 for k in tensors if k.startswith("ema")) == trained
    assert not [
        k for k in tensors if k.startswith("optimizer.") and tensors[k].ndim == 0 and tensors[k] < 3
    ]  # each was updated in every step
    assert len({k.split(".")[2] for k in tensors if k.startswith("optimizer.")}) == trained


def test_latents_of_another_first_stage_do_not_pass_for_the_same_training(kl, tmp_path):
    z = encode_all(kl, pictures(20))
    list(train(model_of(copy.deepcopy(kl)), z, settings(3), tmp_path))
    with pytest.raises(ValueError, match="another training"):
        list(train(model_of(stage_of("vq")), z, settings(3), tmp_path))


def test_learns_something(kl, tmp_path):
    z = encode_all(kl, pictures(64))
    losses = [
        float(p.loss)
        for p in train(model_of(kl), z, settings(60, lr=5e-3, validation=0.0, batch_size=32), tmp_path)
    ]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_flip_is_refused(kl, tmp_path):
    with pytest.raises(ValueError, match="encode mirrored images too"):
        next(train(model_of(kl), encode_all(kl, pictures(20)), settings(3, flip=True), tmp_path))


# ---------------------------------------------------------------- what is refused


def test_pixels_are_refused(kl, tmp_path):
    model = model_of(kl)
    with pytest.raises(
        ValueError,
        match=re.escape("latents of (B, 4, 4, 4), got (3, 1, 16, 16); encode images first: encode_all"),
    ):
        model.loss(Batch(pictures(3).x))
    with pytest.raises(ValueError, match="encode images first"):
        next(train(model, pictures(20), settings(3), tmp_path))


@pytest.mark.parametrize(
    "make",
    [lambda: AutoEncoder(16, 8), lambda: VAE(16, z_dim=4), lambda: nn.Linear(2, 2)],
    ids=["autoencoder", "vae", "linear"],
)
def test_what_is_no_first_stage(make):
    stage = make()
    with pytest.raises(
        ValueError, match=f"{type(stage).__name__} is no first stage, it has no to_latent; use a VQVAE"
    ):
        LatentDiffusion(stage, denoiser_of("unet", 4), Diffusion(Schedule(cosine(T)), "v"))
    for encode in (encode_all, lambda s, images: cached_latents("nowhere", s, images)):
        with pytest.raises(ValueError, match="is no first stage"):
            encode(stage, pictures(4))


@pytest.mark.parametrize(
    "net",
    [UNet(16, 1, width=8), UNet(4, 3, width=8, multipliers=(1,)), UNet(8, 4, width=8)],
    ids=["pixels", "channels", "size"],
)
def test_denoiser_of_another_shape(kl, net):
    with pytest.raises(
        ValueError,
        match=re.escape("this first stage's latents are (4, 4, 4); build it with size=4, channels=4"),
    ):
        LatentDiffusion(kl, net, Diffusion(Schedule(cosine(T)), "v"))


def test_decoder_of_another_shape(kl):
    model = model_of(kl)
    model.first_stage = stage_of("kl", size=32)
    with pytest.raises(ValueError, match=re.escape("latents are (4, 8, 8)")):
        model.steps(2)
    with pytest.raises(ValueError, match=re.escape("latents must be (B, 4, 8, 8)")):
        model.view(torch.zeros(1, 4, 4, 4))


def test_no_scale(tmp_path):
    stage = KLAutoEncoder(16, width=8)
    model = model_of(stage)  # or no checkpoint could be rebuilt
    for attempt in (
        lambda: model.loss(Batch(torch.zeros(2, 4, 4, 4))),
        lambda: model.steps(2),
        lambda: model.sample(2),
        lambda: encode_all(stage, pictures(2)),
        lambda: cached_latents(tmp_path / "z", stage, pictures(2)),
        lambda: model.view(torch.zeros(2, 4, 4, 4)),
    ):
        with pytest.raises(ValueError, match="never computed; call set_scale"):
            attempt()
    stage.set_scale(pictures(8))
    assert model.loss(Batch(torch.zeros(2, 4, 4, 4)))["loss"].isfinite()


def test_other_bad_input(kl):
    model = model_of(kl, classes=3, label_drop=0.1)
    z = encode_all(kl, pictures(4))
    for attempt, message in (
        (lambda: model.loss(Batch(z.x)), "no labels"),
        (lambda: model.loss(Batch(z.x, z.labels[:3])), "label"),
        (lambda: model.loss(Batch(z.x, z.labels + 3)), "0 … 2, or"),
        (lambda: model.steps(2, steps=T + 1), "steps must lie in"),
        (lambda: model.steps(2, eta=2.0), "eta must lie in"),
        (lambda: model.steps(2, clip=3.0), "clip must be"),
        (lambda: model.steps(2, seeds=[1]), "1 seeds for 2 samples"),
        (lambda: encode_all(kl, pictures(4)[:0]), "no images to encode"),
        (lambda: encode_all(kl, z), "takes images of"),
        (lambda: LatentSet(z.x.half()), "latents must be float32"),
        (lambda: LatentSet(z.x[0]), "latents must be float32"),
        (lambda: LatentSet(z.x, attributes=torch.zeros(3, 2)), "one row for each of the 4 latents"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_latent_set_indexing():
    z = LatentSet(torch.randn(6, 2, 3, 3), torch.arange(6), tuple("abcdef"), torch.randn(6, 2))
    for i in (2, slice(1, 4), [0, 5], torch.tensor([3, 3]), z.labels > 3):
        part, rows = z[i], [i] if isinstance(i, int) else i
        assert (
            torch.equal(part.x, z.x[rows])
            and torch.equal(part.labels, z.labels[rows])
            and torch.equal(part.attributes, z.attributes[rows])
        )
        assert part.classes == z.classes and not part.flippable
    assert len(z[2]) == 1 and LatentSet(z.x)[1:3].labels is None
