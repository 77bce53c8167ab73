"""Every widget of the notebooks in a real kernel: a front end's message moves a slider, and another picture comes back within a second."""

import hashlib
import json
import re
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

NBS = Path(__file__).parent.parent / "nbs"
WANTED = {"widget_forward", "widget_trajectory", "widget_walk", "widget_refine"}


def code_cells(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def widgets_of(path):
    return re.findall(r"^(widget_\w+) = ", "\n".join(code_cells(path)), re.M)


NOTEBOOKS = [p for p in sorted(NBS.glob("[0-9]_*/*.ipynb")) if widgets_of(p)]


def test_the_promised_widgets_are_there():
    assert WANTED <= {w for p in NOTEBOOKS for w in widgets_of(p)}


class Kernel:
    "A kernel and the messages that a notebook's front end would exchange with it."

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(cwd=str(folder))

    def execute(self, code, timeout=120):
        "Run a cell; the text that it printed. Fails with the cell's own error."
        printed = []

        def hear(message):
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=timeout, output_hook=hear)
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
        return "".join(printed)

    def move(self, knob, state):
        "Send a knob's new state as JupyterLab does."
        content = {"comm_id": knob, "data": {"method": "update", "state": state, "buffer_paths": []}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def picture(self, image, timeout):
        "The next value of an image widget that the kernel sends."
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            message = self.client.get_iopub_msg(timeout=left)
            if message["msg_type"] == "comm_msg" and message["content"]["comm_id"] == image and message["buffers"]:
                return bytes(message["buffers"][0])
        raise AssertionError(f"no new picture within {timeout} s")

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


DESCRIBE = """
import json
w = {name}
knobs = [(k.model_id, k.value, [k.min, k.max] if hasattr(k, "max") else None, getattr(k, "index", None)) for k in w.children[:-1]]
print("@@" + json.dumps([knobs, w.children[-1].model_id], default=str))
"""


def another(value, ends, index):
    "The state that a front end sends to move a slider to its other end, or a menu to its next choice."
    if ends:
        return {"value": ends[1] if value != ends[1] else ends[0]}
    return {"index": 0 if index else 1}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_widgets_answer_within_a_second(path):
    kernel = Kernel(path.parent)
    try:
        for cell in code_cells(path):
            if not cell.startswith("#| default_exp"):
                kernel.execute(cell)
        for name in widgets_of(path):
            knobs, image = json.loads(kernel.execute(DESCRIBE.format(name=name)).split("@@")[1])
            before = kernel.execute(f"import hashlib; print(hashlib.sha256({name}.children[-1].value).hexdigest())").strip()
            for model_id, *now in knobs:
                started = time.monotonic()
                kernel.move(model_id, another(*now))
                png = kernel.picture(image, timeout=5)
                seconds = time.monotonic() - started
                assert png[:4] == b"\x89PNG"
                assert seconds < 1, f"{name}: {seconds:.2f} s"
                after = hashlib.sha256(png).hexdigest()
                assert after != before, f"{name}: the picture did not change"
                before = after
    finally:
        kernel.close()
