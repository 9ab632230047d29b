"""Budgets: what they accept, and that a cache keeps within them."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvzip import Budget, ContextCache, KVzipError
from kvzip.budget import Footprint, parse_bytes
from kvzip.errors import KVzipWarning
from kvzip.selection import LEVELS
from kvzip.spans import characters, tokens
from models import QUESTIONS, TEXT, assert_same, make_model, shared_model, snapshot

NEW = {"max_new_tokens": 4}


# What a budget is made of


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1),
        (2_000_000_000, 2_000_000_000),
        (2e9, 2_000_000_000),
        ("2000", 2000),
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        (" 1.5GiB ", 3 * 2**29),
        ("0.1kB", 100),
        ("1.0009 kB", 1000),
        ("3e3kib", 3000 * 1024),
        ("7TiB", 7 * 2**40),
        ("12B", 12),
    ],
)
def test_sizes(size, count):
    assert parse_bytes(size) == Budget(bytes=size).bytes == count


@pytest.mark.parametrize(
    "size",
    ["", "GB", "-1GB", "2 G B", "2EB", "1.2.3MB", "zero", "nan", "inf", 0, -1, torch.nan, []],
)
def test_bad_sizes(size):
    with pytest.raises(KVzipError, match="bytes is a size, such as 512MB"):
        Budget(bytes=size)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "by one of ratio, tokens, bytes, threshold"),
        ({"min_per_head": 3}, "by one of"),
        ({"ratio": 0.3, "tokens": 5}, "got ratio and tokens"),
        ({"bytes": "1GB", "threshold": 0.1}, "got bytes and threshold"),
        ({"ratio": 0}, r"in \(0, 1\]: got 0"),
        ({"ratio": torch.nan}, "got nan"),
        ({"tokens": 0}, "above 0: got 0"),
        ({"tokens": -3}, "above 0: got -3"),
        ({"tokens": torch.nan}, "above 0: got nan"),
        ({"tokens": torch.inf}, "above 0: got inf"),
        ({"tokens": "many"}, "above 0: got many"),
        ({"threshold": torch.nan}, "a finite number: got nan"),
        ({"threshold": -torch.inf}, "a finite number: got -inf"),
        ({"threshold": "high"}, "a finite number: got high"),
        ({"ratio": 0.3, "min_per_head": -1}, "0 or more: got -1"),
        ({"ratio": 0.3, "min_per_head": 1.5}, "0 or more: got 1.5"),
        ({"ratio": 0.3, "keep": [(3, 3)]}, r"got \(3, 3\)"),
        ({"ratio": 0.3, "keep": [(5, 3)]}, r"got \(5, 3\)"),
        ({"ratio": 0.3, "keep": [(-1, 3)]}, r"got \(-1, 3\)"),
        ({"ratio": 0.3, "keep": [(0, 1.5)]}, r"got \(0, 1.5\)"),
        ({"ratio": 0.3, "keep": [(0, 1, 2)]}, r"got \(0, 1, 2\)"),
        ({"ratio": 0.3, "keep": (0, 4)}, "got 0"),
        ({"ratio": 0.3, "keep": ["the table"]}, "model.spans"),
        ({"ratio": 0.3, "keep": "the table"}, "model.spans"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(parts, said):
    with pytest.raises(KVzipError, match=said):
        Budget(**parts)


def test_a_budget_says_what_was_asked():
    assert Budget(0.3).asked() == {"ratio": 0.3}
    budget = Budget(bytes="2kB", min_per_head=2, keep=[(1, 4)])
    assert budget.asked() == {"bytes": 2000, "min_per_head": 2, "keep": ((1, 4),)}
    assert str(budget) == "bytes 2000"
    assert hash(budget) == hash(Budget(bytes=2000, min_per_head=2, keep=((1, 4),)))


def test_numbers_may_be_text():
    assert Budget("0.3") == Budget(0.3)
    assert Budget("0.3").ratio == 0.3
    assert Budget(tokens="12.5").tokens == 12.5
    assert Budget(True).ratio == 1.0


def test_a_budget_goes_on_as_before():
    assert Budget.as_before(0.25) == Budget(0.25)
    with pytest.raises(KVzipError, match=r"nothing of the context was kept \(ratio 0\.0\)"):
        Budget.as_before(0.0)


def test_a_whole_budget_takes_no_parts():
    budget = Budget(tokens=5)
    assert Budget.of(budget, tokens=None, min_per_head=0, keep=()) is budget
    with pytest.raises(KVzipError, match="leave out min_per_head"):
        Budget.of(budget, tokens=None, min_per_head=2, keep=())


# Pairs of a head


@given(st.integers(1, 300), st.integers(1, 16), st.integers(0, 900), st.integers(1, 40_000))
def test_bytes_hold_as_many_pairs_as_fit(n, heads, fixed, size):
    footprint = Footprint(fixed, pair=8)
    if size < fixed:
        with pytest.raises(KVzipError, match=f"bytes is {size:,}, .* take {fixed:,} "):
            Budget(bytes=size).per_head(n, heads, footprint)
        return
    pairs = Budget(bytes=size).per_head(n, heads, footprint) * heads
    assert pairs.denominator == 1
    assert fixed + 8 * pairs <= size
    assert pairs == n * heads or fixed + 8 * (pairs + 1) > size


def test_bytes_need_a_footprint():
    with pytest.raises(KVzipError, match=r"kv.prune\(bytes=...\)"):
        Budget(bytes=1).per_head(10, 2)


@pytest.mark.parametrize(
    ("budget", "pairs"),
    [
        (Budget(0.29), Fraction(29)),
        (Budget(tokens=7), Fraction(7)),
        (Budget(tokens=0.3), Fraction(3, 10)),
        (Budget(tokens=1000), Fraction(100)),
        (Budget(threshold=0.1), None),
    ],
    ids=str,
)
def test_pairs_of_a_head(budget, pairs):
    assert budget.per_head(100, 8) == pairs


@pytest.mark.parametrize(
    ("budget", "required"),
    [
        (Budget(0.5, min_per_head=3), 3),
        (Budget(1, min_per_head=30), 10),
        (Budget(0.5, keep=[(2, 4), (3, 6)]), 4),
        (Budget(0.5, min_per_head=5, keep=[(2, 4), (9, 10)]), 5),
        (Budget(0.5, min_per_head=2, keep=[(2, 4), (9, 10)]), 3),
    ],
    ids=str,
)
def test_what_must_stay_is_counted_once(budget, required):
    assert budget.required(10) == required


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(0.5, min_per_head=6), "ratio 0.5 allows 5 pairs a head, .* for 6:"),
        (Budget(tokens=2, keep=[(0, 3)]), "tokens 2 allows 2 pairs a head, .* for 3:"),
        (Budget(bytes=90, keep=[(0, 3)]), "bytes 90 allows 2.5 pairs a head, .* for 3:"),
        (Budget(0.5, keep=[(0, 11)]), "tokens 0 to 11, the context has 10"),
        (Budget(threshold=0, keep=[(12, 13)]), "tokens 12 to 13, the context has 10"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(budget, said):
    with pytest.raises(KVzipError, match=said):
        budget.per_head(10, 2, Footprint(fixed=50, pair=8))


# A cache keeps within its budget


def held_without(kv: ContextCache) -> int:
    """Bytes of prefix and sliding layers, from the live tensors of a cache."""
    p = kv.document.prefix_length
    total = 0
    for layer in kv.layers:
        keys, values = layer.context.keys, layer.context.values
        rows = len(layer.context.kept) * p if layer in kv.prunable else len(keys)
        total += rows * (keys[0].nbytes + values[0].nbytes)
    return total


def row(kv: ContextCache) -> int:
    context = kv.prunable[0].context
    return context.keys[0].nbytes + context.values[0].nbytes


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beside", [0, 1, 1000, 10_001])
def test_a_cache_takes_the_bytes_that_it_may(kind, dtype, beside):
    kv = shared_model(kind, dtype=dtype).prefill(TEXT)
    size = held_without(kv) + beside
    assert kv.footprint() == Footprint(held_without(kv), row(kv))
    kv.prune(bytes=size)
    assert kv.nbytes <= size < kv.nbytes + row(kv)
    assert kv.nbytes == held_without(kv) + kv.kept.sum() * row(kv)
    assert kv.ratio == kv.realised_ratio


@pytest.mark.parametrize("level", ["pair-uniform", "head"])
def test_bytes_at_other_levels(level):
    kv = shared_model("llama").prefill(TEXT)
    size = kv.footprint().fixed + kv.kept.numel() * row(kv) // 2 + 3
    before = kv.nbytes
    kv.prune(bytes=size, level=level)
    assert before // 3 < kv.nbytes <= size


def test_bytes_that_hold_everything_keep_everything():
    kv = shared_model().prefill(TEXT)
    full = kv.nbytes
    assert kv.prune(bytes="2GB").nbytes == full
    assert (kv.ratio, kv.realised_ratio) == (1, 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_bytes_that_the_prefix_takes(kind):
    kv = shared_model(kind).prefill(TEXT)
    fixed = held_without(kv)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=f"bytes is {fixed - 1:,}, .* take {fixed:,} "):
        kv.prune(bytes=fixed - 1)
    assert_same(snapshot(kv), before)


def test_retained_pairs_do_not_count():
    model = make_model(kv_type="retain")
    kv, other = model.prefill(TEXT), shared_model().prefill(TEXT)
    size = kv.footprint().fixed + 100 * row(kv)
    assert torch.equal(kv.prune(bytes=size).kept, other.prune(bytes=size).kept)
    assert kv.kept.sum() == 100
    assert torch.equal(kv.prune(tokens=9).kept, shared_model().prefill(TEXT).prune(tokens=9).kept)


def test_tokens_are_pairs_of_a_head_on_average():
    kv = shared_model().prefill(TEXT)
    heads = kv.kept.shape[0] * kv.kept.shape[1]
    kv.prune(tokens=7)
    assert kv.kept.sum() == 7 * heads
    assert kv.ratio == kv.realised_ratio == 7 / kv.document.context_length


@pytest.mark.parametrize("budget", [{"tokens": 9}, {"bytes": "1MB"}], ids=str)
@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_a_limit_that_a_zipped_cache_keeps_evicts_nothing(budget, level):
    kv = shared_model().prefill(TEXT).prune(0.3, "pair-uniform")
    kept = kv.kept
    limit = {"tokens": kv.document.context_length} if "tokens" in budget else budget
    assert torch.equal(kv.prune(level=level, **limit).kept, kept)
    if "tokens" in budget:
        assert (kv.prune(level=level, **budget).kept.sum(-1) <= kept.sum(-1)).all()


def test_a_threshold_keeps_scores_that_reach_it():
    kv = shared_model().prefill(TEXT)
    scores = kv.scores.values
    threshold = scores.flatten().median().item()
    kv.prune(threshold=threshold)
    assert torch.equal(kv.kept, scores >= threshold)
    assert kv.ratio == kv.realised_ratio
    larger = scores.flatten().quantile(0.9).item()
    assert torch.equal(kv.prune(threshold=larger).kept, scores >= larger)
    assert torch.equal(kv.prune(threshold=threshold).kept, scores >= larger)  # no pair returns


@pytest.mark.parametrize("level", ["pair", "head"])
def test_a_threshold_that_nothing_reaches_leaves_the_prefix_and_warns(level):
    model = shared_model()
    kv = model.prefill(TEXT)
    largest = kv.scores.values.max()
    with pytest.warns(KVzipWarning, match=f"threshold 2.0, the largest is {largest:.6g}") as seen:
        kv.prune(threshold=2, level=level)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert not kv.kept.any()
    assert kv.ratio == 0
    assert kv.nbytes == held_without(kv)
    assert len(model.ask(kv, QUESTIONS, **NEW)) == len(QUESTIONS)


@pytest.mark.parametrize("level", LEVELS)
def test_what_must_stay_stays_in_every_head(level):
    kv = shared_model().prefill(TEXT)
    scores, spans = kv.scores.values, [(0, 3), (10, 12)]
    kv.prune(0.4, level, min_per_head=8, keep=spans)
    assert kv.ratio == 0.4
    assert all(kv.kept[..., start:end].all() for start, end in spans)
    assert (kv.kept.sum(-1) >= 8).all()
    assert kv.kept.sum() <= 0.4 * kv.kept.numel()
    # the three that make up for the missing ones are the best of those that are not in a span
    others = scores.clone()
    for start, end in spans:
        others[..., start:end] = -1
    assert kv.kept.gather(-1, others.topk(3, dim=-1).indices).all()


def test_answers_after_pruning_agree_with_the_same_mask():
    model = shared_model()
    kv = model.prefill(TEXT).prune(tokens=12, min_per_head=2, keep=[(4, 9)])
    same = model.prefill(TEXT)
    same.keep(kv.kept)
    assert model.ask(kv, QUESTIONS, **NEW) == model.ask(same, QUESTIONS, **NEW)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "by one of"),
        ({"ratio": 0.3, "tokens": 4}, "got ratio and tokens"),
        ({"ratio": Budget(tokens=4), "threshold": 0.1}, "leave out threshold"),
        ({"threshold": 0.1, "level": "pair-uniform"}, "choose level 'pair' or 'head'"),
        ({"tokens": 4, "min_per_head": 5}, "tokens 4 allows 4 pairs a head"),
        ({"tokens": 4, "keep": [(0, 5)]}, "tokens 4 allows 4 pairs a head"),
        ({"tokens": 4, "keep": [(1000, 1001)]}, "tokens 1000 to 1001, the context has"),
    ],
    ids=str,
)
def test_a_bad_budget_changes_nothing(arguments, said):
    kv = shared_model().prefill(TEXT)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=said):
        kv.prune(**arguments)
    assert_same(snapshot(kv), before)


def test_what_was_evicted_cannot_be_kept():
    kv = shared_model().prefill(TEXT).prune(0.2)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match="what must stay at level 'pair' asks for pairs that are"):
        kv.prune(0.1, keep=[(0, 2)])
    assert_same(snapshot(kv), before)


# Reading with a budget


@pytest.mark.parametrize("budget", [Budget(tokens=9), Budget(0.5, keep=[(0, 4)])], ids=str)
def test_prefill_prunes_to_a_budget(budget):
    model = shared_model()
    assert torch.equal(
        model.prefill(TEXT, ratio=budget).kept, model.prefill(TEXT).prune(budget).kept
    )


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(bytes=1000), "bytes is 1,000, "),
        (Budget(tokens=4, min_per_head=5), "allows 4 pairs a head"),
        (Budget(tokens=4, keep=[(1000, 1001)]), "the context has"),
    ],
    ids=str,
)
def test_a_bad_budget_is_refused_before_scoring(monkeypatch, budget, said):
    def score(*args, **kwargs):
        raise AssertionError("it was scored")

    monkeypatch.setattr("kvzip.model.ModelKVzip.score", score)
    with pytest.raises(KVzipError, match=said):
        shared_model().prefill(TEXT, ratio=budget)


@pytest.mark.parametrize(
    "parts", [{"tokens": 9}, {"bytes": "1GB"}, {"ratio": 0.5, "keep": [(0, 4)]}]
)
def test_streaming_refuses_what_it_cannot_promise(parts):
    model = shared_model()
    said = f"leave out {[*parts][-1]}"
    with pytest.raises(KVzipError, match=said):
        model.prefill(TEXT, ratio=Budget(**parts), streaming=True)
    kv = model.prefill(TEXT, ratio=0.5, streaming=True)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=said):
        kv.extend(TEXT, ratio=Budget(**parts))
    assert_same(snapshot(kv), before)


def test_a_saved_cache_says_the_share_that_its_budget_came_to(tmp_path):
    model = shared_model()
    kv = model.prefill(TEXT).prune(tokens=9)
    again = model.load(kv.save(tmp_path / "context.kvz"))
    assert again.ratio == again.realised_ratio == 9 / kv.document.context_length
    again.extend(TEXT)
    assert again.realised_ratio == pytest.approx(kv.ratio, abs=1e-3)


@pytest.mark.parametrize("budget", [None, 0.5, Budget(tokens=9)], ids=str)
def test_prefill_quantises_what_it_keeps(budget):
    model = shared_model()
    kv, kept = model.prefill(TEXT, ratio=budget, kv_dtype="int4"), 1.0 if budget is None else budget
    assert kv.kv_dtype == "int4"
    assert_same(snapshot(kv), snapshot(model.prefill(TEXT).prune(kept, kv_dtype="int4")))


def test_prefill_fits_codes_into_bytes():
    """Into so few that the prefix alone would not fit as the model made it."""
    model = shared_model()
    budget = Budget(bytes=model.prefill(TEXT).nbytes // 4)
    with pytest.raises(KVzipError, match="the prefix and layers that slide take"):
        model.prefill(TEXT, ratio=budget)
    kv = model.prefill(TEXT, ratio=budget, kv_dtype="int4")
    assert kv.kept.any()
    assert kv.nbytes <= budget.bytes


# Parts of a text


def test_texts_and_characters_of_a_context():
    parts = ["ab", (1, 3), "a\nb"]
    assert characters("ab ab a\nb", parts) == [(0, 2), (3, 5), (1, 3), (6, 9)]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("ab", "in brackets"),
        (["xy"], "'xy' does not occur"),
        ([""], "'' does not occur"),
        (["x" * 90], f"'{'x' * 40}' does"),
        ([(0, 10)], "characters 0 to 10 are not .* which has 9"),
        ([(4, 4)], "characters 4 to 4"),
        ([(5, 4)], "characters 5 to 4"),
        ([(-2, 4)], "characters -2 to 4"),
        ([(0, 1.5)], r"got \(0, 1.5\)"),
        ([7], "got 7"),
        ([None], "got None"),
    ],
    ids=str,
)
def test_parts_that_are_not_there(parts, said):
    with pytest.raises(KVzipError, match=said):
        characters("ab ab a\nb", parts)


@st.composite
def tokenised(draw) -> tuple[list[tuple[int, int]], int]:
    """Characters of tokens, with gaps between them and characters of several tokens."""
    offsets, position = [], 0
    for _ in range(draw(st.integers(1, 8))):
        start = position + draw(st.integers(0, 2))
        position = start + draw(st.integers(1, 3))
        offsets += [(start, position)] * draw(st.integers(1, 3))
    return offsets, position


@given(tokenised(), st.data())
def test_tokens_hold_all_characters_of_a_span(drawn, data):
    offsets, length = drawn
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    owners: list[set[int]] = []  # tokens of each character; in a gap, those behind it
    for c in range(length):
        inside = {i for i, (a, b) in enumerate(offsets) if a <= c < b}
        behind = min(a for a, _ in offsets if a > c) if not inside else None
        owners.append(inside or {next(i for i, (a, _) in enumerate(offsets) if a == behind)})
    held = set.union(*owners[start:end])
    assert tokens(offsets, [(start, end)]) == [(min(held), max(held) + 1)]


def test_characters_behind_the_last_token():
    with pytest.raises(KVzipError, match="no token holds characters 3 to 5"):
        tokens([(0, 2), (2, 3)], [(3, 5)])


def test_spans_are_the_tokens_of_texts():
    model = shared_model()
    context = "Chloé keeps 902 in the blue box 文字. Ada keeps 417. <|im_end|> Ada keeps 38."
    ids = model.prompts.context_ids(context)
    parts = ["Ada keeps", "文字", "oé", "<|im_end|>", (12, 15), (0, len(context))]
    spans = model.spans(context, parts)
    texts = ["Ada keeps", "Ada keeps", "文字", "oé", "<|im_end|>", "902", context]
    assert len(spans) == len(texts)
    for (start, end), text in zip(spans, texts, strict=True):
        assert text in model.tokenizer.decode(ids[start:end])
        shorter = [ids[start + 1 : end], ids[start : end - 1]]
        assert all(text not in model.tokenizer.decode(part) for part in shorter)
    assert spans[-1] == (0, len(ids))
    kv = model.prefill(context).prune(0.9, keep=spans[:3])
    assert all(kv.kept[..., start:end].all() for start, end in spans[:3])


def test_spans_need_text_and_a_fast_tokenizer(monkeypatch):
    model = make_model()
    with pytest.raises(KVzipError, match="name those to keep by number"):
        model.spans(torch.tensor([1, 2]), ["a"])
    with pytest.raises(KVzipError, match="in brackets"):
        model.spans(TEXT, "quick")
    monkeypatch.setattr(type(model.tokenizer), "is_fast", False)
    with pytest.raises(KVzipError, match="load a fast tokenizer, or name the tokens"):
        model.spans(TEXT, ["quick"])


def test_a_threshold_of_zero_is_asked_for():
    assert Budget(threshold=0.0).asked() == {"threshold": 0.0}
    with pytest.raises(KVzipError, match="leave out threshold"):
        Budget.of(Budget(0.3), threshold=0.0)
    assert Budget.of(Budget(0.3), min_per_head=0, keep=(), tokens=None) == Budget(0.3)
