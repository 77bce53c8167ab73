"""What tests of several rooms are made of: tiny images and networks, parameters of runs, a recipe."""

import json

import torch
from torch import nn

from diffusevae.core.parameters import find_notebook
from diffusevae.core.pixels import ImageSet
from diffusevae.core.training import train

# a training that is over at once, for the parameters of any run notebook that trains
TRAIN = dict(steps=6, batch_size=16, checkpoint_every=3, validate_every=3, log_every=2, device="cpu")

# for the Settings of a training in the test's own process: all but its steps and what happens every few
BRIEF = dict(batch_size=4, lr=1e-2, warmup=0, ema=0.5, validation=0.25, device="cpu")

# a training whose last checkpoint lies within it, not at its end
_INTERRUPTIBLE = dict(
    steps=12, batch_size=16, checkpoint_every=5, validate_every=6, log_every=2, device="cpu"
)
TINY = {
    "train_vae": dict(_INTERRUPTIBLE, width=8, z_dim=4),
    "train_ddpm": dict(_INTERRUPTIBLE, width=16, T=20),
    "train_diffusevae": dict(_INTERRUPTIBLE, width=16, T=20),
    "evaluate": dict(n=40, steps=3, batch_size=16, device="cpu"),
}


# ---------------------------------------------------------------- images


def random_images(n, channels=1, size=8, seed=1, reach=1.0):
    "Images `(n, channels, size, size)` whose pixels are uniform between -reach and reach."
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator) * (2 * reach) - reach


def squares(channels=1, n=16, labels=False):
    "An ImageSet of bright squares on black, at random places; labels say whether they are in the upper half."
    x = torch.zeros(n, channels, 8, 8, dtype=torch.uint8)
    corners = torch.randint(0, 5, (n, 2), generator=torch.Generator().manual_seed(1))
    for image, (i, j) in zip(x, corners.tolist()):
        image[:, i : i + 4, j : j + 4] = 230
    return ImageSet(x, (corners[:, 0] > 1).long() if labels else None, ("upper", "lower"))


# ---------------------------------------------------------------- networks


def awake(net, std=0.2):
    "Random numbers where a fresh network has zeros, so that its output depends on all of its inputs."
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return net


def shaken(net, std=0.1):
    "The same network with noise on all parameters, in evaluation mode: fresh ones answer zero."
    for parameter in net.parameters():
        parameter.data.add_(std * torch.randn_like(parameter))
    return net.eval()


class LabelListener(nn.Module):
    "A class-conditional denoiser: answers with a multiple of x_t; `heard` notes the labels that it was told."

    config = {}  # it is trained, and never rebuilt
    channels = 1
    image_channels = 0
    outputs = 1
    takes = {"image": None, "z": None, "label": ()}

    def __init__(self, classes=3, size=4):
        super().__init__()
        self.classes = classes
        self.size = size
        self.weight = nn.Parameter(torch.ones(1))
        self.heard = []

    def forward(self, x, t, cond=None):
        self.heard.append(None if cond is None else cond.label)
        return self.weight * x


# ---------------------------------------------------------------- trainings and studies


def progress_of(system, images, settings, run_dir):
    "All progress records of a training, run to its end."
    return list(train(system, images, settings, run_dir))


def execute(notebook, run_dir, **parameters):
    """Run the code of a run notebook in this process: no kernel, and an error comes as it was raised.

    The record in `run_dir` ends as papermill's would. Returns what the notebook has defined, by name.
    """
    cells = json.loads(find_notebook(notebook).read_text(encoding="utf-8"))["cells"]
    namespace = {}
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), notebook, "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(parameters, run_dir=str(run_dir))
    except Exception as error:
        if "run" in namespace:
            namespace["run"].fail(error)
        raise
    return namespace


def tiny_recipe(path):
    "A recipe with the demo's runs at tiny sizes, written to `path`, JSON being YAML too."

    def run(notebook, **parameters):
        return {"notebook": notebook, "parameters": {**TINY.get(notebook, {}), **parameters}}

    runs = {
        "vae": run("train_vae"),
        "ddpm": run("train_ddpm"),
        "form1": run("train_diffusevae", vae="$study/vae", form=1),
        "form2": run("train_diffusevae", vae="$study/vae", form=2),
        "evaluate_baselines": run("evaluate", model="baselines", samples="$study/samples"),
    }
    for model in ("vae", "ddpm", "form1", "form2"):
        runs[f"evaluate_{model}"] = run("evaluate", model=f"$study/{model}", samples="$study/samples")
    runs["report"] = run("report", study="$study", title="A tiny study")
    path.write_text(json.dumps({"runs": runs}, indent=1))
    return path
