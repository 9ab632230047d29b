"""The demonstration and its heat map, on small inputs."""

import io
import json
import statistics

import pytest
from rich.console import Console

from kvzip import ModelKVzip
from kvzip.cli import main
from kvzip.cli.demo import Answer, Question, answer_table, demonstrate
from kvzip.cli.heatmap import GLYPHS, STYLES, Piece, document_map, head_map, pieces
from kvzip.prefill import silent

DOCUMENT = "Ada keeps 417 in the red box. Chloé keeps 902 in the blue box.\n" * 4


@pytest.fixture(scope="module")
def model() -> ModelKVzip:
    return ModelKVzip()


def printed(content, *, colours: bool, width: int = 40) -> str:
    console = make_console(colours=colours, width=width)
    console.print(content(console))
    return console.file.getvalue()


def make_console(*, colours: bool, width: int) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        highlight=False,
    )


# the demonstration


def test_demonstration_compares_one_cache_with_itself(model):
    questions = [Question("Who?", "Ada"), Question("What is in the red box?")]
    shown = demonstrate(model, DOCUMENT, questions, 0.5, silent)
    n, p = shown.kv.document.context_length, shown.kv.document.prefix_length
    assert shown.bytes_zipped == shown.kv.nbytes < shown.bytes_full
    heads = shown.kv.kept.shape[0] * shown.kv.kept.shape[1]
    row = shown.bytes_full // (heads * (p + n))
    assert shown.bytes_zipped == row * (heads * p + int(0.5 * heads * n))
    assert [answer.expected for answer in shown.answers] == ["Ada", None]
    for questioned, answer in zip(questions, shown.answers, strict=True):
        zipped = model.generate(questioned.text, kv=shown.kv, max_new_tokens=48)
        full = model.generate(questioned.text, kv=model.read(DOCUMENT), max_new_tokens=48)
        assert answer.zipped == zipped.strip()
        assert answer.full == full.strip()


