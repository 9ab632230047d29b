"""A Ctrl-C while layers are compacted comes after the last of them."""

import os
import signal
import threading

import pytest
import torch

from kvzip import KVzipError
from kvzip.interrupts import uninterrupted
from kvzip.layers import ContextLayer
from models import QUESTIONS, TEXT, random_ids, shared_model


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_block_is_finished_first():
    steps = []

    def work() -> None:
        with uninterrupted():
            interrupt()
            steps.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["after"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_errors_come_through():
    with pytest.raises(KVzipError, match="broken"), uninterrupted():
        raise KVzipError("broken")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_does_not_hide_it():
    def work() -> None:
        with uninterrupted():
            interrupt()
            raise KVzipError("broken")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, KVzipError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone():
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def interrupt_at_the_second(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Interrupt when a layer's method is called for the second time."""
    inner, calls = getattr(ContextLayer, name), []

    def interrupting(*args):
        calls.append(args)
        if len(calls) == 2:
            interrupt()
        return inner(*args)

    monkeypatch.setattr(ContextLayer, name, interrupting)


def test_pruning_is_finished(monkeypatch):
    model = shared_model()
    kv = model.prefill(TEXT)
    expected = kv.fork().prune(0.3).kept
    interrupt_at_the_second(monkeypatch, "prune")
    with pytest.raises(KeyboardInterrupt):
        kv.prune(0.3)
    assert torch.equal(kv.kept, expected)
    assert kv.ratio == 0.3


@pytest.mark.parametrize("budget", ["chunk", "context"])
def test_a_chunk_is_finished(monkeypatch, budget):
    model, ids = shared_model(), random_ids(40)
    how = {"ratio": 0.3, "chunk_size": 20, "budget": budget}
    expected = model.prefill(ids, streaming=True, **how)
    kv = model.prefill(ids[:20], streaming=True, **how)
    interrupt_at_the_second(monkeypatch, "absorb")
    with pytest.raises(KeyboardInterrupt):
        model.extend(kv, random_ids(40)[20:], **how)
    assert kv.tail_length == 0
    assert torch.equal(kv.kept, expected.kept)
    monkeypatch.undo()
    assert model.ask(kv, QUESTIONS, max_new_tokens=4) == model.ask(
        expected, QUESTIONS, max_new_tokens=4
    )
