"""Every widget of the notebooks in the real thing: JupyterLab in a browser runs the notebook, a mouse drags the slider, and another picture comes within a second."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent / "nbs"
NAMED = {"forward", "trajectory", "walk", "refine", "traversal", "layers", "clouds", "swap"}  # what the lessons promise, whatever else there is

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")


def code_cells(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def widgets_of(path):
    return re.findall(r"^(widget_\w+) = ", "\n".join(code_cells(path)), re.M)


NOTEBOOKS = [p for p in sorted(NBS.glob("[0-9]_*/*.ipynb")) if widgets_of(p)]


def test_the_promised_widgets_are_there():
    assert {f"widget_{name}" for name in NAMED} <= {w for p in NOTEBOOKS for w in widgets_of(p)}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks: its address."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(NBS, home / "nbs", ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))
    tracker = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # cells out of sight are drawn too
    address = f"http://127.0.0.1:{(port := free_port())}"
    options = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={home / 'nbs'}", f"--LabApp.user_settings_dir={home / 'settings'}",
               "--IdentityProvider.token=", "--no-browser", "--expose-app-in-browser", "--allow-root"]  # fmt: skip
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api/status").close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise RuntimeError(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
            yield address
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def browser():
    "Chromium or Chrome as the system has it, or the one that playwright has installed."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as e:
            pytest.skip(f"no browser: install chromium, or say `playwright install chromium` ({str(e).splitlines()[0]})")
        yield chromium
        chromium.close()


RUN = "async () => { const app = window.jupyterapp; await app.commands.execute('notebook:run-all-cells'); }"
PIXELS = """image => { const c = document.createElement('canvas'); c.width = image.naturalWidth; c.height = image.naturalHeight;
    c.getContext('2d').drawImage(image, 0, 0); return c.width * c.height ? c.toDataURL() : ''; }"""
BOX = ".widget-vbox:has(> img.widget-image), .widget-vbox:has(> .widget-image)"


def another_picture(image, before, seconds):
    "The picture that comes in place of `before`, and after how long; fails after `seconds`."
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if (now := image.evaluate(PIXELS)) and now != before:
            return now, time.monotonic() - started
        time.sleep(0.02)
    raise AssertionError(f"the picture did not change within {seconds} s")


def move(page, knob):
    "Drag a slider to its other end, or choose another entry of a menu."
    if (menu := knob.locator("select")).count():
        menu.select_option(index=0 if menu.evaluate("e => e.selectedIndex") else 1)
        return
    track, handle = knob.locator(".noUi-base").bounding_box(), knob.locator(".noUi-handle").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    x = handle["x"] + handle["width"] / 2
    right = x < track["x"] + track["width"] / 2
    page.mouse.move(x, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + (track["width"] - 1 if right else 1), middle, steps=2)
    page.mouse.up()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_widgets_answer_a_mouse_within_a_second(path, lab, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(120_000)
    try:
        page.goto(f"{lab}/lab/tree/{path.relative_to(NBS)}?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'")
        page.evaluate(RUN)
        errors = page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']:has-text('Traceback')")
        assert not errors.count(), errors.first.inner_text()
        boxes = page.locator(BOX)
        page.wait_for_function(f"() => document.querySelectorAll(\"{BOX}\").length >= {len(widgets_of(path))}")
        assert boxes.count() == len(widgets_of(path))
        for i in range(boxes.count()):
            box = boxes.nth(i)
            box.scroll_into_view_if_needed()
            image, knobs = box.locator("img"), box.locator("> .widget-inline-hbox")
            before = image.evaluate(PIXELS)
            assert knobs.count() and before
            for k in range(knobs.count()):
                for _ in range(3):  # another test on the machine may have been in the way
                    move(page, knobs.nth(k))
                    before, seconds = another_picture(image, before, 10)
                    if seconds < 1:
                        break
                assert seconds < 1, f"{widgets_of(path)[i]}, knob {k}: {seconds:.2f} s"
    finally:
        page.evaluate("async () => { await window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown() }")
        page.close()
