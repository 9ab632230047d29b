"""Kernels that are launched before the one in front of them has finished (Hopper and later).

Programs of such a kernel wait for the one in front before they touch what that one makes, and only
then let the next one start; those without work leave at once, and some always work. So whatever is
two places in front has finished when a kernel starts. What it reads before it waits, such as
weights, must have been there long before: steps that are recorded run a few times first.
"""

from functools import cache

import torch


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a device launches kernels so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
