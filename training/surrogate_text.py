"""Write the texts that the bundled model's surrogates learn from.

    python training/surrogate_text.py --out build/surrogate-text

A file a document, of the `train` split. One in three has passages of one family, one in three of a
few, one in three of all; they have 800 to 3,000 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from corpus import Encoder
from kvzip.synthetic import FAMILIES, make_document

ASSETS = Path(__file__).parents[1] / "src" / "kvzip" / "assets"
DOCUMENTS = 80
SHORTEST, LONGEST = 800, 3000


def text(encoder: Encoder, number: int) -> str:
    """Return a document."""
    rng = Random(f"surrogate-{number}")
    names = list(FAMILIES)
    families = [rng.sample(names, 1), rng.sample(names, rng.randint(2, 4)), names][number % 3]
    return make_document(
        families,
        seed=f"surrogate-{number}",
        tokens=rng.randint(SHORTEST, LONGEST),
        count_tokens=encoder.count,
    ).context


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    options = parser.parse_args()
    encoder = Encoder(Tokenizer.from_file(str(ASSETS / "tiny" / "tokenizer.json")))
    options.out.mkdir(parents=True)
    for number in range(options.documents):
        (options.out / f"{number:04}.txt").write_text(text(encoder, number), encoding="utf-8")


if __name__ == "__main__":
    main()
