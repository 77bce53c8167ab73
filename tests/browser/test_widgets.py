"""Every widget of the notebooks in the real thing: JupyterLab in a browser runs the notebook, a mouse drags
the slider, and another picture comes within a second.
"""

import json
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab_server import FORKED, jupyterlab

NBS = Path(__file__).resolve().parents[2] / "nbs"
NAMED = {
    "schedule",
    "forward",
    "attention",
    "trajectory",
    "quality",
    "guidance",
    "digits",
    "walk",
    "refine",
    "traversal",
    "layers",
    "clouds",
    "swap",
    "control_walk",
    "attributes",
    "gate",
    "asking",
}  # what the lessons promise, whatever else there is

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def widgets_of(*cells):
    return re.findall(
        r"^(widget_\w+) = ", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), re.M
    )


WIDGETS = {
    p: w for p in sorted(NBS.glob("[0-9]_*/*.ipynb")) if (w := widgets_of(*read(p)["cells"]))
}  # the names in each notebook that has any


def test_the_promised_widgets_are_there():
    assert {f"widget_{name}" for name in NAMED} <= set().union(*WIDGETS.values())


def copy_to_the_last_widget(path, copy):
    """Without the cells after it, which no widget needs and the tests of the notebooks run; for a kernel
    that is there at once.
    """
    notebook = read(path)
    notebook["metadata"]["kernelspec"] = FORKED
    while not widgets_of(notebook["cells"][-1]):
        del notebook["cells"][-1]
    copy.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks: its address."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(NBS, home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in WIDGETS:
        copy_to_the_last_widget(path, home / "nbs" / path.relative_to(NBS))
    tracker = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # cells out of sight are drawn too
    with jupyterlab(home) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    "Chromium or Chrome as the system has it, or the one that playwright has installed."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as e:
            reason = str(e).splitlines()[0]
            pytest.skip(f"no browser: install chromium, or say `playwright install chromium` ({reason})")
        yield chromium
        chromium.close()


RUN = """async ([path, seconds]) => {
    const run = async () => {
        const notebook = await jupyterapp.commands.execute('docmanager:open', { path, factory: 'Notebook' });
        await notebook.revealed;
        await notebook.sessionContext.ready;
        await notebook.sessionContext.session.kernel.info;
        await jupyterapp.commands.execute('notebook:run-all-cells');
    };
    const late = new Promise((_, no) => {
        setTimeout(() => no(Error(`not run within ${seconds} s`)), 1000 * seconds);
    });
    await Promise.race([run(), late]);
}"""
SHUT = """async () => {
    const notebook = jupyterapp.shell.currentWidget;
    await notebook.sessionContext.shutdown();
    notebook.dispose();
}"""
READY = """async () => {
    await jupyterapp.restored;
    await jupyterapp.serviceManager.sessions.shutdownAll();
}"""


@pytest.fixture(scope="module")
def run(lab, browser):
    """A context in which a notebook has run in a kernel of its own, and the page that shows it: one for all
    notebooks, and another after each failure.
    """
    page = None

    @contextmanager
    def run(path):
        nonlocal page
        if page is None:
            new = browser.new_page(viewport={"width": 1300, "height": 1000})
            new.set_default_timeout(60_000)
            new.goto(f"{lab}/lab?reset")
            new.wait_for_function("() => window.jupyterapp")
            new.evaluate(READY)
            page = new
        try:
            page.evaluate(RUN, [str(path.relative_to(NBS)), 240])
            yield page
            page.evaluate(SHUT)
        except BaseException:
            failed, page = page, None
            failed.close()
            raise

    return run


PIXELS = """image => {
    const c = document.createElement('canvas');
    c.width = image.naturalWidth;
    c.height = image.naturalHeight;
    c.getContext('2d').drawImage(image, 0, 0);
    return c.width * c.height ? c.toDataURL() : '';
}"""
BOX = ".widget-vbox:has(> img.widget-image), .widget-vbox:has(> .widget-image)"


def another_picture(image, before, seconds, what):
    "The picture that comes in place of `before`, and after how long; fails after `seconds`."
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if (now := image.evaluate(PIXELS)) and now != before:
            return now, time.monotonic() - started
        time.sleep(0.02)
    raise AssertionError(f"{what}: the picture did not change within {seconds} s")


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
    page.mouse.move(
        track["x"] + (track["width"] - 1 if right else 1), middle
    )  # in one step, so one picture: none comes late
    page.mouse.up()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", WIDGETS, ids=lambda p: p.stem)
def test_widgets_answer_a_mouse_within_a_second(path, run):
    with run(path) as page:
        errors = page.locator(
            ".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']:has-text('Traceback')"
        )
        assert not errors.count(), errors.first.inner_text()
        boxes, names = page.locator(BOX), WIDGETS[path]
        boxes.nth(len(names) - 1).wait_for()
        assert boxes.count() == len(names)
        for box, name in zip(boxes.all(), names):
            box.scroll_into_view_if_needed()
            image, knobs = box.locator("img"), box.locator("> .widget-inline-hbox")
            picture, _ = another_picture(image, "", 10, f"{path.stem}, {name}")
            assert knobs.count(), name
            for knob in knobs.all():
                what = f"{path.stem}, {name}, {knob.locator('label').inner_text()}"
                for _ in range(3):  # another test on the machine may have been in the way
                    move(page, knob)
                    other, seconds = another_picture(image, picture, 10, what)
                    move(page, knob)  # and back: what a knob does may depend on the others
                    picture, _ = another_picture(image, other, 10, what)
                    if seconds < 1:
                        break
                assert seconds < 1, f"{what}: another picture came after {seconds:.2f} s"
