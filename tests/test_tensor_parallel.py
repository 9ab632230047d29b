"""Two processes that divide a model's heads answer like one that has all of them."""

import pytest
import torch

from kvzip import KVzipError, ModelKVzip, head_parts
from models import TEXT, make_hf_model, make_tokenizer
from tensor_parallel_worker import RATIO, SCORERS, run_two_processes, seen, work

CACHES = ["ratio", "bytes", "file", "codes", "pair-uniform", "head", "retained", *SCORERS]
CACHES += ["streamed chunk", "streamed context"]


def save_checkpoint(path, kind, **shape):
    make_hf_model(kind, **shape).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with 4 KV heads of 8 query heads."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, "llama", num_attention_heads=8, num_key_value_heads=4)
    return path


@pytest.fixture(scope="module")
def one(checkpoint):
    return ModelKVzip(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def alone(one, tmp_path_factory):
    return work(one, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def folder(one, checkpoint, tmp_path_factory):
    """Where two processes leave what they have seen."""
    path = tmp_path_factory.mktemp("two")
    one.prefill(TEXT, ratio=RATIO).save(path / "one.kvz")
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    save_checkpoint(path / "uneven", "llama", **uneven)
    save_checkpoint(path / "whole", "phi3")
    run_two_processes(checkpoint, path, "cpu")
    return path


@pytest.fixture(scope="module")
def two(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CACHES)
def test_both_keep_what_one_keeps(alone, two, name):
    together = torch.cat([rank[name]["kept"] for rank in two], dim=1)
    assert torch.equal(together, alone[name]["kept"])
    assert {rank[name]["ratio"] for rank in two} == {alone[name]["ratio"]}
    assert sum(rank[name]["nbytes"] for rank in two) == alone[name]["nbytes"]


@pytest.mark.parametrize("name", ["full", "ratio", *SCORERS, "streamed chunk"])
def test_scores_are_those_of_the_own_heads(alone, two, name):
    together = torch.cat([rank[name]["scores"] for rank in two], dim=1)
    torch.testing.assert_close(together, alone[name]["scores"], rtol=1e-3, atol=1e-5)


def test_heads_are_divided_unevenly(two):
    """Pairs are chosen among all heads, so that a half of the heads need not get half of them."""
    first, second = (int(rank["ratio"]["kept"].sum()) for rank in two)
    assert first != second


@pytest.mark.parametrize("name", ["ratio answers", "bytes answers", "conversation"])
def test_answers_are_those_of_one_process(alone, two, name):
    assert two[0][name] == two[1][name] == alone[name]


def test_drawn_tokens_are_the_same_in_both(two):
    assert two[0]["sampled"] == two[1]["sampled"]
    assert len(set(two[0]["sampled"])) > 1


def test_where_one_cannot_record_neither_does(two):
    for found in two:
        assert found["not recorded"] == found["answer"] == two[0]["answer"]


def test_the_fingerprint_is_that_of_one_process(alone, two):
    assert {rank["fingerprint"] for rank in two} == {alone["fingerprint"]}


@pytest.mark.parametrize(("file", "name"), [("a.kvz", "file"), ("b.kvz", "codes")])
def test_one_process_opens_the_file_of_two(one, alone, folder, file, name):
    opened = seen(one.load(folder / file))
    assert torch.equal(opened["kept"], alone[name]["kept"])
    assert opened["nbytes"] == alone[name]["nbytes"]


def test_two_processes_open_the_file_of_one(alone, two):
    together = torch.cat([rank["opened"]["kept"] for rank in two], dim=1)
    assert torch.equal(together, alone["ratio"]["kept"])


def test_refusals_are_said_in_both(two):
    assert two[0]["said"] == two[1]["said"]
    said = two[0]["said"]
    assert "exists: choose another name" in said["exists"]
    assert "does not exist" in said["full"]
    assert "needs all heads in one process" in said["surrogate"]
    assert "3 KV heads, which cannot be divided among 2 processes" in said["uneven"]
    assert "leaves 2 of 2 KV heads to each of 2 processes" in said["whole"]


def test_a_file_is_put_together_as_it_was_divided():
    """Heads of lengths 2, 0, 1 and 3."""
    tensors = {
        "token_ids": torch.arange(5),
        "layers.0.indptr": torch.tensor([0, 2, 2, 3, 6]),
        "layers.0.keys.codes": torch.arange(12).view(6, 2),
        "layers.0.keys.center": torch.arange(8).view(4, 2),
        "layers.1.keys": torch.arange(24).view(4, 3, 2),
    }
    parts = [head_parts.part_of(tensors, [None, 7], rank, 2) for rank in (0, 1)]
    assert [part["layers.0.indptr"].tolist() for part in parts] == [[0, 2, 2], [0, 1, 4]]
    assert [len(part["layers.0.keys.codes"]) for part in parts] == [2, 4]
    for name, whole in tensors.items():
        assert torch.equal(head_parts.merge(name, [part[name] for part in parts]), whole), name


def test_without_torchrun_the_plan_is_refused(checkpoint, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(KVzipError, match="start the program with torchrun"):
        ModelKVzip(checkpoint, tp_plan="auto")


def test_the_plan_says_where_a_model_is(checkpoint):
    with pytest.raises(KVzipError, match="device and tp_plan do not go together"):
        ModelKVzip(checkpoint, tp_plan="auto", device="cpu")
