"""What pip and the build read; every value stands in settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE", "LICENSE-lessons"],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    # the run notebooks and recipes are the package's data by this mapping: nbs/runs is their only copy
    packages=[*find_packages(include=["diffusevae", "diffusevae.*"]), "diffusevae.notebooks"],
    package_dir={"diffusevae.notebooks": "nbs/runs"},
    package_data={
        "diffusevae": ["weights/*.safetensors", "weights/*.json", "weights/*.md"],
        "diffusevae.notebooks": ["*.ipynb", "recipes/*.yaml"],
    },
    zip_safe=False,
)
