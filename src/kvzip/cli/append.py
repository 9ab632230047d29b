"""`kvzip zip --append`: read further into a .kvz file."""

from pathlib import Path

from kvzip.budget import Budget
from kvzip.cli.load_model import open_file
from kvzip.cli.pieces import Pieces
from kvzip.cli.streaming import stream
from kvzip.cli.zip_report import Reading
from kvzip.errors import KVzipError


def append(
    zipped: Path,
    file: Path,
    *,
    model: str | None,
    device: str | None,
    ratio: float | None,
    chunk_size: int | None,
    budget: str,
    scorer: str | None,
    kv_dtype: str | None,
) -> Reading:
    """Read a document behind the one in a .kvz file. The file is not changed yet.

    Args:
        zipped: the .kvz file.
        file: the document, a UTF-8 text.
        model: where to find the model, None for what the file says.
        device: where to put model and cache.
        ratio: share of the new pairs to keep, that of the file if None.
        chunk_size: as in `stream`.
        budget: as in `stream`.
        scorer: as in `stream`.
        kv_dtype: what the pairs are to be quantised to, None for what the file says.

    Raises:
        KVzipError: if a file is missing or damaged, the .kvz file is another model's, was not
            scored or kept nothing and no ratio is given, or there are no positions left.
    """
    from kvzip.storage import read_header

    header = read_header(zipped)
    if header.scorer is None:
        raise KVzipError(
            f"{zipped} holds no scores to go on by: zip the document again, or save a cache that "
            "was scored before it was pruned or quantised"
        )
    if kv_dtype is not None and header.kv_dtype not in (None, kv_dtype):
        raise KVzipError(
            f"{zipped} holds {header.kv_dtype} codes, which do not turn into {kv_dtype}: leave out "
            "--kv-dtype"
        )
    amount = Budget.as_before(header.ratio) if ratio is None else Budget(ratio)
    pieces = Pieces(file)
    opened, kv = open_file(zipped, model, device=device)
    return stream(
        opened,
        pieces,
        kv,
        amount=amount,
        chunk_size=chunk_size,
        budget=budget,
        scorer=scorer,
        kv_dtype=kv_dtype,
    )
