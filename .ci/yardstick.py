"""How fast this machine is, beside the one on which limits in seconds were set.

    python .ci/yardstick.py            prints how many times slower, with as many workers as tests have

Limits in seconds hold for a machine on which the yardstick takes `REFERENCE` seconds. On another one they
are multiplied by its slowness, so that no test fails because a machine is slow.
"""

import time
from concurrent.futures import ProcessPoolExecutor

WORKERS = 2  # lessons and tests run two at a time
# seconds that `work` takes where the limits were set: a training step of the demo takes 0.11 s there
REFERENCE = 0.64


def work(_=None):
    """Do a fixed piece of work like the lessons', steps of a small network on one thread; return its seconds.

    Seconds of the process's own CPU time: what else the machine does counts only as far as it slows a core.
    """
    import torch

    torch.set_num_threads(1)
    net = torch.nn.Sequential(*(torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))
    x = torch.ones(64, 32, 16, 16)
    for _ in range(3):  # warm up
        net(x).sum().backward()
    started = time.process_time()
    for _ in range(12):
        net(x).sum().backward()
    return time.process_time() - started


def slowness():
    "Return how many times slower this machine is than the one of the limits; at least 1."
    measured = []
    with ProcessPoolExecutor(WORKERS) as workers:
        for _ in range(3):
            measured.append(max(workers.map(work, range(WORKERS))))
    return max(1.0, min(measured) / REFERENCE)


if __name__ == "__main__":
    print(f"{slowness():.3f}")
