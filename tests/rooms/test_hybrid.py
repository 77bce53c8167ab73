"""DiffuseVAE from end to end at tiny sizes: both forms trained, saved, loaded and sampled, grey and
coloured, with and without z.
"""

import pytest
import torch
from tiny import BRIEF, awake, progress_of, squares

from diffusevae.autoencoders.vae import VAE
from diffusevae.core.checkpoints import load_system, save_system
from diffusevae.core.corruptions import Augmentation
from diffusevae.core.pixels import Batch
from diffusevae.core.training import Settings, train
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.samplers import final_image
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE

both_forms = pytest.mark.parametrize("form", [1, 2])
settings = Settings(**BRIEF, steps=6, validate_every=3, checkpoint_every=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def system(form=1, channels=1, use_z=False, predict="v", **more):
    vae = VAE(8, channels, z_dim=3, width=4, levels=1)
    net = UNet(8, channels, width=8, multipliers=(1, 1), image_channels=channels, z_dim=3 if use_z else 0)
    return DiffuseVAE(vae, net, Diffusion(Schedule(cosine(40)), predict), form, use_z, **more)


def trained(model, run_dir, channels=1):
    return progress_of(model, squares(channels), settings, run_dir)


@both_forms
@pytest.mark.parametrize("channels, use_z", [(1, False), (3, False), (1, True)])
def test_train_save_load_sample(form, channels, use_z, tmp_path):
    model = system(form, channels, use_z)
    first = {k: v.clone() for k, v in model.vae.state_dict().items()}
    net = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    records = trained(model, tmp_path, channels)
    assert len(records) == 6 and records[-1].validation["validation_loss"] > 0
    assert all(torch.equal(v, first[k]) for k, v in model.vae.state_dict().items())
    assert any(not torch.equal(v, net[k]) for k, v in model.denoiser.state_dict().items())

    save_system(tmp_path / "now.safetensors", model.eval())
    for path in ("now.safetensors", "best.safetensors"):
        again = load_system(tmp_path / path)
        assert (
            (again.form, again.use_z) == (form, use_z)
            and not again.training
            and not any(p.requires_grad for p in again.vae.parameters())
        )
        pair = again.sample_pairs(3, seeds=[1, 2, 3], steps=4)
        assert [v.shape for v in pair] == [(3, channels, 8, 8)] * 2
        if path == "now.safetensors":
            assert all(
                torch.equal(a, b) for a, b in zip(pair, model.sample_pairs(3, seeds=[1, 2, 3], steps=4))
            )


@both_forms
def test_both_stages_with_one_loop(form, tmp_path):
    model = system(form)
    vae = VAE(8, z_dim=3, width=4, levels=1)
    losses = [r.loss for r in trained(vae, tmp_path / "vae")]
    assert losses[-1] < losses[0]
    model = DiffuseVAE(
        load_system(tmp_path / "vae" / "best.safetensors"), model.denoiser, model.process, form
    )
    assert all(torch.tensor(r.loss).isfinite() for r in trained(model, tmp_path / "refiner"))


@both_forms
def test_training_repeats_itself(form, tmp_path):
    def weights(run_dir):
        torch.manual_seed(0)
        model = system(form)
        trained(model, run_dir)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@both_forms
def test_resume_equals_one_go(form, tmp_path):
    torch.manual_seed(0)
    whole = system(form)
    trained(whole, tmp_path / "whole")
    torch.manual_seed(0)
    half = train(system(form), squares(), settings, tmp_path / "halves")
    for _ in range(3):
        next(half)
    half.close()
    torch.manual_seed(9)
    rest = system(form)
    records = trained(rest, tmp_path / "halves")
    assert [r.step for r in records] == [4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values()))


@both_forms
@pytest.mark.parametrize("use_z", [False, True])
def test_gradient_stops_at_the_first_stage(form, use_z):
    model = system(form, use_z=use_z).train()
    awake(model.denoiser)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    model.loss(Batch(x))["loss"].backward()
    assert all(p.grad is None for p in model.vae.parameters()) and not model.vae.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.denoiser.parameters())


@both_forms
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_seeds_fix_samples_one_by_one(form, sampler):
    model = system(form).eval()
    awake(model.denoiser)
    many = model.sample_pairs(3, seeds=[4, 5, 6], sampler=sampler, steps=5)
    torch.rand(7)  # the global random state has no say
    one = model.sample_pairs(1, seeds=[5], sampler=sampler, steps=5)
    assert all(torch.allclose(a[1:2], b, atol=1e-4) for a, b in zip(many, one))
    assert not torch.allclose(many[1][0], many[1][1], atol=1e-2)
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        model.sample(3, seeds=[1, 2])


@both_forms
@pytest.mark.parametrize("channels, use_z", [(1, True), (3, False), (3, True)])
def test_guided_and_augmented_from_training_to_file(form, channels, use_z, tmp_path):
    model = system(form, channels, use_z, cond_drop=0.3, augment=Augmentation(noise=0.4, blur=1.0))
    trained(model, tmp_path, channels)
    awake(model.denoiser)
    save_system(tmp_path / "now.safetensors", model.eval())
    again = load_system(tmp_path / "now.safetensors")
    assert again.cond_drop == 0.3 and again.augment.largest == model.augment.largest
    ends = {w: model.sample(3, seeds=[1, 2, 3], steps=4, guidance=w) for w in (-1.0, 0.0, 1.5)}
    assert torch.equal(again.sample(3, seeds=[1, 2, 3], steps=4, guidance=1.5), ends[1.5])
    assert not torch.allclose(ends[1.5], ends[0.0], atol=1e-3) and not torch.allclose(
        ends[-1.0], ends[0.0], atol=1e-3
    )
    alone = model.sample(1, seeds=[2], steps=4, guidance=1.5)
    assert torch.allclose(alone, ends[1.5][1:2], atol=1e-4)


