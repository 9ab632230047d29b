"""Kernels that are launched before the one in front of them has finished (Hopper and later).

Such a kernel waits for the one in front before it touches what that one makes, and only then lets
the next one start: so whatever is two places in front has finished when a kernel starts. What it
reads before it waits, such as weights, must have been there long before: steps that are recorded
run a few times first.
"""

from functools import cache

import torch


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a device launches kernels so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
