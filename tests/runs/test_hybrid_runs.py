"""The run notebooks of the hybrid rooms at tiny sizes: both forms with all their settings, other priors,
and quality against speed.
"""

import numpy as np
import pytest
import torch
from tiny import TRAIN, execute

from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system
from diffusevae.core.pixels import to_uint8
from diffusevae.evaluation import comparison

FORMS = {
    "form1": dict(form=1, use_z=True, cond_drop=0.2, z_noise=0.1, augment_noise=0.5, augment_lowres=2),
    "form2": dict(
        form=2,
        continuous=True,
        noise_schedule="linear",
        variance="fixed_large",
        network="dit",
        depth=1,
        heads=2,
        patch=4,
    ),
}
STAGES = {
    "straight": dict(vae="", vae_steps=4, vae_width=4, z_dim=3, sigma=0.5),
    "joint": dict(
        stage="joint",
        vae="",
        vae_width=4,
        z_dim=3,
        stop="encoder",
        lambda_diff=0.5,
        lambda_diff_start=0.0,
        ramp=4,
        target_rate=5.0,
        focal_frequency=0.1,
    ),
    "joint_warm": dict(stage="joint", start_from="form1", use_z=True, vae_lr=0.1, perceptual=0.2),
    "adaptive": dict(stage="adaptive", gate="fixed"),
    "adaptive_warm": dict(stage="adaptive", start_from="straight"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A VAE with a second prior, a refiner of each form, and every stage: the folder."
    out = tmp_path_factory.mktemp("hybrid")
    runs.run("train_vae", out / "vae", **{**TRAIN, "steps": 8}, width=4, z_dim=4)
    runs.run(
        "train_prior",
        out / "flow",
        vae=str(out / "vae"),
        layers=2,
        hidden=8,
        **TRAIN,
        lr=0.3,
        warmup=0,
        ema=0.0,
    )  # far from N(0, I) in a few steps
    for name, own in {**FORMS, **STAGES}.items():
        start = {"start_from": str(out / own["start_from"])} if "start_from" in own else {}
        runs.run(
            "train_diffusevae",
            out / name,
            **{"vae": str(out / "vae"), "width": 8, "T": 20, **TRAIN, **own, **start},
        )
    return out


def models(out, run):
    return records.read_record(out / run)["metrics"]["models"]


@pytest.mark.timeout(300)
def test_what_was_asked_for_was_built(study):
    one, two = (load_system(study / name / "best.safetensors") for name in FORMS)
    assert (one.form, one.use_z, one.cond_drop, one.z_noise) == (1, True, 0.2, 0.1) and set(
        one.augment.largest
    ) == {"noise", "lowres"}
    assert (
        two.form == 2
        and two.augment is None
        and two.process.continuous
        and two.process.variance == "fixed_large"
        and type(two.denoiser).__name__ == "DiT"
    )
    for name in (*FORMS, *STAGES):
        assert (
            records.read_record(study / name)["metrics"]["steps"] == 6
            and (study / name / "pictures.png").is_file()
        )


@pytest.mark.timeout(300)
def test_codes_from_another_prior(study):
    how = dict(prior=str(study / "flow" / "vae.safetensors"), n=40, steps=3, batch_size=16, device="cpu")
    runs.run("evaluate", study / "evaluate_flow", model=str(study / "form1"), name="with_flow", **how)
    assert models(study, "evaluate_flow")["with_flow"]["network_evaluations"] == 4
    flow = load_system(study / "flow" / "vae.safetensors").prior
    form1 = load_system(study / "form1" / "best.safetensors")
    x_hat = torch.from_numpy(np.load(study / "evaluate_flow" / "with_flow_pairs.npy"))[
        0
    ]  # refinements of six steps say too little of theirs
    for prior, same in ((form1.vae.prior, False), (flow, True)):
        form1.vae.prior = prior
        torch.manual_seed(0)
        assert (
            torch.equal(to_uint8(form1.sample_pairs(16, steps=3, spacing="trailing")[0][:12]), x_hat) == same
        )
    with pytest.raises(ValueError, match="draws no codes"):
        execute("evaluate", study / "evaluate_none", model="digits_ddpm", **how)


@pytest.mark.timeout(300)
def test_quality_against_speed(study):
    both, prior = [str(study / name) for name in FORMS], str(study / "flow" / "vae.safetensors")
    how = dict(n=24, batch_size=16, device="cpu")
    runs.run(
        "speed",
        study / "speed",
        models=both,
        steps=[2, 3],
        starts=[0, 9],
        priors=["", prior],
        schedules=[[4, 1e-6, 0.8]],
        samplers=["ddim"],
        shared_noise=True,
        **how,
    )
    found = models(study, "speed")
    assert (
        found["form1 ddim 3"]["network_evaluations"] == 4
        and found["form2 ddim 2 from 9, flow prior"]["n"] == 24
    )
    assert "form2 linear(1e-06, 0.8) 4" in found and not any(
        k.startswith("form1 linear") for k in found
    )  # which has seen indices only
    assert len(found) == 2 * 2 * 2 * 2 + 2
    assert (
        set(found) <= set(comparison.evaluations_of(study)["models"])
        and (study / "speed" / "curves.png").is_file()
    )
    with pytest.raises(ValueError, match="steps must lie in 1 … 20"):
        execute("speed", study / "too_many", models=both, steps=[30], **how)


@pytest.mark.timeout(300)
def test_stages_build_what_they_say(study):
    straight, joint, warm, adaptive, adaptive_warm = (
        load_system(study / name / "best.safetensors") for name in STAGES
    )
    assert straight.vae.z_dim == 3 and (study / "straight" / "vae" / "best.safetensors").is_file()
    assert (joint.stop, joint.lambda_diff.start, joint.lambda_diff.end, joint.vae.objective.of) == (
        "encoder",
        0.0,
        0.5,
        "rate",
    ) and [t.name for t in joint.hybrid.terms] == ["focal_frequency"]
    form1 = load_system(study / "form1" / "best.safetensors")
    assert warm.use_z and not torch.equal(
        warm.vae.decoder.state_dict()["0.weight"], form1.vae.decoder.state_dict()["0.weight"]
    )  # the VAE has learned too
    assert (
        type(adaptive.denoiser.gate).__name__ == "FixedGate"
        and type(adaptive_warm.denoiser.gate).__name__ == "LearnedGate"
    )
    for model in (straight, joint, warm, adaptive, adaptive_warm):
        assert torch.equal(model.sample(2, seeds=[0, 1], steps=2), model.sample(2, seeds=[0, 1], steps=2))


@pytest.mark.timeout(120)
def test_a_start_of_another_form_is_refused(study):
    with pytest.raises(ValueError, match="start_from must be a DiffuseVAE of form 1"):
        execute("train_diffusevae", study / "wrong", start_from=str(study / "form2"), **TRAIN)


@pytest.mark.timeout(300)
def test_effort_in_pairs(study):
    """A loose tolerance saves evaluations, and every set is measured against the full walk; codes come from
    the fitted prior of a joint model.
    """
    runs.run(
        "train_prior", study / "mixture", vae=str(study / "joint"), kind="mixture", components=2, device="cpu"
    )
    prior = study / "mixture" / "vae.safetensors"
    assert type(load_system(prior).prior).__name__ == "MixturePrior"
    how = dict(
        steps=6,
        drifts=[0.5],
        starts=[9],
        tolerance=1.0,
        fitted_on=8,
        buckets=2,
        n=24,
        resamples=10,
        batch_size=16,
        device="cpu",
    )
    runs.run("effort", study / "effort", model=str(study / "joint"), prior=str(prior), **how)
    found, table = models(study, "effort"), records.read_record(study / "effort")["metrics"]["effort"]
    assert found["joint, 6 steps"]["network_evaluations"] == 6 and "fid_change" not in found["joint, 6 steps"]
    fitted = found["joint, fitted"]
    assert (
        0 < fitted["evaluations_over_full"] < 1
        and fitted["fid_change_low"] < fitted["fid_change_high"]
        and table["choices"]
        and len(found) == 4
    )
    with pytest.raises(ValueError, match="refines nothing"):
        execute("effort", study / "of_vae", model=str(study / "vae"), **how)


REFUSED = [
    ("speed", dict(models=["{study}/form1", "{study}/form1"]), "two models have one name"),
    ("speed", dict(models=["{study}/form1"], steps=[2], starts=[0, 20]), "starts must lie in 0 … 19"),
    (
        "speed",
        dict(models=["{study}/form1"], steps=[2], schedules=[[4, 1e-6, 0.8]]),
        "schedules are for models with continuous noise levels",
    ),
    ("speed", dict(models=["{study}/form1"], steps=[2], priors=["", "digits_ddpm"]), "has no prior"),
    (
        "speed",
        dict(models=["{study}/form1"], steps=[2], priors=["{study}/flow/vae.safetensors"] * 2),
        "two sets have one name",
    ),
    ("speed", dict(models=["{study}/form1"], steps=[2], n=-5), "n must be a finite number"),
    (
        "speed",
        dict(models=["{study}/form1", "shapes_diffusevae"], steps=[2]),
        "shapes_diffusevae is built for images of 3 × 32 × 32, and the data's are 1 × 16 × 16",
    ),
    ("effort", dict(model="shapes_diffusevae"), "built for images of 3 × 32 × 32"),
    ("effort", dict(model="{study}/form1", drift=-1.0), "drift must be"),
    ("effort", dict(model="{study}/form1", resamples=0), "resamples must be"),
    ("refine", dict(model="{study}/form1", filtered=0), "filtered must be"),
    ("refine", dict(model="digits_ddpm", prior="digits_vae_flow"), "DDPM refines nothing"),
    ("evaluate", dict(model="baselines", features="none"), "looks at none"),
    ("evaluate", dict(model="shapes_ddpm"), "built for images of 3 × 32 × 32"),
    ("evaluate", dict(model="digits_vae", guidance=1.0), "which nothing guides"),
    (
        "interpolate",
        dict(model="{study}/form1", what="noise", real=True, steps=2, temperature=0.5),
        "at temperature 1",
    ),
    (
        "interpolate",
        dict(model="{study}/form1", what="attribute", attribute="3", real=True, keep=["3"]),
        "cannot be kept",
    ),
    ("train_diffusevae", dict(vae="{study}/vae", perceptual=1.0), "belongs to stage=joint"),
    ("train_diffusevae", dict(vae="{study}/vae", gate="open"), "gate must be one of"),
    ("train_diffusevae", dict(start_from="{study}/adaptive"), "a gate already"),
    ("train_diffusevae", dict(vae="{study}/vae", augment_lowres=0), "lowres"),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("notebook, given, message", REFUSED)
def test_wrong_settings_are_refused(study, tmp_path, notebook, given, message):
    def filled(value):
        if isinstance(value, str):
            return value.format(study=study)
        return [filled(part) for part in value] if isinstance(value, list) else value

    with pytest.raises(ValueError, match=message):
        execute(notebook, tmp_path / "refused", device="cpu", **{k: filled(v) for k, v in given.items()})
    assert records.read_record(tmp_path / "refused")["status"] == "failed"


@pytest.mark.timeout(120)
def test_no_vae_is_trained_for_a_refiner_that_cannot_be_built(study, tmp_path):
    with pytest.raises(ValueError, match="form must be one of 1, 2; got 3"):
        execute("train_diffusevae", tmp_path / "straight", vae="", form=3, **TRAIN)
    assert not (tmp_path / "straight" / "vae").exists()


@pytest.mark.timeout(180)
def test_a_gate_is_held_to_what_is_known(study, tmp_path):
    runs.run(
        "refine",
        tmp_path / "held",
        model=str(study / "adaptive"),
        task="blur",
        severities=[1.0],
        consistent=True,
        n=4,
        steps=2,
        averaged=0,
        features="none",
        device="cpu",
    )
    assert len(models(tmp_path, "held")) == 6


@pytest.mark.timeout(180)
def test_a_diffusevae_is_measured_without_looking(study, tmp_path):
    runs.run(
        "evaluate", tmp_path / "unseen", model=str(study / "form1"), features="none", steps=2, device="cpu"
    )
    assert models(tmp_path, "unseen") == {"form1": {}}
