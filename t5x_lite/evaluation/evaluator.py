"""Evaluates parameters on a dataset."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.errors import InputError
from t5x_lite.evaluation.metrics import bits_per_byte, exact_match, perplexity, unigram_entropy
from t5x_lite.evaluation.task_metrics import check_metrics, task_metrics


def evaluate(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    tokenizer: Tokenizer,
    mesh: Mesh,
    limit: int = 0,
) -> dict[str, float]:
    """Returns the metrics of `params` over the batches.

    Args:
      eval_step: from `training.step.make_eval_step`.
      params: parameters on the mesh.
      batches: host batches, padded with rows of weight 0.
      tokenizer: to count the bytes of the target text.
      mesh: where the parameters are.
      limit: batches to read; 0: all.

    Returns:
      `loss` (nats per real target token), `unigram_entropy` (the least loss that a model without any context could
      have on these very tokens), `perplexity`, `bits_per_byte` (of the target text, without sentinels and EOS),
      `accuracy` (share of target tokens that are the most likely one given those before) and `target_tokens`.
      Where the targets hold no text at all there is no `bits_per_byte`.

    Raises:
      InputError: there is nothing to evaluate.
    """
    nats = correct = tokens = 0.0
    num_bytes = 0
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in itertools.islice(batches, limit or None):
        sums = eval_step(params, sharding.put_batch(mesh, batch))
        nats += float(sums.cross_entropy)
        correct += float(sums.correct)
        tokens += float(sums.weight)
        side = "decoder" if "decoder_target_tokens" in batch else "encoder"
        real = batch[f"{side}_loss_weights"] > 0
        counts += np.bincount(batch[f"{side}_target_tokens"][real], minlength=len(counts))
        if side == "decoder":  # masked tokens here and there are no text
            num_bytes += sum(len(text.encode()) for text in target_texts(batch, tokenizer, sentinels=False))
    if not tokens:
        raise InputError("there are no examples to evaluate")
    *counts, num_bytes = _sum_over_processes(mesh, np.append(counts, num_bytes))
    return {
        "loss": nats / tokens,
        "unigram_entropy": unigram_entropy(np.asarray(counts)),
        "perplexity": perplexity(nats / tokens),
        **({"bits_per_byte": bits_per_byte(nats, int(num_bytes))} if num_bytes else {}),
        "accuracy": correct / tokens,
        "target_tokens": int(tokens),
    }


def _sum_over_processes(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """Returns the sum of the whole numbers `[N]` that processes have counted, each in its own rows."""
    if jax.process_count() == 1:
        return values
    shares = [sharding.batch_share(mesh, process)[0] for process in range(jax.process_count())]
    if jax.process_index() != shares.index(shares[jax.process_index()]):
        values = np.zeros_like(values)  # another process has counted the same rows
    words = np.stack([values >> 20, values & (2**20 - 1)]).astype(np.int32)  # JAX has no 64 bits by default
    layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    first, *others = mesh.local_devices
    parts = [jax.device_put(words[None], first)] + [jax.device_put(0 * words[None], device) for device in others]
    every = jax.make_array_from_single_device_arrays((mesh.size, *words.shape), layout, parts)
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=sharding.replicated(mesh))(every)
    high, low = np.asarray(total, np.int64)
    return (high << 20) + low


def target_texts(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, sentinels: bool = True) -> list[str]:
    """Returns the decoded targets of the batch's real rows, with or without their sentinels."""
    drop = () if sentinels else tokenizer.sentinels
    texts = []
    for tokens, weights in zip(batch["decoder_target_tokens"], batch["decoder_loss_weights"], strict=True):
        real = tokens[weights > 0]
        if real.size:
            texts.append(tokenizer.decode(real[~np.isin(real, drop)].tolist()))
    return texts


def generation_metrics(
    lm: Any,
    examples: Sequence[tuple[tuple[str, str], Mapping[str, Any]]],
    max_new_tokens: int,
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    batch_size: int = 32,
    max_input_tokens: int | None = None,
) -> dict[str, float]:
    """Returns `exact_match`, the share of targets that greedy generation reproduces, and what a task measures beside.

    Args:
      lm: a `LanguageModel`.
      examples: ((inputs, targets), record), as `data.recipe.pairs` yields them; the record is for the metrics.
      max_new_tokens: the most that a target may need, EOS included; fewer if the longest one here needs fewer.
      metrics: further ones, by name; see `metrics.task_metrics`.
      labels: the classes, for metrics that count by class.
      batch_size: inputs decoded together.
      max_input_tokens: longer inputs are cut, as in training; of a decoder alone, inputs and targets together.

    Raises:
      InputError: a metric that is not there.
    """
    check_metrics(metrics)
    inputs, targets = [pair[0] for pair, _ in examples], [pair[1] for pair, _ in examples]
    tokenizer = lm.require_tokenizer()
    ids = tokenizer.encode_batch(targets)
    special = max(sum(map(len, tokenizer.target_affixes)), 1)
    max_new_tokens = min(max_new_tokens, max(map(len, ids)) + special)
    if max_input_tokens is not None and not lm.config.num_encoder_layers:
        max_input_tokens = max(max_input_tokens + 1 - max_new_tokens, 1)  # the last token is not read
    outputs = lm.generate(
        inputs, max_new_tokens=max_new_tokens, batch_size=batch_size, max_input_tokens=max_input_tokens
    )
    # As the tokenizer writes them: no model can produce a character or a space that its vocabulary does not keep.
    written = [tokenizer.decode(tokens) for tokens in ids]
    found = task_metrics(metrics, outputs, [record for _, record in examples], labels) if metrics else {}
    return {"exact_match": exact_match(outputs, written), **found}
