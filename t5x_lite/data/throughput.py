"""How fast text becomes tokens, and tokens become batches, on this machine."""

import time
from typing import Any

from t5x_lite.config import RunConfig
from t5x_lite.data import recipe
from t5x_lite.data.pipeline import Dataset
from t5x_lite.data.sources import Source
from t5x_lite.data.streaming import StreamingDataset
from t5x_lite.data.token_cache import build_cache
from t5x_lite.data.tokenizers import ByteTokenizer, Tokenizer

_ALONE_CHARACTERS = 20_000_000  # as much text as the tokenizer alone is tried on


def cache_rate(data: recipe.RunData, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Builds the token caches of a run, and compares with the tokenizer alone.

    Returns:
        `cache_tokens_per_second`, of the clock, with all cores; `tokenizer_tokens_per_second`, of the tokenizer alone
        on one core, on (the first part of) the same texts; `cache_ratio`, the first over the second.
    """
    tokens = seconds = alone_tokens = alone_seconds = 0.0
    for task in data.tasks:
        for source in task.sources:
            began = time.perf_counter()
            cache = build_cache(source, task.encoder(tokenizer), recipe.cache_root(config.data))
            seconds += time.perf_counter() - began
            tokens += sum(int(feature.offsets[-1]) for feature in cache.features.values())
            found = _alone(task, source, tokenizer)
            alone_tokens, alone_seconds = alone_tokens + found[0], alone_seconds + found[1]
    rates = tokens / seconds, alone_tokens / alone_seconds
    return {
        "cache_tokens": int(tokens),
        "cache_tokens_per_second": rates[0],
        "tokenizer_tokens_per_second": rates[1],
        "cache_ratio": rates[0] / rates[1],
    }


def _alone(task: recipe.TaskData, source: Source, tokenizer: Tokenizer) -> tuple[int, float]:
    texts, size = [], 0
    for example in recipe.texts_of(task.encoder(ByteTokenizer()), source):
        texts += example
        size += sum(map(len, example))
        if size > _ALONE_CHARACTERS:
            break
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens, time.perf_counter() - began


def batch_rate(dataset: Dataset | StreamingDataset, batches: int) -> dict[str, Any]:
    """Makes batches one after the other.

    Returns:
        `batch_tokens_per_second`: tokens of both sides of the rows, without padding, per second of processor time, on
        one core;
        `padding`: the share of the rows' places that nothing stands in.
    """
    load = dataset.loader(0)
    load(0)  # what is laid out once for all batches
    began = time.process_time()
    made = [load(step) for step in range(1, batches + 1)]
    seconds = time.process_time() - began
    segments = [value for batch in made for key, value in batch.items() if key.endswith("_segment_ids")]
    real = sum(int((array > 0).sum()) for array in segments)
    return {
        "batch_tokens_per_second": real / seconds,
        "padding": 1 - real / sum(array.size for array in segments),
    }
