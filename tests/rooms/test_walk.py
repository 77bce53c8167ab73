"""A walk as one object: its keywords reach the sampler, and wrong ones are refused where they are typed."""

import pytest
import torch
from tiny import awake

from diffusevae.autoencoders.vae import VAE
from diffusevae.core import parameters
from diffusevae.diffusion import samplers
from diffusevae.diffusion.ddpm import DDPM
from diffusevae.diffusion.process import Diffusion
from diffusevae.diffusion.samplers import Walk
from diffusevae.diffusion.schedules import Schedule, cosine
from diffusevae.diffusion.unet import UNet
from diffusevae.hybrid.diffusevae import DiffuseVAE

# a value other than the default for each keyword, with a sampler that knows it
OTHER = {
    "steps": ("ddim", 7),
    "spacing": ("heun", "trailing"),
    "start": ("dpm_solver", 12),
    "clip": ("ddpm", 0.9),
    "eta": ("ddim", 0.5),
    "step_temperature": ("ddpm", 0.3),
}


def unet(image_channels=0, dropout=0.0):
    "A tiny network that answers something."
    torch.manual_seed(0)
    return awake(UNet(8, width=8, multipliers=(1,), image_channels=image_channels, dropout=dropout))


def process():
    return Diffusion(Schedule(cosine(20)), "v")


def systems(dropout=0.0):
    "A DDPM and DiffuseVAE in both forms, in training mode."
    vae = VAE(8, z_dim=2, width=4)
    yield DDPM(unet(dropout=dropout), process()).train()
    for form in (1, 2):
        yield DiffuseVAE(vae, unet(1, dropout), process(), form).train()


def test_every_keyword_is_tried():
    assert {*OTHER, "sampler", "temperature"} == set(Walk())


@pytest.mark.parametrize("name", OTHER)
def test_every_keyword_reaches_its_sampler(name, monkeypatch):
    sampler, value = OTHER[name]
    heard = {}
    original = samplers.samplers_by_name[sampler]

    def listening(model, process, x_T, **keywords):
        heard.update(keywords)
        return original(model, process, x_T, **keywords)

    listening.__kwdefaults__ = original.__kwdefaults__
    monkeypatch.setitem(samplers.samplers_by_name, sampler, listening)
    keywords = {"steps": 3, name: value}
    for system in systems():
        heard.clear()
        system.sample(2, sampler=sampler, seeds=[0, 1], **keywords)
        assert heard[name] == value and heard["seeds"] == [0, 1]


@pytest.mark.parametrize("sampler", samplers.samplers_by_name)
def test_the_temperature_scales_the_starting_noise(sampler):
    noise = torch.randn(2, 1, 8, 8)
    for system in systems():
        cold = system.sample(2, sampler=sampler, steps=3, seeds=[0, 1], noise=noise, temperature=0.5)
        halved = system.sample(2, sampler=sampler, steps=3, seeds=[0, 1], noise=0.5 * noise)
        assert torch.equal(cold, halved)


def test_dropout_is_off_while_a_system_samples():
    for system in systems(dropout=0.5):
        first = system.sample(4, steps=3, seeds=range(4))
        assert system.training
        assert torch.equal(system.sample(4, steps=3, seeds=range(4)), first)
        assert torch.equal(system.eval().sample(4, steps=3, seeds=range(4)), first)


def test_a_walk_is_refused_where_it_is_typed():
    for system in systems():
        with pytest.raises(TypeError, match="a walk has no 'stpes', did you mean 'steps'?"):
            system.sample(2, stpes=3)
        with pytest.raises(ValueError, match="eta=0.5 means nothing to the sampler heun"):
            system.sample(2, sampler="heun", eta=0.5)
        with pytest.raises(ValueError, match="sampler must be one of"):
            system.sample(2, sampler="euler")


def test_a_record_keeps_a_walk_as_plain_values():
    walk = Walk(sampler="ddpm", steps=9, clip=0.99)
    assert Walk(**dict(walk)) == walk
    plain = (*parameters.parameter_kinds, type(None))
    assert all(type(value) in plain for value in walk.values())
