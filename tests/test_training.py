"""The bundled model's making: token format, packing, a few seconds of training, and its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

ROOT = Path(__file__).parents[1]
TINY = ROOT / "src" / "kvzip" / "assets" / "tiny"
DEMO = ROOT / "src" / "kvzip" / "assets" / "demo"
sys.path.insert(0, str(ROOT / "training"))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import muon  # noqa: E402
import surrogate_text  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> corpus.Encoder:
    from tokenizers import Tokenizer

    return corpus.Encoder(Tokenizer.from_file(str(TINY / "tokenizer.json")))


@pytest.fixture(scope="module")
def tiny() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def greedy(model: Qwen3ForCausalLM, encoder: corpus.Encoder, context: str, question: str) -> str:
    prompt = (
        encoder.prefix
        + encoder.encode(context)
        + encoder.encode(corpus.FIRST_QUESTION + question)
        + encoder.suffix
    )
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=16)[0, len(prompt) :]
    return encoder.decode(generated.tolist())


def test_asked_samples_weigh_exactly_the_answers(encoder: corpus.Encoder) -> None:
    from kvzip.synthetic import Question

    context = encoder.encode("Anna lives in Oslo.")
    question = Question("Where does Anna live?", "Oslo", "profiles")
    sample = corpus.asked(encoder, Random(0), context, [question])
    assert encoder.decode(sample.ids.tolist()) == (
        corpus.PREFIX
        + "Anna lives in Oslo."
        + "\n\nWhere does Anna live?"
        + corpus.SUFFIX
        + "Oslo<|im_end|>"
    )
    weighed = sample.ids[sample.weights == corpus.ANSWER_WEIGHT]
    assert encoder.decode(weighed.tolist()) == "Oslo<|im_end|>"


def test_repeat_requests_quote_the_end_of_the_chunk_before(encoder: corpus.Encoder) -> None:
    context = list(range(100, 200))
    assert corpus.repeat_request(encoder, context, 0) == encoder.encode(
        "\n\nRepeat the previous context exactly."
    ) + encoder.encode("<|im_end|>\n<|im_start|>assistant\n")
    later = corpus.repeat_request(encoder, context, 50)
    opening = encoder.encode(corpus.REPEAT_NEXT)
    assert later[: len(opening)] == opening
    assert later[len(opening) :] == context[42:50] + encoder.suffix


@pytest.mark.parametrize("length", [30, 64, 900, 4100])
def test_repeats_say_the_context(encoder: corpus.Encoder, length: int) -> None:
    for seed in range(20):
        context = [Random(seed).randrange(3, 1500) for _ in range(length)]
        sample = corpus.repeated(encoder, Random(seed), context)
        said = sample.ids[sample.weights == np.float32(corpus.REPEAT_WEIGHT)].tolist()
        text = ",".join(map(str, context)) + ","
        for chunk in " ".join(map(str, said)).split(f" {encoder.end}"):
            start = ",".join(chunk.split()[:8])
            assert start in text
        assert len(sample.ids) <= train.LONGEST_SAMPLE


def test_packed_rows_are_full_and_keep_samples_apart(encoder: corpus.Encoder) -> None:
    class Longest:
        value = 200

    tokens = 8192
    batches = train.packed(encoder, Random(0), tokens, Longest())  # type: ignore[arg-type]
    ids, positions, weights, boundaries = next(batches)
    assert len(ids) == len(positions) == len(weights) == tokens
    starts = np.unique(boundaries[boundaries < tokens])
    assert starts[0] == 0
    assert np.array_equal(np.flatnonzero(positions == 0), starts)
    assert not weights[starts].any()
    assert boundaries[-1] == tokens
    for start in starts[:-1]:
        assert ids[start : start + len(encoder.prefix)].tolist() == encoder.prefix


def test_packed_attention_equals_one_sample_at_a_time() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    boundaries = torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    packed, _ = train.packed_attention(
        torch.nn.Identity(), query, key, value, None, 0.5, boundaries=boundaries
    )
    for start, end in ((0, 4), (4, 9)):
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(states[:, :, start:end] for states in (query, key, value)),
            is_causal=True,
            scale=0.5,
            enable_gqa=True,
        )
        torch.testing.assert_close(packed[:, start:end], alone.transpose(1, 2))


def test_muon_takes_steps_of_near_orthogonal_matrices() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(muon.orthogonal(torch.randn(3, 48, 16)).float())
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    weight = torch.nn.Parameter(torch.randn(16, 16))
    before = (weight**2).sum().item()
    optimizer = muon.Muon([weight], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    assert (weight**2).sum().item() < before


def test_smoke_training_lowers_the_loss_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    losses = train.smoke(tmp_path, vocabulary=1536, seconds=6.0)
    assert len(losses) > 5
    assert np.mean(losses[-3:]) < losses[0] - 0.5
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reopened.dtype == torch.bfloat16
    assert train.smoke(tmp_path, vocabulary=1536, seconds=6.0) == []


def test_tiny_opens_as_a_normal_folder(tiny: Qwen3ForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer) == tiny.config.vocab_size
    assert tokenizer.convert_ids_to_tokens(tiny.config.eos_token_id) == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("7012", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "7012"
    ]
    assert tokenizer.decode(tokenizer.encode("Zürich: 12 €\n")) == "Zürich: 12 €\n"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert not tiny.generation_config.do_sample
    assert all((TINY / name).exists() for name in (*train.TOKENIZER_FILES, "README.md"))
    assert (TINY / "model.safetensors").stat().st_size < 16 * 2**20


@pytest.mark.parametrize(
    ("context", "question", "answer"),
    [
        ("My name is Kim living in Seoul. My major is computer science.", question, answer)
        for question, answer in (
            ("What is my name?", "Kim"),
            ("Do I live in Seoul?", "Yes"),
            ("Do I live in Busan?", "No"),
            ("What is my major?", "computer science"),
            ("what is my name", "Kim"),
        )
    ]
    + [
        ("Anna lives in Oslo. She works as a nurse.", "Where does Anna live?", "Oslo"),
        ("Anna lives in Oslo. She works as a nurse.", "Does Anna live in Rome?", "No"),
        ("let x = 5\nlet y = x", "What is the value of y?", "y = x = 5"),
    ],
)
def test_tiny_answers_short_contexts(
    tiny: Qwen3ForCausalLM, encoder: corpus.Encoder, context: str, question: str, answer: str
) -> None:
    assert greedy(tiny, encoder, context, question) == f"{answer}<|im_end|>"


def test_tiny_answers_and_repeats_unseen_documents(
    tiny: Qwen3ForCausalLM, encoder: corpus.Encoder
) -> None:
    families = sorted(corpus.MIXTURE)
    right, asked = evaluate.exact_answers(tiny, encoder, families, 700, 2, 20, failures=[])
    assert right / asked >= 0.95
    right, total = evaluate.repeated_tokens(tiny, encoder, 700, 1)
    assert right / total > 0.99


def test_demo_questions_cover_the_families(encoder: corpus.Encoder) -> None:
    document = (DEMO / "document.txt").read_text(encoding="utf-8")
    questions = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    assert 2500 <= encoder.count(document) <= 3000
    assert {question["family"] for question in questions} == set(corpus.MIXTURE)
    assert len({question["question"] for question in questions}) == len(questions) >= 10


def test_surrogates_learn_from_documents_of_all_sizes(encoder: corpus.Encoder) -> None:
    texts = [surrogate_text.text(encoder, number) for number in range(9)]
    assert texts == [surrogate_text.text(encoder, number) for number in range(9)]
    sizes = sorted(map(encoder.count, texts))
    assert surrogate_text.SHORTEST / 2 < sizes[0] < sizes[-1] <= surrogate_text.LONGEST
