"""`kvzip chat`: a conversation about a zipped document."""

import io
import sys
from collections.abc import Iterator

from rich.console import Console

from kvzip.cli.budget import warnings_shown
from kvzip.cli.load_model import open_file
from kvzip.cli.options import Device, KvzFile, MaxNewTokens, ModelOfFile, check_questions
from kvzip.cli.shrinking import Shrink, ShrinkScorer, ShrinkThreshold, shrinking
from kvzip.errors import KVzipError

EXAMPLES = "Example:\n\nkvzip chat report.kvz"


def chat(
    file: KvzFile,
    model: ModelOfFile = None,
    max_new_tokens: MaxNewTokens = None,
    shrink: Shrink = None,
    shrink_threshold: ShrinkThreshold = None,
    shrink_scorer: ShrinkScorer = None,
    device: Device = None,
) -> None:
    """Talk about a zipped document.

    /forget starts over, /quit or Ctrl-D ends. Ctrl-C stops an answer and forgets its question.
    """
    how = shrinking(shrink, shrink_threshold, shrink_scorer)
    kvzip_model, context = open_file(file, model, device=device)
    if how is not None:
        with warnings_shown():
            kvzip_model.check_shrinking(context, how)
    from transformers import TextStreamer

    notes = Console(stderr=True, style="dim", highlight=False)
    if sys.stdin.isatty():
        notes.print(
            f"{context.document.context_length:,} tokens of {context.origin.model_id}. "
            "/forget starts over, /quit ends"
        )
    streamer = TextStreamer(kvzip_model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    kv = context.fork()
    for question in _questions(notes):
        if question == "/quit":
            break
        if question == "/forget":
            kv = context.fork()
            notes.print("forgotten: the conversation starts over")
            continue
        try:
            check_questions([question])
            with warnings_shown():
                kvzip_model.generate(
                    question,
                    kv=kv,
                    update_cache=True,
                    streamer=streamer,
                    shrink=how,
                    max_new_tokens=max_new_tokens,
                )
        except KeyboardInterrupt:
            print()
            notes.print("stopped: question and answer are forgotten")
            streamer = TextStreamer(
                kvzip_model.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        except KVzipError as error:
            notes.print(f"{error}. /forget starts over")


def _questions(notes: Console) -> Iterator[str]:
    """Lines of the standard input that say something, asked for on a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (gives `input` editing and history)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            notes.print("\n/quit or Ctrl-D ends")
            continue
        if line:
            yield line
