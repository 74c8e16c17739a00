"""How well a vocabulary fits a corpus."""

import dataclasses
from collections.abc import Iterable

from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenizerReport:
    """How well a vocabulary fits a corpus.

    Attributes:
        lines: the number of texts looked at.
        unknown_rate: the fraction of tokens that are the unknown token.
        round_trip_failures: the fraction of lines that encoding and decoding does not give back exactly.
        lost_whitespace: the fraction of lines, among these, that differ in whitespace alone.
        tokens_per_word: tokens for each whitespace-separated word.
        bytes_per_token: UTF-8 bytes of text for each token.
    """

    lines: int
    unknown_rate: float
    round_trip_failures: float
    lost_whitespace: float
    tokens_per_word: float
    bytes_per_token: float


def check_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerReport:
    """Measures a tokenizer on texts; raises InputError if there are none."""
    lines = tokens = unknown = failures = whitespace = words = size = 0
    for text in texts:
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        lines += 1
        tokens += len(ids)
        unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        failures += back != text
        whitespace += back != text and "".join(back.split()) == "".join(text.split())
        words += len(text.split())
        size += len(text.encode(errors="replace"))
    if not lines:
        raise InputError("no text to check the tokenizer on")
    return TokenizerReport(
        lines=lines,
        unknown_rate=unknown / max(tokens, 1),
        round_trip_failures=failures / lines,
        lost_whitespace=whitespace / lines,
        tokens_per_word=tokens / max(words, 1),
        bytes_per_token=size / max(tokens, 1),
    )
