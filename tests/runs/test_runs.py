"""Whole runs through papermill at tiny sizes: what they leave, how they fail, how they go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, execute

from diffusevae.cli import main
from diffusevae.core import records, runs
from diffusevae.core.checkpoints import load_system, load_tensors
from diffusevae.core.parameters import find_notebook, parameters_of

MODELS = ("vae", "ddpm", "form1", "form2")


def tree(folder):
    "Every file below a folder with its time and size: equal before and after means that nothing was touched."
    return {
        p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


def test_study_leaves_all_it_promises(tiny_study):
    for name in ("report.html", "report.pdf", "results.json", *(f"samples/{m}.npy" for m in (*MODELS, "G"))):
        assert (tiny_study / name).is_file(), name
    models = json.loads((tiny_study / "results.json").read_text())["models"]
    assert set(MODELS) | {"G", "floor_bootstrap", "floor_test"} == set(models)
    for name, figures in models.items():
        assert {"fid", "inception_score", "precision", "recall", "n"} <= set(figures), name
        assert figures["fid"] > -1e-3 and 0 <= figures["precision"] <= 1 and figures["n"] > 0
    assert models["ddpm"]["network_evaluations"] == 3 and models["vae"]["network_evaluations"] == 1
    assert models["form1"]["network_evaluations"] == 4  # three of the denoiser, one of the decoder
    assert models["form2"]["seconds_per_1000"] > 0


def test_samples_are_kept_as_uint8_nchw(tiny_study):
    for m in MODELS:
        samples = np.load(tiny_study / f"samples/{m}.npy", allow_pickle=False)
        assert samples.dtype == np.uint8 and samples.shape == (40, 1, 16, 16), m


@pytest.mark.parametrize("name", ["vae", "ddpm", "form1", "form2", "evaluate_ddpm", "report"])
def test_record_says_everything(tiny_study, name):
    record = records.read_record(tiny_study / name)
    assert record["status"] == "completed" and record["error"] is None
    assert record["start"] <= record["heartbeat"] <= record["end"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        record["versions"]["torch"]
    )
    assert set(record["git"]) == {"commit", "dirty"} and record["device"]
    for artefact in record["artefacts"].values():
        assert (tiny_study / name / artefact).is_file(), artefact
    assert (tiny_study / name / f"{record['notebook']}.ipynb").is_file()
    assert record["parameters"].keys() == parameters_of(find_notebook(record["notebook"])).keys()


def test_training_run_leaves_logs_and_checkpoints(tiny_study):
    folder = tiny_study / "ddpm"
    assert list((folder / "tensorboard").glob("events*"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10, 12] and "validation_loss" in rows[-1]
    assert load_tensors(folder / "last.safetensors")[1]["step"] == 12
    assert load_system(folder / "best.safetensors").sample(2, steps=2).shape == (2, 1, 16, 16)


def test_complete_study_is_not_run_again(tiny_study, capsys):
    before = tree(tiny_study)
    started = time.perf_counter()
    assert main(["study", str(tiny_study.parent / "tiny.yaml"), "--out", str(tiny_study)]) == 0
    said = capsys.readouterr().out
    assert "complete already" in said and "to start over" in said
    assert time.perf_counter() - started < 5
    assert {k: v for k, v in tree(tiny_study).items() if k.name != "record.json" or k.parent.name} == {
        k: v for k, v in before.items() if k.name != "record.json" or k.parent.name
    }


def test_finished_studies_are_compared(tiny_study, tmp_path, capsys):
    assert main(["compare", str(tiny_study), str(tiny_study), "--out", str(tmp_path / "compared.json")]) == 0
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert set(MODELS) | {"G"} <= set(compared["models"]) and compared["models"]["ddpm"]["fid"]["std"] == 0
    assert set(compared["studies"][0]["training"]) == set(MODELS) and "form2: fid" in capsys.readouterr().out


def test_report_from_records_alone_marks_the_gap(tiny_study, tmp_path):
    study = tmp_path / "copy"
    shutil.copytree(tiny_study, study)
    (study / "evaluate_form1" / "record.json").unlink()
    shutil.rmtree(study / "report")
    runs.run("report", study / "report", study=str(study))
    html = (study / "report.html").read_text()
    assert "Missing:" in html and "evaluate_form1" in html
    assert "form1" not in json.loads((study / "results.json").read_text())["models"]
    whole = (tiny_study / "report.html").read_text()
    assert "Missing:" not in whole and whole.count("data:image/png") == 5
    assert html.count("data:image/png") == 5


KILLER = """
import os, sys, signal, threading, time, json
from pathlib import Path
from diffusevae.core import runs
def kill():
    while True:
        try:
            r = json.loads((Path(sys.argv[1]) / "record.json").read_text())
            if (r["progress"] or {}).get("step", 0) >= int(sys.argv[2]):
                os.kill(r["pid"], signal.SIGKILL); return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
