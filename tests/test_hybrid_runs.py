"""The run notebooks of the hybrid rooms at tiny sizes: both forms with all their settings, other priors, and quality against speed."""

import pytest

from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system
from diffusevae.evaluation import comparison

TRAIN = dict(steps=6, batch_size=16, checkpoint_every=3, validate_every=3, log_every=2, device="cpu")
FORMS = {
    "form1": dict(form=1, use_z=True, cond_drop=0.2, z_noise=0.1, augment_noise=0.5, augment_lowres=2),
    "form2": dict(form=2, continuous=True, noise_schedule="linear", variance="fixed_large", network="dit", depth=1, heads=2, patch=4),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A VAE with two more priors, and a refiner of each form: the folder."
    out = tmp_path_factory.mktemp("hybrid")
    runs.run("train_vae", out / "vae", **{**TRAIN, "steps": 8}, width=4, z_dim=4)
    runs.run("train_prior", out / "flow", vae=str(out / "vae"), layers=2, hidden=8, **TRAIN)
    runs.run("train_prior", out / "mixture", vae=str(out / "vae"), kind="mixture", components=2, **TRAIN)
    for name, own in FORMS.items():
        runs.run("train_diffusevae", out / name, vae=str(out / "vae"), width=8, T=20, **TRAIN, **own)
    return out


def models(out, run):
    return records.read_record(out / run)["metrics"]["models"]


@pytest.mark.timeout(300)
def test_what_was_asked_for_was_built(study):
    one, two = (load_system(study / name / "best.safetensors") for name in FORMS)
    assert (one.form, one.use_z, one.cond_drop, one.z_noise) == (1, True, 0.2, 0.1) and set(one.augment.largest) == {"noise", "lowres"}
    assert two.form == 2 and two.augment is None and two.process.continuous and two.process.variance == "fixed_large" and type(two.denoiser).__name__ == "DiT"
    for name in FORMS:
        assert records.read_record(study / name)["metrics"]["steps"] == 6 and (study / name / "pictures.png").is_file()


@pytest.mark.timeout(300)
def test_codes_from_another_prior(study):
    common = dict(n=40, steps=3, batch_size=16, device="cpu")
    for name, prior in (("own", ""), ("flow", str(study / "flow" / "vae.safetensors")), ("mixture", str(study / "mixture" / "vae.safetensors"))):
        runs.run("evaluate", study / f"evaluate_{name}", model=str(study / "form1"), name=name, prior=prior, **common)
    found = {name: models(study, f"evaluate_{name}")[name] for name in ("own", "flow", "mixture")}
    assert len({f["fid"] for f in found.values()}) == 3 and all(f["network_evaluations"] == 4 for f in found.values())
    with pytest.raises(runs.RunFailed, match="draws no codes"):
        runs.run("evaluate", study / "evaluate_none", model="digits_ddpm", prior=str(study / "flow" / "vae.safetensors"), **common)


@pytest.mark.timeout(300)
def test_quality_against_speed(study):
    both, prior = [str(study / name) for name in FORMS], str(study / "flow" / "vae.safetensors")
    how = dict(n=24, batch_size=16, device="cpu")
    runs.run("speed", study / "speed", models=both, steps=[2, 3], starts=[0, 9], priors=["", prior], schedules=[[4, 1e-6, 0.8]], samplers=["ddim"], shared_noise=True, **how)
    found = models(study, "speed")
    assert found["form1 ddim 3"]["network_evaluations"] == 4 and found["form2 ddim 2 from 9, flow prior"]["n"] == 24
    assert "form2 linear(1e-06, 0.8) 4" in found and not any(k.startswith("form1 linear") for k in found)  # which has seen indices only
    assert len(found) == 2 * 2 * 2 * 2 + 2
    assert set(found) <= set(comparison.collect(study)["models"]) and (study / "speed" / "curves.png").is_file()
    with pytest.raises(runs.RunFailed, match="steps must lie in 1 … 20"):
        runs.run("speed", study / "too_many", models=both, steps=[30], **how)
    with pytest.raises(runs.RunFailed, match="has no steps; give diffusion models"):
        runs.run("speed", study / "no_steps", models=["digits_vae"], **how)
