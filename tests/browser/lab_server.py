"""JupyterLab whose kernels are there at once."""

import os
import socket
import time
from contextlib import contextmanager, suppress

from forks import HERE, forking, running

FORKED = {"name": "forked", "display_name": "Python 3, forked", "language": "python"}


@contextmanager
def jupyterlab(home):
    """JupyterLab on `home`/nbs with the settings of `home`/settings while the block lasts: its address. A
    notebook with the kernelspec FORKED has a forked kernel.
    """
    with open(home / "lab.log", "w") as log, socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
        free.close()
        options = [
            f"--ServerApp.port={port}",
            f"--ServerApp.root_dir={home / 'nbs'}",
            f"--LabApp.user_settings_dir={home / 'settings'}",
            "--IdentityProvider.token=",
            "--no-browser",
            "--expose-app-in-browser",
            "--allow-root",
        ]
        how = dict(
            stdout=log,
            stderr=log,
            cwd=home,
            env={**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(home)},
        )
        with forking(home, FORKED["name"], **how), running("-m", "jupyterlab", *options, **how):
            for _ in range(120):
                with suppress(OSError):
                    socket.create_connection((HERE, port)).close()
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
            yield f"http://{HERE}:{port}"
