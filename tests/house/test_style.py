"""The style that a formatter and a linter hold, over notebooks, tests and scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["nbs", "tests", ".ci", "setup.py"]


@pytest.mark.parametrize("command", [["format", "--check"], ["check", "--output-format", "concise"]], ids=str)
def test_ruff_has_nothing_to_say(command):
    ruff = Path(sys.executable).parent / "ruff"
    done = subprocess.run([ruff, *command, *SOURCES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_formatter_is_kept_out_of_nothing():
    files = [path for folder in ("nbs", "tests", ".ci") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".ipynb")}
    directive = "# fmt" + ":"
    assert not [str(path) for path, text in texts.items() if directive in text]
