"""Scores against an oracle that shares no code with the package."""

import pytest
import torch
from torch import Tensor

from kvzip import KVzipError
from kvzip.scoring import heads
from kvzip.scoring.reconstruction import SHORTEST_CHUNK
from models import (
    GEMMA3_LAYERS,
    GEMMA3_WINDOW,
    KINDS,
    TEXT,
    Oracle,
    assert_same,
    logits_of,
    make_model,
    make_tokenizer,
    random_ids,
    shared_hf_model,
    shared_model,
    snapshot,
)

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
ONE_CHUNK, SHORT_LAST_CHUNK = (37, 64), (90, 25)


def encode(text: str) -> list[int]:
    return make_tokenizer().encode(text, add_special_tokens=False)


def full_layers(kind: str) -> list[int]:
    layers = GEMMA3_LAYERS if kind == "gemma3" else ["full_attention"] * 3
    return [i for i, attention in enumerate(layers) if attention == "full_attention"]


def repeat_input(token_ids: Tensor, p: int, start: int, chunk_size: int) -> list[int]:
    """The request to repeat the chunk that starts there, and the chunk."""
    if start == p:
        request = encode("\n\nRepeat the previous context exactly.")
    else:
        request = encode("\n\nRepeat the part of the previous context exactly, starting with ")
        request += token_ids[start - 8 : start].tolist()
    return request + encode(SUFFIX) + token_ids[start : start + chunk_size].tolist()


