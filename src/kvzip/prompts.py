"""Every string that is put around a context, and the split of a tokenizer's chat template.

    prefix | context | "\\n\\n" + query | suffix | answer | turn | query | suffix | answer | ...

Strings of the repeat requests and instructions: Kim et al., "KVzip", arXiv 2505.23416.
"""

from dataclasses import dataclass

import jinja2
from torch import Tensor, cat, tensor
from transformers import PreTrainedTokenizerBase

from kvzip.errors import KVzipError

SYSTEM = "You are a helpful assistant."
INSTRUCTIONS = {
    "default": (
        "Given the context, answer to the following question or request without explanation."
    ),
    "gsm": "Given the context, answer to the following reasoning question.",
}
REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
REPEAT_FROM_TOKENS = 8
"""Tokens of the preceding chunk that a repeat request quotes."""

# Plain words without outer space, so that no template trims or escapes them.
_CONTEXT, _ANSWER, _QUERY = "KVZIPCONTEXT", "KVZIPANSWER", "KVZIPQUERY"


@dataclass(frozen=True)
class ChatParts:
    """A chat template in pieces: `prefix`, context, query, `suffix`, answer, `turn`, query, ..."""

    prefix: str
    suffix: str
    turn: str


def split_chat_template(tokenizer: PreTrainedTokenizerBase, instruction: str) -> ChatParts:
    """Split a tokenizer's chat template around the places of context, answer and next query.

    Templates without a system role get the system text at the head of the user's turn; tokenizers
    without a template get plain text. Thinking is switched off where the template has the switch.

    Raises:
        KVzipError: if the template does not print what it is given.
    """
    head = f"{instruction}\n\n{_CONTEXT}"
    if tokenizer.chat_template is None:
        return ChatParts(f"{tokenizer.bos_token or ''}{instruction}\n\n", "\n\nAnswer:", "\n\n")
    system = {"role": "system", "content": SYSTEM}
    try:
        messages = [system, {"role": "user", "content": head}]
        first = _render(tokenizer, messages)
    except jinja2.TemplateError:
        messages = [{"role": "user", "content": f"{SYSTEM}\n\n{head}"}]
        first = _render(tokenizer, messages)
    answered = [
        *messages,
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _QUERY},
    ]
    second = _render(tokenizer, answered)
    prefix, found, suffix = first.partition(_CONTEXT)
    _, found_answer, rest = second.partition(_ANSWER)
    turn, found_query, _ = rest.partition(_QUERY)
    if not (found and found_answer and found_query):
        raise KVzipError("the tokenizer's chat template does not print the messages it is given")
    return ChatParts(prefix, suffix, turn)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )


@dataclass(frozen=True)
class Prompts:
    """Turns text into token ids, piece by piece as the pieces are cached.

    Text of users (contexts and queries) never becomes a special token, whatever it spells.

    Args:
        tokenizer: the model's tokenizer.
        parts: its chat template in pieces.
    """

    tokenizer: PreTrainedTokenizerBase
    parts: ChatParts

    def prefix_ids(self) -> Tensor:
        """`[p]`, int64: what stands in front of every context and is never evicted."""
        return self._template_ids(self.parts.prefix)

    def context_ids(self, text: str) -> Tensor:
        """`[n]`, int64.

        Raises:
            KVzipError: if there is no text.
        """
        ids = self._text_ids(text)
        if not len(ids):
            raise KVzipError("the context is empty: give some text to read")
        return ids

    def context_offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters, of each token of a context.

        Raises:
            KVzipError: if the tokenizer does not say.
        """
        if not self.tokenizer.is_fast:
            raise KVzipError(
                f"{type(self.tokenizer).__name__} does not say which characters its tokens hold: "
                "load a fast tokenizer, or name the tokens to keep by number"
            )
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        return list(map(tuple, encoded["offset_mapping"]))

    def query_ids(self, query: str) -> Tensor:
        """`[t]`, int64: a question directly behind the context, with the suffix.

        Raises:
            KVzipError: if the question is empty.
        """
        return cat([self._text_ids("\n\n" + _stripped(query)), self._suffix_ids()])

    def turn_ids(self, query: str) -> Tensor:
        """`[t]`, int64: a question behind an earlier answer, with the suffix.

        An answer ends with the template's end of turn or was cut off before it; the first token of
        `turn` is that end, so `ModelKVzip.apply_template` drops it where it is there already.

        Raises:
            KVzipError: if the question is empty.
        """
        turn = self._template_ids(self.parts.turn)
        return cat([turn, self._text_ids(_stripped(query)), self._suffix_ids()])

    def repeat_ids(self, before: Tensor | None, chunk: Tensor) -> Tensor:
        """`[t]`, int64: the request to repeat a chunk, followed by the chunk itself.

        Args:
            before: the tokens of the chunk before this one, None for the first.
            chunk: `[m]`, int64.
        """
        if before is None:
            request = self._text_ids(REPEAT_FIRST)
        else:
            request = cat([self._text_ids(REPEAT_FROM), before[-REPEAT_FROM_TOKENS:]])
        return cat([request, self._suffix_ids(), chunk])

    def decode(self, ids: Tensor) -> str:
        """Text of `[t]` token ids without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _suffix_ids(self) -> Tensor:
        return self._template_ids(self.parts.suffix)

    def _template_ids(self, text: str) -> Tensor:
        return tensor(self.tokenizer.encode(text, add_special_tokens=False)).long()

    def _text_ids(self, text: str) -> Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return tensor(ids).long()


def _stripped(query: str) -> str:
    if not query.strip():
        raise KVzipError("the question is empty")
    return query.strip()
