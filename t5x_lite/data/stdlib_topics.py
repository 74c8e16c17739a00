"""A small task that needs no download: naming the package that a text of the standard library is from."""

import collections
import hashlib
import re

from t5x_lite.data.corpus import stdlib_documents
from t5x_lite.errors import InputError

Pair = tuple[str, str]

_WORDS = 30


def stdlib_topic_pairs(
    num_classes: int = 6, per_class: int = 300, seed: int = 0, validation_fraction: float = 0.2
) -> tuple[list[Pair], list[Pair]]:
    """Returns (train, validation) pairs: the first 30 words of a standard-library text, and the package it is from.

    The classes are the packages with most text; each has `per_class` different texts, `validation_fraction` of them for
    validation, so the majority baseline is 1 / num_classes on either side. Inputs read `topic: ...`, with the name of
    every class replaced by `_`. A text that two classes share is left out. Which texts are taken, their side and their
    order follow from a hash of their content and `seed`.

    Raises:
        InputError: if the library does not have so many packages with so many texts, or a side would be empty.
    """
    documents = list(stdlib_documents())
    packages = {document.package for document in documents if "." in document.module}
    amount = collections.Counter[str]()
    for document in documents:
        if document.package in packages:
            amount[document.package] += len(document.text)
    classes = [name for name, _ in sorted(amount.items(), key=lambda item: (-item[1], item[0]))[:num_classes]]
    num_validation = round(per_class * validation_fraction)
    if not 2 <= num_classes == len(classes):
        raise InputError(f"num_classes {num_classes}: must be from 2 to {len(packages)}, the packages of the library")
    if not 0 < num_validation < per_class:
        raise InputError(f"per_class {per_class} with validation_fraction {validation_fraction} leaves a side empty")

    names = re.compile("|".join(map(re.escape, sorted(classes, key=len, reverse=True))), re.IGNORECASE)
    owners: dict[str, set[str]] = {}
    for document in documents:
        if document.package in classes:
            text = "topic: " + names.sub("_", " ".join(document.text.split()[:_WORDS]))
            owners.setdefault(text, set()).add(document.package)
    train: list[Pair] = []
    validation: list[Pair] = []
    for name in classes:
        pairs = [(text, name) for text, of in owners.items() if of == {name}]
        if len(pairs) < per_class:
            raise InputError(f"per_class {per_class}: package '{name}' has only {len(pairs)} different texts")
        pairs.sort(key=lambda pair: _rank(pair, seed))
        validation += pairs[:num_validation]
        train += pairs[num_validation:per_class]
    # Under another hash, or the classes would come interleaved in the order in which they were taken.
    train.sort(key=lambda pair: _rank(pair[0], seed))
    validation.sort(key=lambda pair: _rank(pair[0], seed))
    return train, validation


def _rank(content: object, seed: int) -> bytes:
    """Returns what puts contents in an order that only they and the seed decide."""
    salt = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=8, salt=salt).digest()
    return digest[::-1]