def test_demo_as_json(tmp_path, capsys):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, "utf-8")
    assert main(["demo", "-f", str(path), "-q", "Who?", "-q", "Where?", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert list(report) == [
        "model",
        "context_tokens",
        "ratio_requested",
        "ratio_realised",
        "kv_bytes_full",
        "kv_bytes_zipped",
        "answers",
        "seconds",
    ]
    assert [list(answer) for answer in report["answers"]] == [
        ["question", "full", "zipped", "expected"]
    ] * 2
    assert report["answers"][1]["question"] == "Where?"
    assert list(report["seconds"]) == [
        "prefill",
        "score",
        "compact",
        "decode_per_token_full",
        "decode_per_token_zipped",
    ]


def test_demo_prints_map_answers_and_bytes(tmp_path, capsys):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, "utf-8")
    assert main(["demo", "-f", str(path), "-q", "Who?", "--map-lines", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Ada keeps 417" in out
    assert "more lines" in out
    assert "Who?" in out
    assert "30.00%" in out


def test_demo_of_a_file_needs_a_question(tmp_path, capsys):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, "utf-8")
    assert main(["demo", "-f", str(path)]) == 2
    assert "--question" in capsys.readouterr().err


def test_clock_counts_the_tokens_after_the_first(model):
    from kvzip.cli.timing import TokenClock, seconds_per_token

    kv = model.read(DOCUMENT)
    clocks = {}
    for tokens in (1, 5):
        clocks[tokens] = TokenClock()
        settings = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate("Who?", kv=kv, streamer=clocks[tokens], **settings)
        assert len(clocks[tokens].times) == tokens
        assert len(clocks[tokens].steps) == tokens - 1
    assert seconds_per_token([clocks[1]]) is None
    assert sum(clocks[5].steps) == pytest.approx(clocks[5].times[-1] - clocks[5].times[0])
    assert seconds_per_token(clocks.values()) == statistics.median(clocks[5].steps)


# the heat map


def test_pieces_join_tokens_that_share_a_character():
    # each token is a byte, as in the worst case of a byte-level vocabulary
    text = "a文é🙂z"
    data = list(text.encode())
    found = list(
        pieces(data, list(range(len(data))), lambda ids: bytes(ids).decode("utf-8", "replace"))
    )
    assert [piece.text for piece in found] == list(text)
    assert [piece.share for piece in found] == [0, 2, 4.5, 7.5, 10]


@pytest.mark.parametrize("end", [b"\xff", b"\xe6\x96"], ids=["no character", "half a character"])
def test_pieces_lose_nothing_at_a_broken_end(end):
    data = [*b"ab", *end]
    found = list(pieces(data, [0.5] * len(data), lambda ids: bytes(ids).decode("utf-8", "replace")))
    assert "".join(piece.text for piece in found).startswith("ab\ufffd")


def test_pieces_of_the_bundled_tokenizer_are_the_text(model):
    text = "Ada keeps 417. Chloé: 文字 🙂\n\n\tnaïve  end"
    ids = model.prompts.context_ids(text).tolist()
    found = list(pieces(ids, [0.1] * len(ids), model.tokenizer.decode))
    assert "".join(piece.text for piece in found) == text
    assert not any("\ufffd" in piece.text for piece in found)


def test_document_map_without_colours_draws_below_the_text():
    document = [Piece("low ", 0.0), Piece("文", 0.25), Piece(" high", 0.5)]
    text = printed(lambda c: document_map(document, c, 0), colours=False)
    assert text.splitlines()[-2:] == ["low 文 high", f"    {GLYPHS[4] * 2}{GLYPHS[7] * 5}"]
    assert "50%" in text


def test_document_map_with_colours():
    document = [Piece("low ", 0.0), Piece("high", 0.5)]
    text = printed(lambda c: document_map(document, c, 0), colours=True)
    for word, style in (("low ", STYLES[0]), ("high", STYLES[-1])):
        assert style.render(word) in text


def test_document_map_shows_as_many_lines_as_asked():
    document = [Piece(f"word{i} ", 0.5) for i in range(100)]
    for lines, missing in ((3, "more lines"), (0, "")):
        text = printed(lambda c, lines=lines: document_map(document, c, lines), colours=True)
        assert missing in text
        assert ("word99" in text) == (lines == 0)
        assert ("more lines" in text) == (lines == 3)


def test_one_token_that_all_heads_kept_does_not_dim_the_others():
    document = [Piece("top\n", 1.0), *[Piece("x", 0.2)] * 200, Piece("-", 0.1)]
    text = printed(lambda c: document_map(document, c, 0), colours=False, width=100)
    assert "20% or more" in text
    assert text.splitlines()[3] == GLYPHS[-1] * 3
    assert set(text.splitlines()[5]) == {GLYPHS[-1]}


def test_document_map_of_nothing_kept():
    text = printed(lambda c: document_map([Piece("word", 0.0)], c, 0), colours=False)
    assert text.splitlines()[-2:] == ["word", " " * 4]


def test_document_map_does_not_steer_the_terminal():
    text = printed(lambda c: document_map([Piece("a\x1b[2Jb", 0.5)], c, 0), colours=False)
    assert "\x1b" not in text


def test_head_map_in_numbers_or_glyphs():
    shares = [[0.0, 0.5, 1.0], [0.25, 0.333, 0.999]]
    wide = printed(lambda c: head_map(shares, [0, 10], c), colours=False, width=80)
    assert [line.split() for line in wide.splitlines()[-2:]] == [
        ["layer", "0", "0", "50", "100"],
        ["layer", "10", "25", "33", "100"],
    ]
    narrow = printed(lambda c: head_map(shares, [0, 10], c), colours=False, width=20)
    assert narrow.splitlines()[-2].endswith(" " + GLYPHS[4] + GLYPHS[7])


# the table of answers


@pytest.mark.parametrize("width", [40, 80])
def test_answers_are_folded_not_cut(width):
    word = "tender.gate.tower.village.path.harbor"
    answer = Answer("Which string?", word, word, word)
    lines = printed(lambda c: answer_table([answer]), colours=False, width=width).splitlines()
    assert {len(line) for line in lines} == {width}
    rule = next(i for i, line in enumerate(lines) if line.startswith("├"))
    columns = zip(*(line[1:-1].split("│") for line in lines[rule + 1 : -1]), strict=True)
    joined = ["".join(column).replace(" ", "") for column in columns]
    assert joined == ["Whichstring?", word, f"✓{word}", "=", f"✓{word}"]
