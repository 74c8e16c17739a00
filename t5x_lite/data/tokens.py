"""Token ids of many texts in one array, and the hashes that tell texts and tokenizers apart."""

import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from t5x_lite.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of many texts in one array: `flat` [total], uint16 where the vocabulary allows, else int32.

    `offsets` int64 [texts + 1]: text i is `flat[offsets[i]:offsets[i + 1]]`. Both may be memory-mapped files.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, int64 [texts]."""
        return np.diff(self.offsets)


def id_type(vocab_size: int) -> str:
    """Returns the name of the narrowest type that token ids are kept in, `uint16` or `int32`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """Encodes texts, without EOS, a thousand at a time."""
    dtype = np.dtype(id_type(tokenizer.vocab_size))
    parts, lengths = [np.zeros(0, dtype)], [0]
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, 1000)):
        encoded = tokenizer.encode_batch(chunk)
        lengths += map(len, encoded)
        parts.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
    return Tokens(np.concatenate(parts), np.cumsum(lengths, dtype=np.int64))


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Returns a line that is the same for tokenizers with equal saved files: class, size and a hash of the files."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for file in sorted(Path(folder).iterdir()):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return f"{type(tokenizer).__name__} of {tokenizer.vocab_size} ids, {digest.hexdigest()[:16]}"


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """Returns uint64 [texts]: the 8 bytes of each one's BLAKE2b digest of that size, as a little-endian number."""
    digests = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.dtype("<u8"))
