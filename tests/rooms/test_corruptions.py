"""Corruptions and their augmentation beyond their lesson: other grids than PIL's, grey and coloured, by
seed, in bad hands, and inside of a model that trains.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import BRIEF

from diffusevae.autoencoders.vae import VAE
from diffusevae.core.checkpoints import build, load_system, save_system
from diffusevae.core.corruptions import Augmentation, corrupt, corruptions, limits
from diffusevae.core.pixels import Batch, ImageSet
from diffusevae.core.training import Settings, train
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE

some = {"noise": 0.3, "blur": 1.3, "quantize": 0.4, "occlude": 0.3, "lowres": 3.0}
each_kind = pytest.mark.parametrize("kind", corruptions)


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(n=5, channels=3, height=12, width=20):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@each_kind
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 5])
def test_shape_range_and_identity(kind, channels, n):
    x = pictures(n, channels)
    bad = corrupt(x, kind, some[kind])
    assert bad.shape == x.shape and bad.dtype == x.dtype and bad.isfinite().all() and bad.abs().max() <= 1
    assert not torch.equal(bad, x) and torch.equal(corrupt(x, kind, limits[kind][0]), x)


@each_kind
def test_one_severity_each_is_as_one_by_one(kind):
    x = pictures(3)
    least = limits[kind][0]
    severities = torch.tensor([least, (least + some[kind]) / 2, some[kind]])
    together = corruptions[kind](x, severities, torch.Generator().manual_seed(4))
    alone = [
        corruptions[kind](x, float(s), torch.Generator().manual_seed(4))[i] for i, s in enumerate(severities)
    ]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6) and torch.equal(together[0], x[0])


@each_kind
def test_the_draw_is_the_generators(kind):
    x = pictures()
    one, two, other = (corrupt(x, kind, some[kind], torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(one, two) and torch.equal(one, other) == (kind not in ("noise", "occlude"))
    before = torch.get_rng_state()
    corrupt(x, kind, some[kind], torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


@each_kind
def test_more_is_worse(kind):
    x = F.interpolate(pictures(20, height=4, width=4), size=16, mode="bilinear")
    least, most = limits[kind][0], some[kind]
    bad = [
        corrupt(x, kind, least + u * (most - least), torch.Generator().manual_seed(0)) for u in (0, 0.3, 1.0)
    ]
    errors = [float((b - x).square().mean()) for b in bad]
    assert errors[0] == 0 < errors[1] < errors[2]


def test_low_resolution_is_pillows():
    "Pillow resamples bicubically with the same kernel, antialiased, in single channels of floats."
    x = pictures(1, 1, 24, 36)
    small = Image.fromarray(x[0, 0].numpy()).resize((9, 6), Image.Resampling.BICUBIC)
    ours = corruptions["lowres"](x, 4)[0, 0]
    assert np.allclose(ours, np.asarray(small.resize((36, 24), Image.Resampling.BICUBIC)), atol=1e-5)


def test_blur_is_scipys():
    "Away from the border, where conventions differ."
    scipy = pytest.importorskip("scipy.ndimage")
    x = pictures(1, 1, 40, 40)
    theirs = scipy.gaussian_filter(x[0, 0].double().numpy(), 1.7, truncate=8)
    assert np.allclose(corruptions["blur"](x, 1.7)[0, 0, 14:-14, 14:-14], theirs[14:-14, 14:-14], atol=1e-5)


@pytest.mark.parametrize(
    "x, kind, severity, message",
    [
        (pictures(), "fog", 0.1, "kind must be one of noise, blur, quantize, occlude, lowres; got 'fog'"),
        (pictures(), "noise", -0.1, "noise must be finite and lie in 0"),
        (pictures(), "blur", float("inf"), "must be finite"),
        (pictures(), "quantize", 2.1, "lie in 0 … 2"),
        (pictures(), "occlude", 1.01, "lie in 0 … 1"),
        (pictures(), "lowres", 0.0, "lie in 1 … inf"),
        (pictures(), "noise", torch.full((4,), 0.1), "one for each of the 5 images"),
        (255 * pictures(), "noise", 0.1, "must lie in"),
        (pictures() + 1, "noise", 0.1, "must lie in"),
        (pictures() * float("nan"), "noise", 0.1, "must lie in"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "noise", 0.1, "convert uint8 images by to_float"),
        (np.zeros((2, 3, 8, 8)), "noise", 0.1, "got float64"),
        (pictures()[0], "noise", 0.1, "a batch of one"),
        (pictures()[:0], "noise", 0.1, "at least one"),
        (pictures().repeat(1, 2, 1, 1), "noise", 0.1, "1 or 3"),
    ],
)
def test_what_it_refuses(x, kind, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(x, kind, severity)


def test_floats_in_0_to_1_are_pointed_out():
    with pytest.warns(UserWarning, match=r"give 2 \* x - 1"):
        corrupt((pictures() + 1) / 2, "noise", 0.1)


def test_every_kind_is_drawn_as_often():
    x = torch.rand(3000, 1, 6, 6) - 0.5
    augment = Augmentation(quantize=1.0, occlude=0.9, clean=0.0).train()
    x_hat = augment(x)
    hidden = (
        ((x_hat == 0).flatten(1).sum(1) > 4).float().mean()
    )  # rectangles of 0.9 · u of the area: above 4 of 36 pixels in six of seven
    assert 0.36 < hidden < 0.5


def test_clean_shares():
    x = pictures(400)
    for clean in (0.0, 0.5, 1.0):
        same = (Augmentation(**some, clean=clean).train()(x) == x).flatten(1).all(1).float().mean()
        assert (
            clean <= same + 0.08 and same <= clean + 0.08
        )  # a mild quantization or an empty rectangle is no change either


def test_low_precision_leaves_clean_images_alone():
    x = pictures(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        augment = Augmentation(blur=1.0, clean=0.5).train()
        same = (augment(x) == x).flatten(1).all(1).float().mean()
        assert augment(x.bfloat16()).dtype == torch.bfloat16
    assert same > 0.3


@pytest.mark.parametrize(
    "wrong", [dict(noise=-1.0), dict(lowres=0.5), dict(occlude=2.0), dict(clean=-0.1), dict(clean=1.1)]
)
def test_augmentations_that_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Augmentation(**wrong)


def test_rebuilds_from_its_config():
    augment = Augmentation(noise=0.3, blur=2.0, quantize=0.5, occlude=0.2, lowres=4, clean=0.1)
    again = build(augment.config)
    assert type(again) is Augmentation and again.config == augment.config
    assert again.largest == augment.largest and again.clean == augment.clean


def test_inside_of_a_model(tmp_path):
    "It trains, saves, loads and resumes by seed; while validating and sampling it is not there."

    def system():
        torch.manual_seed(0)
        net = UNet(8, width=8, multipliers=(1, 1), image_channels=1)
        return DiffuseVAE(
            VAE(8, z_dim=3, width=4, levels=1),
            net,
            Diffusion(Schedule(cosine(40)), "v"),
            augment=Augmentation(noise=0.5, lowres=4),
        )

    settings = Settings(**BRIEF, steps=4, validate_every=2, checkpoint_every=2)
    images = ImageSet(
        torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    model, again = system(), system()
    for m, folder in ((model, "a"), (again, "b")):
        list(train(m, images, settings, tmp_path / folder))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    save_system(tmp_path / "model.safetensors", model.eval())
    loaded = load_system(tmp_path / "model.safetensors")
    assert loaded.augment.largest == {"noise": 0.5, "lowres": 4.0}
    assert torch.equal(loaded.sample(2, seeds=[0, 1], steps=3), model.sample(2, seeds=[0, 1], steps=3))
    x = torch.zeros(4, 1, 8, 8)
    shown = []
    model.denoiser.forward = lambda x_t, t, cond: shown.append(cond.image) or x_t
    for mode in (True, False):
        torch.manual_seed(1)
        model.train(mode).loss(Batch(x))
    assert not torch.equal(shown[0], shown[1])
