"""Files that an earlier version wrote: a checkpoint of every class at its old place, a killed run, a
record.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusevae.core.checkpoints import build, load_system, load_tensors, moved_classes
from diffusevae.core.records import read_record
from diffusevae.core.runs import run

BEFORE = Path(__file__).resolve().parents[1] / "made_before"
PLACES = json.loads((BEFORE / "old_places.json").read_text())["files"]
RUN = json.loads((BEFORE / "old_run.json").read_text())


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_of_each_old_place_loads(place):
    path = BEFORE / "old_places" / f"{place}.safetensors"
    tensors, info = load_tensors(path)
    if PLACES[place]["only_config"]:  # the smallest instance of this class is too large to keep
        assert type(build(info["config"])).__name__ == place.rpartition(".")[2]
        return
    system = load_system(path)
    own = system.state_dict()
    assert type(system).__name__ == place.rpartition(".")[2]
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


def test_every_moved_class_is_among_them():
    inside = set(PLACES).union(*(told["classes_inside"] for told in PLACES.values()))
    assert {name.removeprefix("diffusevae.") for name in moved_classes} <= inside


@pytest.fixture
def old_run(tmp_path):
    "A copy of the killed run to go on in."
    return Path(shutil.copytree(BEFORE / "old_run", tmp_path / "run"))


def test_a_run_that_was_killed_goes_on(old_run):
    "The gradient's norm is summed in another order since, so losses agree to rounding, not to the bit."
    record = run("train_vae", old_run, **RUN["parameters"])
    assert record["status"] == "completed"

    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    losses = {str(row["step"]): row["loss"] for row in rows}
    assert losses == pytest.approx(RUN["losses_undisturbed"], rel=1e-4)

    ours, _ = load_tensors(old_run / "best.safetensors")
    theirs, _ = load_tensors(BEFORE / "old_run_done" / "best.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_it_went_on_where_it_was_and_did_not_start_over(old_run):
    before = (old_run / "metrics.jsonl").read_text().splitlines()
    run("train_vae", old_run, **RUN["parameters"])
    after = (old_run / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before)] == before and len(after) > len(before)


def test_a_complete_run_is_not_run_again(tmp_path):
    folder = Path(shutil.copytree(BEFORE / "old_run_done", tmp_path / "run"))
    before = (folder / "record.json").read_text()
    assert run("train_vae", folder, **RUN["parameters"])["status"] == "completed"
    assert (folder / "record.json").read_text() == before


def test_an_old_record_is_read():
    record = read_record(BEFORE / "old_run_done")
    assert record["status"] == "completed" and record["parameters"]["steps"] == RUN["parameters"]["steps"]
    assert record["metrics"]
