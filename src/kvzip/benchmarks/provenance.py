"""Where a figure comes from: machine, versions, commit and command."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import kvzip


def provenance(device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that a reader needs to judge, or to repeat, a measurement.

    Args:
        device: what it was measured on.
        command: how to repeat it; the Python program that runs if None.
    """
    return {
        "command": shlex.join(map(_short, command or ["python", *sys.argv])),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "kvzip": kvzip.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _short(argument: str) -> str:
    """An argument; of an absolute path, its name, since folders are those of one machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _commit() -> str:
    if told := os.environ.get("KVZIP_COMMIT"):  # for a copy of the tree without its history
        return told
    run = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