threading.Thread(target=kill, daemon=True).start()
try:
    runs.run("train_ddpm", sys.argv[1], **json.loads(sys.argv[3]))
except runs.RunFailed as e:
    print(e); sys.exit(3)
"""


@pytest.mark.timeout(240)
def test_killed_kernel_says_so_and_resumes_bit_for_bit(tmp_path):
    parameters = {
        **TINY["train_ddpm"],
        "steps": 160,
        "checkpoint_every": 25,
        "validate_every": 50,
        "width": 32,
        "batch_size": 64,
    }
    command = [sys.executable, "-c", KILLER, str(tmp_path / "killed"), "40", json.dumps(parameters)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "was killed" in done.stdout, done.stdout + done.stderr
    record = records.read_record(tmp_path / "killed")
    assert record["status"] == "killed" and "killed" in record["error"]
    step = load_tensors(tmp_path / "killed" / "last.safetensors")[1]["step"]
    assert 0 < step < 160
    assert runs.run("train_ddpm", tmp_path / "killed", **parameters)["status"] == "completed"
    runs.run("train_ddpm", tmp_path / "undisturbed", **parameters)
    for name in ("last", "best"):
        a, b = (
            load_tensors(tmp_path / folder / f"{name}.safetensors")[0] for folder in ("killed", "undisturbed")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    logs = [
        (tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("killed", "undisturbed")
    ]
    assert [json.loads(r)["loss"] for r in logs[0]] == [json.loads(r)["loss"] for r in logs[1]]


def test_killed_command_leaves_a_record_that_reads_killed(tmp_path):
    "Not the kernel alone but everything dies: nobody is left to write, and the record still tells."
    parameters = {**TINY["train_vae"], "steps": 100_000}
    words = [f"-p{k}={v}" for k, v in parameters.items()]
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from diffusevae.cli import main; sys.exit(main())",
            "run",
            "train_vae",
            "--out",
            str(tmp_path / "run"),
            *words,
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            record = records.read_record(tmp_path / "run")
            if record and (record["progress"] or {}).get("step", 0) > 20:
                break
            time.sleep(0.1)
        assert record["status"] == "running"
    finally:
        os.kill(record["pid"], signal.SIGKILL)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for _ in range(100):  # a killed process takes its time to be gone
        if (status := records.read_record(tmp_path / "run")["status"]) == "killed":
            break
        time.sleep(0.1)
    assert status == "killed"


BAD = {
    "unknown parameter": ("train_vae", dict(stpes=3), "did you mean 'steps'"),
    "wrong type": ("train_vae", dict(steps="3"), "steps must be int"),
    "unknown notebook": ("train_vea", dict(), "no notebook 'train_vea'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_fail_before_a_kernel_starts(tmp_path, case):
    notebook, parameters, sentence = BAD[case]
    started = time.perf_counter()
    with pytest.raises(ValueError, match=sentence):
        runs.run(notebook, tmp_path / "run", **parameters)
    assert time.perf_counter() - started < 2
    if case != "unknown notebook":
        record = records.read_record(tmp_path / "run")
        assert record["status"] == "failed" and sentence in record["error"]
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["record.json"]


FAULTS = {
    "unknown data set": ("train_vae", dict(data="digts"), "no data set 'digts'"),
    "folder without images": ("train_vae", dict(data="folder:{tmp}"), "no images in"),
    "unknown features": ("evaluate", dict(features="digit"), "digit"),
    "missing checkpoint": ("evaluate", dict(model="{tmp}/nowhere"), "no checkpoint and no shipped model"),
    "truncated checkpoint": ("evaluate", dict(model="{tmp}/short.safetensors"), "truncated"),
    "architecture": ("train_diffusevae", dict(vae="{study}/ddpm"), "VAE"),
}


def filled_fault(case, tmp_path, tiny_study):
    "The notebook, parameters and sentence of a fault, at tiny sizes, with the paths of this test."
    notebook, parameters, sentence = FAULTS[case]
    (tmp_path / "short.safetensors").write_bytes((tiny_study / "vae" / "best.safetensors").read_bytes()[:900])
    paths = {name: value.format(tmp=tmp_path, study=tiny_study) for name, value in parameters.items()}
    return notebook, {**TINY[notebook], **paths}, sentence


def left_as_a_failure(folder, sentence):
    "Whether a run has left a failed record with this sentence, and no file that could be taken for a result."
    record = records.read_record(folder)
    half_written = [*folder.rglob("*.safetensors"), *folder.rglob("*.part")]
    return record["status"] == "failed" and sentence in record["error"] and not half_written


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_raised_and_leaves_a_failed_record(tmp_path, tiny_study, case):
    notebook, parameters, sentence = filled_fault(case, tmp_path, tiny_study)
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        execute(notebook, tmp_path / "run", **parameters)
    assert left_as_a_failure(tmp_path / "run", sentence)


@pytest.mark.parametrize("case", ["unknown data set", "truncated checkpoint"])
def test_a_fault_inside_a_kernel_is_one_sentence_on_the_command_line(tmp_path, tiny_study, case, capsys):
    notebook, parameters, sentence = filled_fault(case, tmp_path, tiny_study)
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    assert main(["run", notebook, "--out", str(tmp_path / "run"), *words]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said and "Traceback" not in said
    assert left_as_a_failure(tmp_path / "run", sentence)


def test_folder_of_another_run_is_not_touched(tiny_study, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(tiny_study / "vae", folder)
    before = tree(folder)
    with pytest.raises(ValueError, match="holds another run"):
        runs.run("train_vae", folder, **{**TINY["train_vae"], "steps": 13})
    assert {k: v for k, v in tree(folder).items() if k.name != "record.refused.json"} == before
    assert json.loads((folder / "record.refused.json").read_text())["status"] == "failed"


def test_bare_papermill_checks_parameters_too(tmp_path):
    import papermill

    path, out = find_notebook("train_vae"), tmp_path / "out.ipynb"
    for bad, sentence in (({"stpes": 3}, "did you mean 'steps'"), ({"steps": "3"}, "steps must be int")):
        run_dir = tmp_path / next(iter(bad))
        with pytest.raises(papermill.PapermillExecutionError, match=sentence):
            papermill.execute_notebook(
                path, out, parameters={"run_dir": str(run_dir), **bad}, progress_bar=False
            )
        record = records.read_record(run_dir)
        assert record["status"] == "failed" and sentence in record["error"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bare_papermill_runs_to_the_end(tmp_path):
    import papermill

    papermill.execute_notebook(
        find_notebook("train_vae"),
        tmp_path / "out.ipynb",
        parameters={**TINY["train_vae"], "run_dir": str(tmp_path / "run")},
        progress_bar=False,
    )
    assert records.read_record(tmp_path / "run")["status"] == "completed"


def test_training_on_a_folder_of_colour_images_with_an_unreadable_one(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in ("a", "b"):
            (tmp_path / "data" / split / c).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(rng.integers(0, 255, (20, 26, 3), dtype=np.uint8)).save(
                    tmp_path / "data" / split / c / f"{i}.png"
                )
    (tmp_path / "data" / "train" / "a" / "broken.png").write_bytes(b"no picture")
    record = runs.run(
        "train_vae",
        tmp_path / "run",
        **{**TINY["train_vae"], "data": f"folder:{tmp_path / 'data'}", "size": 16},
    )
    assert record["status"] == "completed"
    assert "broken.png" in (tmp_path / "run" / "train_vae.ipynb").read_text()


def test_read_only_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    assert main(["run", "train_vae", "--out", str(tmp_path / "file" / "run")]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the full device of Linux")
def test_full_disk_in_the_middle_of_training_keeps_the_last_good_state(tmp_path, monkeypatch):
    from diffusevae.autoencoders.vae import VAE
    from diffusevae.core import checkpoints, images, training

    settings = training.Settings(steps=20, batch_size=8, checkpoint_every=5, validation=0.0, device="cpu")
    data = images.load("digits")[:32]

    def full(*_):
        raise OSError(28, "No space left on device")

    steps = training.train(VAE(16, width=8, z_dim=2), data, settings, tmp_path)
    with pytest.raises(OSError, match="cannot write .*last.safetensors"):
        for progress in steps:
            if progress.step == 7:
                good = (tmp_path / "last.safetensors").read_bytes()
                monkeypatch.setattr(checkpoints.os, "replace", full)
    assert progress.step == 9
    assert (tmp_path / "last.safetensors").read_bytes() == good
    assert not list(tmp_path.glob(".*part"))
