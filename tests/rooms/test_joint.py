"""Joint training of VAE and refiner at tiny sizes: gradients and their stops, save, load and resume, warm
starts, hybrid terms, and bad input.
"""

import pytest
import torch
from tiny import BRIEF, awake, progress_of, squares

from diffusevae.autoencoders.codes import latent_figures, linear_probe
from diffusevae.autoencoders.distances import FocalFrequency, MultiscaleSSIM, PerceptualLoss
from diffusevae.autoencoders.flows import IAF
from diffusevae.autoencoders.gan import VAEGAN
from diffusevae.autoencoders.hierarchical import HierarchicalVAE
from diffusevae.autoencoders.kl import Adaptive, Annealed
from diffusevae.autoencoders.priors import FlowPrior
from diffusevae.autoencoders.vae import VAE
from diffusevae.core.checkpoints import load_system, pretrained, save_system
from diffusevae.core.corruptions import Augmentation
from diffusevae.core.pixels import Batch, ImageSet
from diffusevae.core.training import Settings, train
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE
from diffusevae.hybrid.joint import (
    HybridTerms,
    JointDiffuseVAE,
    Ramp,
    from_two_stage,
    gradient_stops,
    gradients_by_part,
    hybrid_terms,
    with_objective,
)

both_forms = pytest.mark.parametrize("form", [1, 2])
settings = dict(BRIEF, steps=6, validate_every=3, checkpoint_every=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def system(cls=JointDiffuseVAE, channels=1, use_z=False, vae=None, **how):
    torch.manual_seed(0)
    vae = awake(VAE(8, channels, z_dim=3, width=4, levels=1)) if vae is None else vae
    net = awake(
        UNet(8, channels, width=8, multipliers=(1, 1), image_channels=channels, z_dim=3 if use_z else 0)
    )
    return cls(vae, net, Diffusion(Schedule(cosine(40)), "v"), use_z=use_z, **how)


def trained(model, run_dir, channels=1, **other):
    return progress_of(model, squares(channels), Settings(**{**settings, **other}), run_dir)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- gradients


@both_forms
@pytest.mark.parametrize("use_z", [False, True])
@pytest.mark.parametrize("stop", gradient_stops)
@pytest.mark.parametrize(
    "more",
    [{}, {"z_noise": 0.3}, {"augment": Augmentation(noise=0.3, blur=1.0)}, {"cond_drop": 0.5}],
    ids=["plain", "z_noise", "augment", "drop"],
)
def test_the_diffusion_loss_reaches_what_it_should(form, use_z, stop, more):
    model = system(form=form, use_z=use_z, stop=stop, **more).train()
    grads = gradients_by_part(model, Batch(torch.rand(4, 1, 8, 8)))
    expected = {"none": (True, True, True), "encoder": (False, True, True), "x_hat": (False, False, True)}[
        stop
    ]
    assert (
        tuple(bool(grads[part]["diffusion"].any()) for part in ("encoder", "decoder", "refiner")) == expected
    )
    assert (
        grads["encoder"]["vae"].any() and grads["decoder"]["vae"].any() and not grads["refiner"]["vae"].any()
    )
    assert all(v.isfinite().all() for part in grads.values() for v in part.values())


@both_forms
def test_z_alone_carries_a_gradient_to_the_encoder(form):
    """With use_z and an x̂ that says nothing of z, the refiner still pulls at the encoder, unless it is
    stopped.
    """
    for stop, reached in (("none", True), ("encoder", False), ("x_hat", False)):
        model = system(form=form, use_z=True, stop=stop).train()
        for p in model.vae.decoder[0].parameters():
            torch.nn.init.zeros_(p)
        assert (
            bool(gradients_by_part(model, Batch(torch.rand(4, 1, 8, 8)))["encoder"]["diffusion"].any())
            is reached
        )


def test_gradients_agree_with_differences():
    "The joint loss along its gradient at the encoder's weights, in float64, with the same random numbers."
    model = system(lambda_vae=0.7, lambda_diff=1.3).double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1

    def loss():
        torch.manual_seed(5)
        return model.loss(Batch(x))["loss"]

    weights = list(model.vae.encoder.parameters())
    gradient = torch.autograd.grad(loss(), weights)
    norm = torch.stack([g.norm() for g in gradient]).norm()
    with torch.no_grad():
        ends = []
        for h in (1e-4, -2e-4):  # outputs are cast to float32 on the way, so steps must not be too small
            for p, g in zip(weights, gradient):
                p += h * g / norm
            ends.append(loss())
    assert torch.isclose((ends[0] - ends[1]) / 2e-4, norm, rtol=5e-3)


@both_forms
@pytest.mark.parametrize("use_z, z_noise, cond_drop", [(False, 0.0, 0.0), (True, 0.0, 0.3), (True, 0.3, 0.0)])
def test_without_the_vae_term_and_stopped_it_is_the_two_stage_loss(form, use_z, z_noise, cond_drop):
    losses = []
    for cls, how in ((DiffuseVAE, {}), (JointDiffuseVAE, dict(stop="x_hat", lambda_vae=0.0))):
        model = system(
            cls,
            use_z=use_z,
            form=form,
            z_noise=z_noise,
            cond_drop=cond_drop,
            augment=Augmentation(noise=0.2),
            **how,
        ).train()
        torch.manual_seed(3)
        losses.append(model.loss(Batch(squares().x))["loss"])
    assert torch.equal(*losses)


def test_the_vae_learns_as_alone_when_the_refiner_is_stopped(tmp_path):
    """Side by side, the VAE's weights are those of its own training with the same loss, for a refiner that
    learns nothing from it.
    """
    one, two = (system(stop="x_hat", lambda_diff=w).train() for w in (0.0, 5.0))
    grads = []
    for model in (one, two):
        torch.manual_seed(1)
        model.loss(Batch(squares().x))["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.vae.parameters()]))
    assert torch.equal(*grads)


# ---------------------------------------------------------------- training


@both_forms
@pytest.mark.parametrize("channels, use_z", [(1, True), (3, False)])
def test_train_save_load_sample(form, channels, use_z, tmp_path):
    hybrid = HybridTerms([MultiscaleSSIM(), FocalFrequency()], [0.1, 1.0])
    model = system(form=form, channels=channels, use_z=use_z, hybrid=hybrid, lambda_diff=Ramp(0.0, 1.0, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    records = trained(model, tmp_path, channels)
    assert {
        "vae",
        "diffusion",
        "reconstruction",
        "kl",
        "ms_ssim",
        "focal_frequency",
        "lambda_vae",
        "lambda_diff",
    } <= set(records[-1].terms)
    assert [round(float(r.terms["lambda_diff"]), 2) for r in records] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert (
        records[-1].validation["validation_lambda_diff"] == 1 and model.lambda_diff.step == 6
    )  # validation did not count
    for part in ("vae.encoder", "vae.decoder", "denoiser"):
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith(part))

    save_system(tmp_path / "now.safetensors", model.eval())
    for path in ("now.safetensors", "best.safetensors"):
        again = load_system(tmp_path / path)
        assert (again.form, again.use_z, again.stop) == (form, use_z, "none") and not again.training
        pair = again.sample_pairs(3, seeds=[1, 2, 3], steps=4)
        assert [v.shape for v in pair] == [(3, channels, 8, 8)] * 2 and pair[1].abs().max() <= 1 + 1e-4
        if path == "now.safetensors":
            assert all(
                torch.equal(a, b) for a, b in zip(pair, model.sample_pairs(3, seeds=[1, 2, 3], steps=4))
            )


@both_forms
def test_resume_equals_one_go(form, tmp_path):
    def make():
        torch.manual_seed(0)
        vae = VAE(8, z_dim=3, width=4, levels=1, beta=Adaptive(2.0, of="rate"))
        return system(form=form, lambda_diff=Ramp(0.0, 1.0, 5), vae_lr=0.3, vae=vae)

    whole = make()
    trained(whole, tmp_path / "whole")
    half = train(make(), squares(), Settings(**settings), tmp_path / "halves")
    for _ in range(3):
        next(half)
    half.close()
    rest = make()
    assert [r.step for r in trained(rest, tmp_path / "halves")] == [4, 5, 6]
    assert (
        whole.state_dict().keys() == rest.state_dict().keys()
        and "vae.objective.log_beta" in rest.state_dict()
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values()))


def test_training_repeats_itself(tmp_path):
    runs = []
    for name in "ab":
        model = system(hybrid=hybrid_terms(focal_frequency=1.0))
        trained(model, tmp_path / name)
        runs.append(flat(model))
    assert torch.equal(*runs)
    other = system(hybrid=hybrid_terms(focal_frequency=1.0))
    trained(other, tmp_path / "c", seed=1)
    assert not torch.equal(runs[0], flat(other))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_learning_rate_of_the_vae(scale, tmp_path):
    model = system(vae_lr=scale)
    before = torch.cat([p.detach().flatten() for p in model.vae.parameters()])
    net = torch.cat([p.detach().flatten() for p in model.denoiser.parameters()])
    trained(model, tmp_path, steps=1, schedule="constant", ema=0)
    moved = (torch.cat([p.detach().flatten() for p in model.vae.parameters()]) - before).abs().max()
    assert (
        abs(moved - scale * 1e-2) < 2e-4 * max(scale, 1e-3) + 1e-7
    )  # AdamW's first step is the learning rate
    assert (
        abs((torch.cat([p.detach().flatten() for p in model.denoiser.parameters()]) - net).abs().max() - 1e-2)
        < 2e-4
    )


def test_rate_constraint_holds_against_the_refiner(tmp_path):
    "β rises while the rate is above its target, however the terms are weighted."
    vae = VAE(8, z_dim=3, width=4, levels=1, beta=Adaptive(0.05, of="rate", slack=0.1, speed=0.2))
    records = trained(system(vae=awake(vae), lambda_vae=0.1), tmp_path, steps=12)
    assert records[-1].terms["beta"] > 1.5 * records[0].terms["beta"]


@pytest.mark.parametrize("kind", ["flow", "hierarchical", "annealed"])
def test_any_vae(kind, tmp_path):
    if kind == "hierarchical":
        vae = HierarchicalVAE(8, z_dim=2, z_channels=(1,), width=4, levels=1)
    elif kind == "flow":
        vae = VAE(
            8,
            z_dim=3,
            width=4,
            levels=1,
            prior=FlowPrior(3, layers=2, hidden=8),
            flow=IAF(3, layers=1, hidden=8),
        )
    else:
        vae = VAE(8, z_dim=3, width=4, levels=1, beta=Annealed(steps=4))
    model = system(vae=awake(vae))
    before = {k: v.clone() for k, v in model.vae.prior.state_dict().items()}
    assert all(torch.isfinite(torch.tensor(r.loss)) for r in trained(model, tmp_path))
    again = load_system(tmp_path / "best.safetensors")
    assert again.sample(2, seeds=[0, 1], steps=2).shape == (2, 1, 8, 8)
    if kind == "flow":
        assert any(
            not torch.equal(v, before[k]) for k, v in model.vae.prior.state_dict().items()
        )  # the prior learns too


def test_mixed_precision_leaves_the_terms_alone(tmp_path):
    hybrid = HybridTerms([MultiscaleSSIM(), FocalFrequency()], [1.0, 1.0])
    records = trained(system(hybrid=hybrid), tmp_path, precision="bfloat16", steps=2)
    assert all(
        v.dtype == torch.float32 and v.isfinite()
        for r in records
        for k, v in r.terms.items()
        if k in ("loss", "ms_ssim", "focal_frequency", "diffusion")
    )


@both_forms
@pytest.mark.parametrize("channels", [1, 3])
def test_batch_of_one(form, channels):
    model = system(
        form=form, channels=channels, hybrid=HybridTerms([MultiscaleSSIM(), FocalFrequency()], [1.0, 1.0])
    ).train()
    assert all(
        v.ndim == 0 and v.isfinite() for v in model.loss(Batch(torch.rand(1, channels, 8, 8))).values()
    )
    many, one = (model.eval().sample_pairs(len(s), seeds=s, steps=4) for s in ([4, 5, 6], [5]))
    assert all(torch.allclose(a[1:2], b, atol=1e-4) for a, b in zip(many, one))


# ---------------------------------------------------------------- warm start


@both_forms
@pytest.mark.parametrize("use_z", [False, True])
def test_warm_start_draws_the_same_samples(form, use_z, tmp_path):
    two_stage = system(
        DiffuseVAE, form=form, use_z=use_z, z_noise=0.2, cond_drop=0.1, augment=Augmentation(noise=0.2)
    )
    trained(two_stage, tmp_path / "two")
    joint = from_two_stage(two_stage.eval(), Adaptive(3.0, of="rate"), stop="encoder", lambda_vae=0.5).eval()
    assert (joint.form, joint.use_z, joint.z_noise, joint.cond_drop, joint.stop) == (
        form,
        use_z,
        0.2,
        0.1,
        "encoder",
    ) and joint.augment is not None
    how = dict(seeds=[1, 2, 3], steps=4, guidance=1.0)
    expected = two_stage.sample_pairs(3, **how)
    assert all(torch.equal(a, b) for a, b in zip(joint.sample_pairs(3, **how), expected))
    trained(joint, tmp_path / "joint")
    assert all(
        torch.equal(a, b) for a, b in zip(two_stage.sample_pairs(3, **how), expected)
    )  # what it began from stays as it was
    assert not torch.equal(joint.eval().sample_pairs(3, **how)[0], expected[0])
    again = load_system(tmp_path / "joint" / "best.safetensors")
    assert again.vae.objective.target == 3.0 and again.config == joint.config


def test_objective_is_exchanged_in_a_copy():
    vae = VAE(8, z_dim=3, width=4, levels=1)
    other = with_objective(vae, Adaptive(2.0, of="rate"))
    assert (
        vae.objective.beta == 1.0 and vae.config["arguments"]["beta"] == 1.0 and other.objective.target == 2.0
    )
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="no objective to exchange"):
        with_objective(UNet(8, width=8), Adaptive(2.0, of="rate"))


# ---------------------------------------------------------------- terms


def test_eyes_stay_outside_by_name_and_inside_as_a_module(tmp_path):
    """A perceptual term by name adds no tensors and nothing to train; one with a module is saved with it,
    frozen, and untouched by training.
    """
    x = ImageSet(torch.randint(0, 255, (12, 1, 16, 16), dtype=torch.uint8))

    def make(term):
        return JointDiffuseVAE(
            awake(VAE(16, z_dim=3, width=4, levels=1)),
            awake(UNet(16, width=8, multipliers=(1,), patch=2, image_channels=1)),
            Diffusion(Schedule(cosine(40))),
            hybrid=HybridTerms([term], [0.1]),
        )

    by_name, by_module = make(PerceptualLoss("digits")), make(PerceptualLoss(pretrained("digits_classifier")))
    assert not [k for k in by_name.state_dict() if k.startswith("hybrid")]
    held = {k: v.clone() for k, v in by_module.state_dict().items() if k.startswith("hybrid")}
    assert held and sum(len(g["params"]) for g in by_module.optimizers(Settings())[0].param_groups) == sum(
        len(g["params"]) for g in by_name.optimizers(Settings())[0].param_groups
    )
    for name, model in (("name", by_name), ("module", by_module)):
        records = list(train(model, x, Settings(**{**settings, "steps": 2}), tmp_path / name))
        assert records[-1].terms["perceptual"] > 0
        again = load_system(tmp_path / name / "best.safetensors")
        pair = torch.rand(2, 2, 1, 16, 16)
        assert torch.equal(again.hybrid.compare(*pair)[0], model.hybrid.compare(*pair)[0])
    assert all(torch.equal(v, held[k]) for k, v in by_module.state_dict().items() if k in held)


def test_terms_grow_with_the_error_and_have_gradients():
    x = torch.nn.functional.interpolate(torch.rand(3, 1, 4, 4), size=16) * 2 - 1
    noise = torch.randn_like(x)
    for term in (PerceptualLoss("digits"), MultiscaleSSIM(), FocalFrequency(), FocalFrequency(2.0)):
        values = torch.stack([term(x + s * noise, x) for s in (0.0, 0.1, 0.3, 0.9)])
        assert (values.diff(dim=0) > 0).all() and values[0].abs().max() < 1e-5
        x_hat = (x + 0.3 * noise).requires_grad_()
        term(x_hat, x).sum().backward()
        assert x_hat.grad.isfinite().all() and x_hat.grad.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: system(stop="decoder"), "stop must be one of none, encoder, x_hat; got 'decoder'"),
        (lambda: system(lambda_vae=-0.1), "finite and not negative"),
        (lambda: system(lambda_diff=float("nan")), "finite and not negative"),
        (lambda: system(lambda_diff=Ramp(0.0, 1.0, 0)), "at least one step, got 0"),
        (lambda: system(vae_lr=-1.0), "vae_lr must be a finite number of at least 0, got -1.0"),
        (lambda: system(form=3), "form must be one of 1, 2; got 3"),
        (lambda: system(z_noise=2.0), "z_noise must lie in"),
        (lambda: system(vae=VAE(16, z_dim=3, width=4)), "VAE makes images of 1 × 16 × 16"),
        (
            lambda: system(vae=VAEGAN(VAE(8, z_dim=3, width=4, levels=1), levels=1)),
            "needs a VAE with its own objective, got VAEGAN",
        ),
        (lambda: hybrid_terms(focal_frequency=-1.0), "weights must be finite and not negative"),
        (lambda: hybrid_terms(perceptual=1.0, features="eyes"), "no shipped model 'eyes'"),
        (
            lambda: MultiscaleSSIM()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8)),
            "must be images of one shape",
        ),
        (
            lambda: linear_probe(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 2), torch.zeros(4)),
            "at least two classes",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- the latent space


def test_latent_figures():
    vae, data = awake(VAE(8, z_dim=3, width=4, levels=1)), squares(n=64, labels=True)
    first = latent_figures(vae, data, data)
    assert first == latent_figures(vae, data, data) and set(first) == {
        "probe",
        "moment_kl",
        "energy",
        "active_units",
    }
    assert 0.5 <= first["probe"] <= 1 and first["moment_kl"] > 0 and 0 <= first["active_units"] <= 3
    assert latent_figures(vae, ImageSet(data.images), ImageSet(data.images))["probe"] is None
