"""Shipped models go on drawing what they drew: eight images of each, kept as bytes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffusevae import pretrained, to_uint8

BEFORE = Path(__file__).resolve().parents[1] / "made_before"
IMAGES = load_file(BEFORE / "shipped_images.safetensors")
WALKS = json.loads((BEFORE / "shipped_images.json").read_text())["how"]


def share_within_a_level(drawn, kept):
    "The share of pixels of two uint8 tensors that differ by at most one grey level."
    return float(((drawn.int() - kept.int()).abs() <= 1).float().mean())


@pytest.mark.parametrize("name", IMAGES)
def test_a_shipped_model_draws_what_it_drew(name):
    drawn = to_uint8(pretrained(name).sample(8, **WALKS[name]))
    kept = IMAGES[name]
    assert drawn.shape == kept.shape
    assert share_within_a_level(drawn, kept) >= 0.999


def test_another_draw_would_be_noticed():
    name = next(iter(IMAGES))
    walk = {**WALKS[name], "seeds": [seed + 1 for seed in WALKS[name]["seeds"]]}
    drawn = to_uint8(pretrained(name).sample(8, **walk))
    assert share_within_a_level(drawn, IMAGES[name]) < 0.9
