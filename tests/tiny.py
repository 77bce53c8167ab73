"""What tests of several rooms do to networks."""

import torch


def awake(net, std=0.2):
    "Random numbers where a fresh network has zeros, so that its output depends on all of its inputs."
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=std)
    return net
