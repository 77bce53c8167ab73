"""Kernels that are there at once.

One process imports the large libraries and forks, and each fork is a fresh kernel: `python forks.py serve`
is that process; whoever starts kernels starts `python forks.py kernel`, which asks it for a fork and stands
for that fork as long as it lives.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

LIBRARIES = (
    "IPython",
    "ipykernel.kernelapp",
    "ipywidgets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "papermill",
    "sklearn.datasets",
    "sklearn.mixture",
    "scipy.stats",
    "torch._dynamo",
    "torchmetrics.image.fid",
    "torch.utils.tensorboard",
)
HERE = "127.0.0.1"


def import_libraries():
    "Import the large libraries; where one is missing, each fork imports it for itself, or says so."
    for name in LIBRARIES:
        with suppress(ImportError):
            __import__(name)


def serve(door):
    "Import the libraries, then fork for each caller at the listening socket `door`, a file descriptor."
    sys.path[0] = ""  # as in any kernel
    import_libraries()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    parent = os.getppid()
    with socket.socket(fileno=int(door)) as door:
        while os.getppid() == parent:  # when that is killed, this ends too
            if select.select([door], [], [], 1)[0]:
                line, _ = door.accept()
                if os.fork() == 0:
                    door.close()
                    become_kernel(line)
                line.close()


def become_kernel(line):
    """The kernel that a caller asks for, in its folder and with its environment; when the caller ends, it
    ends.
    """
    from ipykernel.kernelapp import launch_new_instance

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    folder, environment, argv = json.loads(line.makefile().readline())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=lambda: (line.recv(1), os._exit(1)), daemon=True).start()
    launch_new_instance(argv=argv)
    os._exit(0)


def kernel(port, *argv):
    """Call for a kernel in this folder with these arguments, and last until it ends.

    Who interrupts a kernel before shutting it down ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        line = socket.create_connection((HERE, int(port)))
    except OSError:  # nobody forks any more: be the kernel, a little later
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *argv])
    line.sendall(json.dumps([os.getcwd(), dict(os.environ), argv]).encode() + b"\n")
    line.recv(1)


@contextmanager
def running(*arguments, **how):
    "Python with these arguments while the block lasts."
    process = subprocess.Popen([sys.executable, *arguments], **how)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def forking(home, name, **how):
    """While the block lasts, kernels called `name` are forks, for whoever has the folder `home` in
    JUPYTER_PATH; `how` goes to the process that forks.
    """
    with socket.create_server((HERE, 0)) as door:
        argv = [
            sys.executable,
            "-IS",
            __file__,
            "kernel",
            str(door.getsockname()[1]),
            "-f",
            "{connection_file}",
        ]
        (spec := home / "kernels" / name / "kernel.json").parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": argv, "display_name": f"Python 3, {name}", "language": "python"}))
        with running(__file__, "serve", str(door.fileno()), pass_fds=[door.fileno()], **how):
            door.close()
            yield


if __name__ == "__main__":
    {"serve": serve, "kernel": kernel}[sys.argv[1]](*sys.argv[2:])