def oracle_scores(
    kind: str, token_ids: Tensor, p: int, chunk_size: int, reach: str = "context"
) -> Tensor:
    """`[L, H, n]`, float64: a whole forward pass of the stock model for every chunk."""
    n = len(token_ids) - p
    parts = []
    for start in range(p, p + n, chunk_size):
        chunk = token_ids[start : start + chunk_size].tolist()
        repeat = repeat_input(token_ids, p, start, chunk_size)
        oracle = Oracle()
        if reach == "chunk":  # the repeat sees no other chunk
            hidden = torch.zeros(2, *[len(token_ids) + len(repeat)] * 2, dtype=torch.bool)
            hidden[:, p + n :, p:start] = hidden[:, p + n :, start + len(chunk) : p + n] = True
            oracle.hidden = dict.fromkeys(full_layers(kind), hidden)
        oracle.logits(kind, torch.cat([token_ids, torch.tensor(repeat)]), dtype=torch.float64)
        columns = [*range(p), *range(start, start + len(chunk))]
        columns += range(p + n, p + n + len(repeat))
        layers = []
        for layer in sorted(oracle.keys):
            if layer not in full_layers(kind):
                continue
            queries, keys = oracle.queries[layer][:, p + n :], oracle.keys[layer][:, columns]
            group, scale = len(queries) // len(keys), queries.shape[-1] ** -0.5
            later = torch.ones(len(repeat), len(columns)).triu(p + len(chunk) + 1).bool()
            scores = []
            for head in range(0, len(queries), group):
                logits = queries[head : head + group] @ keys[head // group].T * scale
                weights = logits.masked_fill(later, -torch.inf).softmax(-1)
                scores.append(weights[..., p : p + len(chunk)].amax(dim=(0, 1)))
            layers.append(torch.stack(scores))
        parts.append(torch.stack(layers))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("n", "chunk"), [ONE_CHUNK, SHORT_LAST_CHUNK], ids=["one", "four-chunks"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_scores_equal_the_oracle(kind, n, chunk):
    model = shared_model(kind)
    kv = model.prefill(random_ids(n), score_chunk=chunk)
    expected = oracle_scores(kind, kv.token_ids, kv.document.prefix_length, chunk)
    assert kv.scores.scorer == "reconstruction"
    assert kv.scores.values.dtype == torch.float32
    assert kv.scores.values.shape == expected.shape
    assert expected.std() > 0.01
    torch.testing.assert_close(kv.scores.values.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_scores_with_the_reach_of_a_chunk_equal_the_oracle(kind):
    n, chunk = SHORT_LAST_CHUNK
    model = shared_model(kind)
    kv = model.prefill(random_ids(n), score_chunk=chunk, reach="chunk")
    ids, p = kv.token_ids, kv.document.prefix_length
    expected = oracle_scores(kind, ids, p, chunk, reach="chunk")
    assert kv.scores.scorer == "reconstruction, reach chunk"
    assert kv.scores.values.dtype == torch.float32
    if kind != "gemma3":  # nothing in front of whose one full layer knows the reach
        assert not torch.allclose(expected, oracle_scores(kind, ids, p, chunk), atol=0.01)
    torch.testing.assert_close(kv.scores.values.double(), expected, atol=1e-5, rtol=0)


def masks(kind: str, size: int, hidden: Tensor) -> Tensor | dict[str, Tensor]:
    """Additive causal masks `[1, 1, size, size]`, float64, in the form that a model takes."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    full = (j > i) | hidden
    sliding = (j > i) | (j <= i - GEMMA3_WINDOW)
    by_type = {
        name: torch.zeros(size, size, dtype=torch.float64).masked_fill(unseen, -1e300)[None, None]
        for name, unseen in (("full_attention", full), ("sliding_attention", sliding))
    }
    return by_type if kind == "gemma3" else by_type["full_attention"]


@torch.no_grad()
def oracle_contributions(
    kind: str, token_ids: Tensor, p: int, chunk_size: int, reach: str
) -> Tensor:
    """`[L, H, n]`, float64: from stock attention probabilities, hidden states and weights."""
    model, n = shared_hf_model(kind, attention="eager", dtype=torch.float64), len(token_ids) - p
    parts = []
    for start in range(p, p + n, chunk_size):
        ids = torch.cat([token_ids, torch.tensor(repeat_input(token_ids, p, start, chunk_size))])
        stop = min(start + chunk_size, p + n)
        hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        if reach == "chunk":
            hidden[p + n :, p:start] = hidden[p + n :, stop : p + n] = True
        out = model(
            ids[None],
            attention_mask=masks(kind, len(ids), hidden),
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        columns = [*range(p), *range(start, stop), *range(p + n, len(ids))]
        layers = []
        for index in full_layers(kind):
            layer = model.model.layers[index]
            inputs = layer.input_layernorm(out.hidden_states[index][0])  # [s, hidden]
            dim, group = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
            values = layer.self_attn.v_proj(inputs)[start:stop].unflatten(-1, (-1, dim))
            scores = torch.zeros(values.shape[1], stop - start, dtype=torch.float64)
            for g, whole in enumerate(out.attentions[index][0]):
                seen = whole[p + n :, columns]
                seen = (seen / seen.sum(-1, keepdim=True))[:, p : p + stop - start]
                added = (
                    values[:, g // group] @ layer.self_attn.o_proj.weight[:, g * dim :][:, :dim].T
                )
                share = seen * added.norm(dim=-1) / inputs[p + n :].norm(dim=-1)[:, None]
                share = share[inputs[p + n :].any(-1)]  # the padding token is all zeros at first
                scores[g // group] = torch.maximum(scores[g // group], share.amax(0))
            layers.append(scores)
        parts.append(torch.stack(layers))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("reach", ["context", "chunk"])
@pytest.mark.parametrize(("n", "chunk"), [ONE_CHUNK, SHORT_LAST_CHUNK], ids=["one", "four-chunks"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_contributions_equal_the_oracle(kind, n, chunk, reach):
    model = shared_model(kind)
    kv = model.prefill(random_ids(n), score_chunk=chunk, scorer="reconstruction+", reach=reach)
    p = kv.document.prefix_length
    expected = oracle_contributions(kind, kv.token_ids, p, chunk, reach)
    suffix = "" if reach == "context" else ", reach chunk"
    assert kv.scores.scorer == f"reconstruction+{suffix}"
    assert kv.scores.values.dtype == torch.float32
    assert expected.std() > 0.01 * expected.max()
    torch.testing.assert_close(
        kv.scores.values.double(), expected, atol=2e-5 * expected.max().item(), rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_are_products_of_three_factors(kind):
    """Twice the output projection gives twice the scores."""
    context = random_ids(40)
    model = make_model(kind)
    before = model.prefill(context, scorer="reconstruction+").scores.values
    attentions = [layer.self_attn for layer in model.hf_model.model.layers]
    last = full_layers(kind)[-1]  # nothing that is scored comes behind it
    with torch.no_grad():
        attentions[last].o_proj.weight.mul_(2)
    after = model.prefill(context, scorer="reconstruction+").scores.values
    torch.testing.assert_close(after[:-1], before[:-1])
    torch.testing.assert_close(after[-1], before[-1] * 2)
    assert before.amin() >= 0


def test_contributions_leave_no_hook():
    model = make_model()
    kv = model.read(TEXT)
    attentions = [layer.self_attn for layer in model.hf_model.model.layers]
    model.score(kv, scorer="reconstruction+")
    assert not any(module._forward_pre_hooks for module in attentions)
    with pytest.raises(KVzipError, match="chunk"):
        model.score(kv, scorer="reconstruction+", score_chunk=0)
    assert not any(module._forward_pre_hooks for module in attentions)


def test_contributions_of_half_precision_are_accumulated_in_float32():
    context = random_ids(60)
    how = {"scorer": "reconstruction+"}
    half = make_model("qwen2", dtype=torch.bfloat16).prefill(context, **how).scores.values
    exact = shared_model("qwen2").prefill(context, **how).scores.values
    assert half.dtype == torch.float32
    assert len(half.unique()) > 0.9 * half.numel()
    torch.testing.assert_close(half, exact, atol=0.1 * exact.max().item(), rtol=0.1)


def test_contributions_need_a_plain_output_projection():
    model = make_model()
    kv = model.read(TEXT)
    projection = model.hf_model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(KVzipError, match="LlamaAttention has no plain weight matrix"):
        model.score(kv, scorer="reconstruction+")


def test_reach_belongs_to_scorers_that_repeat():
    with pytest.raises(
        KVzipError, match="'reconstruction' and 'reconstruction\\+', not to 'random'"
    ):
        shared_model().prefill(TEXT, scorer="random", reach="chunk")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_reaches_are_the_same_for_one_chunk(kind):
    model, context = shared_model(kind), random_ids(40)
    whole, chunk = (model.prefill(context, reach=reach) for reach in ("context", "chunk"))
    torch.testing.assert_close(whole.scores.values, chunk.scores.values, atol=1e-6, rtol=0)


def test_an_unknown_reach_is_refused():
    model = shared_model()
    for call in (
        model.prefill,
        lambda context, reach: model.score(model.read(context), reach=reach),
    ):
        with pytest.raises(KVzipError, match="unknown reach 'far': choose one of context, chunk"):
            call(TEXT, reach="far")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
def test_the_chunk_size_changes_neither_scores_nor_logits(kind, chunk_size):
    model, context = shared_model(kind), random_ids(50)
    whole = model.prefill(context)
    parts = model.prefill(context, chunk_size=chunk_size)
    torch.testing.assert_close(parts.scores.values, whole.scores.values, atol=1e-5, rtol=0)
    query = model.apply_template("what jumps?")
    torch.testing.assert_close(
        logits_of(model, parts, query), logits_of(model, whole, query), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_scoring_leaves_the_cache_as_it_was(kind):
    model = shared_model(kind)
    kv = model.read(TEXT)
    model.generate("what jumps?", kv=kv, update_cache=True, max_new_tokens=4)
    before = snapshot(kv)
    model.score(kv, score_chunk=20)
    assert_same(snapshot(kv), before)


def test_scores_are_accumulated_in_float32_whatever_the_dtype():
    context = random_ids(60)
    half = make_model("qwen2", dtype=torch.bfloat16).prefill(context).scores.values
    exact = shared_model("qwen2").prefill(context).scores.values
    assert half.dtype == torch.float32
    # bfloat16 logits would give probabilities with 8 bits: far fewer different values
    assert len(half.unique()) > 0.9 * half.numel()
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)


def test_progress_is_reported():
    calls = []
    shared_model().prefill(
        random_ids(50), chunk_size=40, score_chunk=20, progress=lambda *call: calls.append(call)
    )
    total = 50 + len(shared_model().prompts.prefix_ids())
    reading = [("prefill", min(done, total), total) for done in range(40, total + 40, 40)]
    assert calls == [*reading, ("score", 20, 50), ("score", 40, 50), ("score", 50, 50)]


def test_a_chunk_size_must_be_positive():
    kv = shared_model().read(TEXT)
    for size in (0, -1):
        with pytest.raises(KVzipError, match="chunk"):
            shared_model().score(kv, score_chunk=size)
        with pytest.raises(KVzipError, match="chunk"):
            shared_model().read(TEXT, chunk_size=size)


def test_chunks_shrink_to_what_the_positions_leave_room_for():
    calls = []
    model = make_model(max_position_embeddings=1024)
    kv = model.read(random_ids(600))
    request = len(model.prompts.repeat_ids(random_ids(600), random_ids(0)))
    room = 1024 - len(kv.token_ids) - request
    assert SHORTEST_CHUNK <= room < 600
    model.score(kv, progress=lambda stage, done, total: calls.append(done))
    assert calls == [*range(room, 600, room), 600]
    shrunk = kv.scores.values
    assert torch.equal(model.score(kv, score_chunk=room).scores.values, shrunk)


def test_a_context_must_leave_room_to_be_repeated_in():
    model = make_model(max_position_embeddings=150)
    kv = model.read(random_ids(110))
    with pytest.raises(KVzipError, match="of the model's 150 positions"):
        model.score(kv)


def test_a_retained_cache_is_scored_again_after_pruning():
    model = make_model(kv_type="retain")
    kv = model.prefill(TEXT)
    before = kv.scores.values
    assert torch.equal(model.score(kv.prune(0.3)).scores.values, before)


def test_an_evicted_cache_cannot_be_scored_again():
    kv = shared_model().prefill(TEXT).prune(0.5)
    with pytest.raises(KVzipError, match="cannot be scored again"):
        shared_model().score(kv)


@pytest.mark.parametrize(
    "context", [random_ids(0), random_ids(6).view(2, 3), torch.tensor(3)], ids=["0", "2d", "0d"]
)
def test_a_context_is_one_row_of_ids(context):
    with pytest.raises(KVzipError, match="a context is text or token ids"):
        shared_model().read(context)


def test_an_empty_context_is_refused():
    with pytest.raises(KVzipError, match="context is empty"):
        shared_model().prefill("")


def test_unknown_token_ids_are_refused():
    with pytest.raises(KVzipError, match="the model knows 0 to 399"):
        shared_model().read(torch.tensor([3, 400]))


def test_a_context_beyond_the_positions_is_refused():
    with pytest.raises(KVzipError, match="the model has 1024"):
        shared_model().prefill(random_ids(1024))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"scorer": "reconstructed"}, "unknown scorer 'reconstructed': did you mean"),
        ({"scorer": "random", "reach": "chunk"}, "reach belongs to the scorers"),
        ({"scorer": None}, "a scorer is known by its name: got None"),
        ({"score_chunk": 0}, "score_chunk is 0"),
        ({"scorer": "random", "score_chunk": 0}, "score_chunk is 0"),
        ({"scorer": "heads"}, "there are no head scores at"),
        ({"load_score": True}, "there are no head scores at"),
        ({"load_score": "none.safetensors"}, "there are no head scores at none.safetensors"),
        ({"load_score": True, "scorer": "kvzap:mlp"}, "here 'kvzap:mlp': leave out one of them"),
        ({"scorer": "kvzap:nowhere/at/all"}, "nowhere/at/all"),
    ],
    ids=str,
)
def test_what_cannot_score_is_said_before_reading(how, said):
    read = []
    with pytest.raises(KVzipError, match=said):
        shared_model().prefill(TEXT, progress=lambda *done: read.append(done), **how)
    assert not read


class TestHeadScores:
    def test_round_trip(self, tmp_path):
        model, path = shared_model("gemma3"), tmp_path / "heads.safetensors"
        texts = [model.prefill(random_ids(30, seed)).scores for seed in range(3)]
        reduced = heads.reduce(texts)
        assert torch.equal(reduced, torch.cat([s.values for s in texts], dim=-1).amax(-1))
        heads.save(reduced, path)
        kv = model.prefill(TEXT, load_score=path)
        assert kv.scores.scorer == "heads"
        assert torch.equal(kv.scores.values, reduced[..., None].expand_as(kv.scores.values))
        kv.prune(0.5, level="head")
        assert kv.kept.all(-1).tolist() == [[bool(h == reduced[0].argmax()) for h in range(2)]]
        assert torch.equal(kv.kept.any(-1), kv.kept.all(-1))

    def test_missing_file(self, tmp_path):
        with pytest.raises(KVzipError, match="there are no head scores at"):
            shared_model().prefill(TEXT, load_score=tmp_path / "none.safetensors")

    def test_no_head_score_file(self, tmp_path):
        path = tmp_path / "text.safetensors"
        path.write_text("hello")
        with pytest.raises(KVzipError, match="is no head score file"):
            shared_model().prefill(TEXT, load_score=path)

    def test_scores_of_another_model(self, tmp_path):
        path = tmp_path / "heads.safetensors"
        heads.save(torch.rand(2, 8), path)
        with pytest.raises(
            KVzipError, match=r"\[2, 8\] layers x KV heads, this model has \[3, 2\]"
        ):
            shared_model().prefill(TEXT, load_score=path)
