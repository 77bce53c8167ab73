"""JupyterLab with kernels that are there at once. One process imports the large libraries and forks, and each fork is a fresh kernel: `python lab_server.py
serve` is that process; JupyterLab starts `python lab_server.py kernel`, which asks it for a fork and stands for that fork as long as it lives."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

LIBRARIES = "IPython", "ipykernel.kernelapp", "ipywidgets", "matplotlib.backends.backend_agg", "matplotlib.figure", "sklearn.datasets", "torch._dynamo"
FORKED = {"name": "forked", "display_name": "Python 3, forked", "language": "python"}
HERE = "127.0.0.1"


# ---------------------------------------------------------------- the forks


def serve(door):
    "Import the libraries, then fork for each caller at the listening socket `door`, a file descriptor."
    sys.path[0] = ""  # as in any kernel
    for name in LIBRARIES:
        with suppress(ImportError):  # then each kernel imports it for itself
            __import__(name)
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
    "The kernel that a caller asks for; when the caller ends, it ends."
    from ipykernel.kernelapp import launch_new_instance

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    folder, connection_file = line.makefile().readline().rstrip("\n").split("\t")
    os.chdir(folder)
    threading.Thread(target=lambda: (line.recv(1), os._exit(1)), daemon=True).start()
    launch_new_instance(argv=["-f", connection_file, "--log-level=40"])
    os._exit(0)


def kernel(port, connection_file):
    "Call for a kernel in this folder, and last until it ends. JupyterLab interrupts a kernel before it shuts it down, and that ends it."
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        line = socket.create_connection((HERE, int(port)))
    except OSError:  # nobody forks any more: be the kernel, a little later
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", "-f", connection_file])
    line.sendall(f"{os.getcwd()}\t{connection_file}\n".encode())
    line.recv(1)


# ---------------------------------------------------------------- the server


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
def jupyterlab(home):
    "JupyterLab on `home`/nbs with the settings of `home`/settings while the block lasts: its address. A notebook with the kernelspec FORKED has a forked kernel."
    with open(home / "lab.log", "w") as log, socket.create_server((HERE, 0)) as door, socket.create_server((HERE, 0)) as free:
        argv = [sys.executable, "-IS", __file__, "kernel", str(door.getsockname()[1]), "{connection_file}"]
        (spec := home / "kernels" / "forked" / "kernel.json").parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": argv, **FORKED}))
        port = free.getsockname()[1]
        free.close()
        options = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={home / 'nbs'}", f"--LabApp.user_settings_dir={home / 'settings'}",
                   "--IdentityProvider.token=", "--no-browser", "--expose-app-in-browser", "--allow-root"]  # fmt: skip
        how = dict(stdout=log, stderr=log, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(home)})
        with running(__file__, "serve", str(door.fileno()), pass_fds=[door.fileno()], **how), running("-m", "jupyterlab", *options, **how):
            door.close()
            for _ in range(120):
                with suppress(OSError):
                    socket.create_connection((HERE, port)).close()
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
            yield f"http://{HERE}:{port}"


if __name__ == "__main__":
    {"serve": serve, "kernel": kernel}[sys.argv[1]](*sys.argv[2:])
