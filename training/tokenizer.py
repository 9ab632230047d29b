"""Train the bundled model's tokenizer: a byte-level BPE in which every digit stands alone.

python training/tokenizer.py            # writes src/kvzip/assets/tiny/tokenizer*.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvzip.synthetic import FAMILIES, make_document

TINY = Path(__file__).parents[1] / "src" / "kvzip" / "assets" / "tiny"
VOCABULARY = 1536
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Words with the space before them, single digits, runs of punctuation, line ends, spaces.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
PHRASES = (
    "You are a helpful assistant.",
    "Given the context, answer to the following question or request without explanation.\n\n",
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with ",
    "system\n",
    "user\n",
    "assistant\n",
)


def texts(documents: int) -> Iterator[str]:
    """Yield the text to learn from: contexts, questions, answers and the phrases around them."""
    for seed in range(documents):
        rng = Random(seed)
        families = rng.sample(sorted(FAMILIES), rng.randint(1, len(FAMILIES)))
        document = make_document(
            families, seed=f"tokenizer {seed}", tokens=3000, count_tokens=lambda text: len(text)
        )
        yield document.context
        for question in rng.sample(document.questions, min(10, len(document.questions))):
            yield f"\n\n{question.text}"
            yield question.answer
            yield rng.choice(PHRASES)


def train(documents: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `VOCABULARY` entries learnt from that many documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=TINY)
    arguments = parser.parse_args()
    train(arguments.documents).save_pretrained(arguments.out)
