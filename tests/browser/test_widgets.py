"""Widgets in the real thing: JupyterLab in a browser runs a notebook, a mouse drags the slider, and another
picture comes.

One page has each kind of knob that `explore` makes, and one lesson runs from its first cell to its last. All
other widgets are driven in the lesson's own process, by `.ci/lessons.py`, which times them too.
"""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab_server import FORKED, jupyterlab

NBS = Path(__file__).resolve().parents[2] / "nbs"
LESSON = Path("4_diffusion/01_schedules.ipynb")
KNOBS = Path("knobs.ipynb")
KNOBS_CODE = """
from diffusevae.core.plots import axes, explore, line_plot


def draw(points, height, marker):
    fig, (ax,) = axes()
    line_plot(ax, range(points), {marker: [height] * points}, marker=marker)
    ax.set_ylim(0, 2)
    return fig


explore(draw, points=range(2, 8), height=(0.5, 1.5, 0.5), marker=["o", "s"])
"""

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)


# ---------------------------------------------------------------- JupyterLab and a browser


def with_forked_kernel(path):
    "Let the notebook at `path` have a kernel that is there at once."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["kernelspec"] = FORKED
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks, and one of knobs: its address."
    import nbformat

    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(NBS, home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    knobs = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(KNOBS_CODE)])
    nbformat.write(knobs, home / "nbs" / KNOBS)
    for path in (LESSON, KNOBS):
        with_forked_kernel(home / "nbs" / path)
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
    "A context in which a notebook has run in a kernel of its own; it gives the page that shows it."
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
            page.evaluate(RUN, [path.as_posix(), 240])
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


def another_picture(image, before, what, seconds=60):
    "The picture that comes in place of `before`; fails after so many seconds."
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        now = image.evaluate(PIXELS)
        if now and now != before:
            return now
        time.sleep(0.02)
    raise AssertionError(f"{what}: the picture did not change within {seconds} s")


def move(page, knob):
    "Drag a slider to its other end, or choose another entry of a menu."
    if (menu := knob.locator("select")).count():
        menu.select_option(index=0 if menu.evaluate("e => e.selectedIndex") else 1)
        return
    track = knob.locator(".noUi-base").bounding_box()
    handle = knob.locator(".noUi-handle").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    x = handle["x"] + handle["width"] / 2
    in_left_half = x < track["x"] + track["width"] / 2
    end = track["x"] + (track["width"] - 1 if in_left_half else 1)
    page.mouse.move(x, middle)
    page.mouse.down()
    page.mouse.move(end, middle)  # in one step, so one picture: none comes late
    page.mouse.up()


def drive(page):
    "Move every knob of every widget on the page to its other end and back; the number of knobs."
    errors = page.locator(
        ".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']:has-text('Traceback')"
    )
    assert not errors.count(), errors.first.inner_text()
    boxes = page.locator(BOX)
    boxes.first.wait_for()
    driven = 0
    for box in boxes.all():
        box.scroll_into_view_if_needed()
        image = box.locator("img")
        picture = another_picture(image, "", "the widget")
        for knob in box.locator("> .widget-inline-hbox").all():
            for _ in range(2):  # there and back: what a knob does may depend on the others
                move(page, knob)
                picture = another_picture(image, picture, knob.locator("label").inner_text())
            driven += 1
    return driven


@pytest.mark.timeout(300)
def test_each_kind_of_knob_answers_a_mouse(run):
    with run(KNOBS) as page:
        assert drive(page) == 3


@pytest.mark.timeout(300)
def test_a_lesson_runs_to_its_last_cell_and_its_widget_answers(run):
    cells = json.loads((NBS / LESSON).read_text(encoding="utf-8"))["cells"]
    code_cells = sum(cell["cell_type"] == "code" for cell in cells)
    with run(LESSON) as page:
        executed = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        assert len(executed) == code_cells
        assert all(prompt.strip("[]: ").isdigit() for prompt in executed), executed
        assert drive(page) > 0
