"""`from diffusevae import NAME`: every public name, quickly, and a sentence for a name that is not there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import diffusevae

PACKAGE = Path(diffusevae.__file__).parent

PROMISED = """
AutoEncoder VAE HierarchicalVAE GAN VAEGAN VQVAE KLAutoEncoder
Schedule Diffusion UNet DiT Cond DDPM LatentDiffusion
DiffuseVAE JointDiffuseVAE AdaptiveDiffuseVAE
ImageSet Batch Settings train load pretrained evaluate
linear cosine sigmoid quadratic ddpm ddim dpm_solver heun cfg shifted make_denoiser preset
"""


def modules_of_the_package():
    "Dotted names of all modules that export something."
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in ("__init__.py", "_modidx.py"):
            yield ".".join(["diffusevae", *path.relative_to(PACKAGE).with_suffix("").parts])


def run_python(code):
    "Execute code in a fresh interpreter; what it printed."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_found_and_is_the_one_of_its_room():
    for name in modules_of_the_package():
        module = importlib.import_module(name)
        for public in module.__all__:
            assert getattr(diffusevae, public) is getattr(module, public), f"{public} of {name}"


def test_what_users_ask_for_first_is_there():
    assert not set(PROMISED.split()) - set(dir(diffusevae))


def test_load_is_that_of_images():
    from diffusevae.core import checkpoints, images

    assert diffusevae.load is images.load
    assert "load" not in checkpoints.__all__ and checkpoints.load is checkpoints.load_tensors


def test_a_chapter_is_imported_when_it_is_asked_for():
    assert run_python("import diffusevae; print(diffusevae.core.__name__)").split() == ["diffusevae.core"]


@pytest.mark.parametrize("statement", ["from diffusevae import Walkk", "import diffusevae; diffusevae.Walkk"])
def test_who_asks_for_what_is_not_there_is_told_what_there_is(statement):
    with pytest.raises((ImportError, AttributeError)) as refusal:
        exec(statement, {})
    sentence = str(refusal.value)
    assert "no 'Walkk'" in sentence
    assert all(room in sentence for room in ("pixels", "samplers", "metrics", "diffusevae", "report"))


def test_a_misspelt_name_is_answered_with_what_comes_near():
    with pytest.raises(ImportError, match="did you mean DDPM"):
        exec("from diffusevae import DDMP", {})


def test_hasattr_and_getattr_work_as_for_any_module():
    assert hasattr(diffusevae, "DDPM") and not hasattr(diffusevae, "Walkk")
    assert getattr(diffusevae, "Walkk", None) is None


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "numpy", "matplotlib", "scipy", "sklearn", "torchvision", "yaml", "PIL"}
    found = run_python(
        "import sys, diffusevae; print(*{name.partition('.')[0] for name in sys.modules})"
    ).split()
    assert not heavy & set(found)


def test_the_first_example_of_the_readme_is_short():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in readme.split("```")[1::2] if "from diffusevae import" in block]
    lines = [line for line in blocks[0].splitlines() if line.strip() and line.strip() != "python"]
    imports = [
        node
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert len(lines) <= 10 and len(imports) == 1
