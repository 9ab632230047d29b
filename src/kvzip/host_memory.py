"""How much memory the host gives to a process."""

import os
from pathlib import Path

CONTROL_GROUPS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where a container finds its limit, in the second and the first version of Linux's control groups;
outside of containers there is none, or one that is larger than the memory."""


def host_memory() -> int | None:
    """Bytes of the host's memory, or of the container's share of it; None if nothing says."""
    found = [limit for file in CONTROL_GROUPS if (limit := _limit(file)) is not None]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _limit(file: Path) -> int | None:
    """The number in a file; None for a word, which means no limit, or without the file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