@both_forms
def test_without_its_condition_a_sample_has_nothing_of_it(form):
    """w = -1 leaves the answer under no condition: in form 1 neither x̂ nor z have a say, in form 2 x̂ has
    by the shift alone.
    """
    model = system(form, use_z=True, cond_drop=0.5).eval()
    awake(model.denoiser)
    noise, x_hat, z = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.randn(2, 3)

    def end(x_hat, z):
        return final_image(model.steps(x_hat, z, steps=4, noise=noise, guidance=-1.0))

    assert torch.allclose(end(x_hat, z), end(x_hat, z + 1), atol=1e-5)
    assert torch.allclose(end(x_hat, z), end(-x_hat, z), atol=1e-5) == (form == 1)


@both_forms
def test_one_noise_makes_a_batch_differ_by_z_alone(form):
    model = system(form).eval()
    awake(model.denoiser)
    x_hat = torch.rand(1, 1, 8, 8).expand(3, -1, -1, -1)
    for sampler in ("ddim", "ddpm"):
        same = final_image(model.steps(x_hat, seeds=[5, 5, 5], sampler=sampler, steps=5))
        assert torch.allclose(same[0], same[1], atol=1e-5) and torch.allclose(same[0], same[2], atol=1e-5)
    given = torch.randn(3, 1, 8, 8)
    assert torch.equal(
        final_image(model.steps(x_hat, noise=given, temperature=0.5, steps=5)),
        final_image(model.steps(x_hat, noise=0.5 * given, steps=5)),
    )


@both_forms
def test_the_last_step_is_the_clipped_x0_itself(form):
    model = system(form, predict="x0").eval()
    answer = 3 * torch.randn(2, 1, 8, 8)
    model.denoiser.forward = lambda x, t, cond: answer
    for sampler in ("ddim", "ddpm", "dpm_solver", "heun"):
        assert torch.equal(
            final_image(model.steps(torch.rand(2, 1, 8, 8), sampler=sampler, steps=6)), answer.clamp(-1, 1)
        ), sampler


def test_shares_out_of_range_and_missing_conditions_are_refused():
    for wrong, message in (
        (dict(cond_drop=1.0), "cond_drop must lie in"),
        (dict(cond_drop=-0.1), "cond_drop must lie in"),
        (dict(z_noise=2.0), "z_noise must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            system(**wrong)
    with pytest.raises(ValueError, match="form must be one of 1, 2; got 0"):
        system(form=0)
    model, x_hat = system(use_z=True).eval(), torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="give the z"):
        model.steps(x_hat)
    with pytest.raises(ValueError, match="train with cond_drop"):
        model.sample(2, guidance=1.0)
    with pytest.raises(ValueError, match="noise must have the shape"):
        model.steps(x_hat, torch.zeros(2, 3), noise=torch.zeros(2, 1, 4, 4))


@both_forms
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_batch_of_one_ends_in_range(form, channels, predict):
    model = system(form, channels, predict=predict).eval()
    awake(model.denoiser)
    assert model.loss(Batch(torch.zeros(1, channels, 8, 8)))["loss"].ndim == 0
    *_, end = model.steps(torch.ones(1, channels, 8, 8), steps=7, seeds=[0])
    assert (
        end.x.shape == (1, channels, 8, 8)
        and torch.allclose(end.x, end.x0, atol=1e-4)
        and end.x.abs().max() <= 1 + 1e-4
    )


def test_form_2_is_form_1_of_a_network_that_sees_y_plus_x_hat():
    one, two = system(1), system(2)
    two.load_state_dict(one.state_dict())
    awake(one.denoiser)
    two.denoiser.load_state_dict(one.denoiser.state_dict())
    x_hat = torch.rand(2, 1, 8, 8)
    forward = one.denoiser.forward
    one.denoiser.forward = lambda x, t, cond: forward(x + cond.image, t, cond)
    walks = [list(m.eval().steps(x_hat, steps=5, seeds=[0, 1])) for m in (one, two)]
    assert all(torch.allclose(a.x, b.x, atol=1e-5) for a, b in zip(*walks))


@pytest.mark.parametrize(
    "net, use_z, message",
    [
        (dict(size=16, image_channels=1), False, "takes 1 × 16 × 16"),
        (dict(size=8, channels=3, image_channels=3), False, "takes 3 × 8 × 8"),
        (dict(size=8), False, "image_channels=1, not 0"),
        (dict(size=8, image_channels=1), True, "z_dim=3, not 0"),
        (dict(size=8, image_channels=1, z_dim=5), True, "z_dim=3, not 5"),
        (dict(size=8, image_channels=1, z_dim=3), False, "z_dim=0, not 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(net, use_z, message):
    with pytest.raises(ValueError, match=message):
        DiffuseVAE(
            VAE(8, z_dim=3, width=4, levels=1),
            UNet(width=8, multipliers=(1,), **net),
            Diffusion(Schedule(cosine(40))),
            1,
            use_z,
        )
