"""Importing has no side effects; attention is registered when it is needed."""

import json
import subprocess
import sys

import pytest

import kvzip


def in_a_new_process(code: str) -> dict:
    """What a program prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_changes_nothing():
    report = in_a_new_process(
        "import json, os, sys, threading, warnings\n"
        "def state():\n"
        "    filters = [str(f) for f in warnings.filters]\n"
        "    return [dict(os.environ), sys.path[:], filters, threading.active_count()]\n"
        "before = state()\n"
        "import kvzip, kvzip.errors\n"
        "names = [name for name in kvzip.__all__ if name in dir(kvzip)]\n"
        "heavy = ['torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub', 'typer']\n"
        "print(json.dumps({'same': state() == before, 'names': names,\n"
        "                  'heavy': [name for name in heavy if name in sys.modules]}))\n"
    )
    assert report == {"same": True, "names": kvzip.__all__, "heavy": []}


def test_transformers_changes_only_with_attention():
    report = in_a_new_process(
        "import json\n"
        "import kvzip\n"
        "from kvzip import selection, errors\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "def state():\n"
        "    registers = AttentionInterface(), AttentionMaskInterface()\n"
        "    return [sorted(register.valid_keys()) for register in registers]\n"
        "before = state()\n"
        "import kvzip.attention\n"
        "print(json.dumps({'before': before, 'after': state()}))\n"
    )
    assert len(report["before"]) == 2
    for before, after in zip(report["before"], report["after"], strict=True):
        assert "kvzip" not in before
        assert after == sorted([*before, "kvzip"])


@pytest.mark.parametrize("name", [name for name in kvzip.__all__ if name != "__version__"])
def test_public_names(name):
    public = getattr(kvzip, name)
    assert public.__name__ == name
    assert public.__doc__


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'kvzip' has no attribute 'KVZip'"):
        kvzip.KVZip  # noqa: B018


def test_bad_input_is_a_value_error():
    assert issubclass(kvzip.KVzipError, ValueError)
