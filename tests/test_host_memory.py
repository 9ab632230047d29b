"""How much memory a process may have."""

import os

import pytest

from kvzip import host_memory

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("1000000\n", 1_000_000),
        ("max\n", PHYSICAL),
        ("9223372036854771712\n", PHYSICAL),  # no limit, in version 1
        (None, PHYSICAL),
    ],
)
def test_a_container_has_its_share_of_the_memory(said, expected, tmp_path, monkeypatch):
    file = tmp_path / "limit"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(host_memory, "CONTROL_GROUPS", (tmp_path / "another", file))
    assert host_memory.host_memory() == expected


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CONTROL_GROUPS", (tmp_path / "none",))
    monkeypatch.delattr(os, "sysconf_names")
    assert host_memory.host_memory() is None
