"""The command line: `kvzip demo | zip | ask | ...`, a file each.

Nothing here imports torch or transformers until a command does its work, so that `--help` is
instant.
"""

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvzip import __version__
from kvzip.cli import (
    ask,
    bench,
    chat,
    demo,
    head_scores,
    inspect,
    models,
    profile,
    report,
    train_surrogate,
)
from kvzip.cli import eval as eval_
from kvzip.cli import zip as zip_
from kvzip.errors import KVzipError

BAD_INPUT = 2
INTERRUPTED = 130

NOISY = ("huggingface_hub", "torchao", "torch.utils._pytree")
"""Libraries that log more than errors, some as soon as they are imported."""

# Typer brings its own click from some version on: this is click's UsageError in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(rich_markup_mode="rich", add_completion=False)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("zip", epilog=zip_.EXAMPLES)(zip_.zip_file)
app.command("ask", epilog=ask.EXAMPLES)(ask.ask)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("eval", epilog=eval_.EXAMPLES)(eval_.evaluate)
app.command("profile", epilog=profile.EXAMPLES)(profile.profile)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("head-scores", epilog=head_scores.EXAMPLES)(head_scores.head_scores)
app.command("train-surrogate", epilog=train_surrogate.EXAMPLES)(train_surrogate.train_surrogate)
app.command("models", epilog=models.EXAMPLES)(models.models)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvzip {__version__}")
        raise typer.Exit


@app.callback(epilog="Example:\n\nkvzip demo")
def kvzip(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Read a long document once, evict most of its KV cache for real, ask it anything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: what follows the program's name, `sys.argv[1:]` if None.

    Returns:
        The exit status: 0, 2 for bad input, 130 after Ctrl-C, or 1 if something else went wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow encoding is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KVzipError as error:
        return _fail(str(error), BAD_INPUT)
    except UsageError as error:
        program = error.ctx.command_path if error.ctx else "kvzip"
        return _fail(f"{error.format_message().rstrip('.')}; see {program} --help", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left; nobody is there for what is still in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("out of memory: shorten the document or use another device or dtype", 1)
    return status


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("kvzip", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def _fail(message: str, status: int) -> int:
    print("kvzip:", " ".join(message.splitlines()), file=sys.stderr)
    return status


def _out_of_memory(error: BaseException) -> bool:
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
