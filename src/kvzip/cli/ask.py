"""`kvzip ask`: answers from a zipped document."""

import json
from typing import Annotated

import typer

from kvzip.cli.budget import warnings_shown
from kvzip.cli.load_model import open_file
from kvzip.cli.options import (
    Device,
    Json,
    KvzFile,
    MaxNewTokens,
    ModelOfFile,
    check_questions,
)
from kvzip.cli.shrinking import Shrink, ShrinkScorer, ShrinkThreshold, shrinking

EXAMPLES = 'Example:\n\nkvzip ask report.kvz "Who signed it?" "When was it signed?"'


def ask(
    file: KvzFile,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="What to ask.")],
    model: ModelOfFile = None,
    max_new_tokens: MaxNewTokens = None,
    shrink: Shrink = None,
    shrink_threshold: ShrinkThreshold = None,
    shrink_scorer: ShrinkScorer = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer questions about a zipped document, one line each."""
    check_questions(questions)
    how = shrinking(shrink, shrink_threshold, shrink_scorer)
    kvzip_model, kv = open_file(file, model, device=device)
    with warnings_shown():
        answers = kvzip_model.ask(kv, questions, shrink=how, max_new_tokens=max_new_tokens)
    if as_json:
        pairs = zip(questions, answers, strict=True)
        report = {
            "model": kvzip_model.model_id,
            "file": str(file),
            "answers": [{"question": question, "answer": answer} for question, answer in pairs],
        }
        print(json.dumps(report, indent=2))
        return
    for answer in answers:
        print(" ".join(answer.splitlines()).strip())
