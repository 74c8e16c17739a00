import threading
import time

import numpy as np
import pytest

from t5x_lite.data.objectives import CausalLM, SpanCorruption
from t5x_lite.data.pipeline import prefetch, text_dataset, text_to_text_dataset
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.data.tokens import tokenize
from t5x_lite.errors import InputError

BYTES = ByteTokenizer()
TEXTS = [f"Document {i} says {'something ' * (i % 4)}of its own." for i in range(60)]
PAIRS = [(f"in {i}", f"out {i}") for i in range(10)]


def spans(**changes):
    arguments = {"input_length": 32, "target_length": None, "batch_size": 8, "seed": 3} | changes
    return text_dataset(TEXTS, BYTES, SpanCorruption(), **arguments)


def pairs(**changes):
    arguments = {"input_length": 8, "target_length": 8, "batch_size": 4, "seed": 3} | changes
    return text_to_text_dataset(PAIRS, BYTES, **arguments)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def inputs_of(batch):
    return [BYTES.decode(row) for row in batch["encoder_input_tokens"]]


# --- the order of the data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [spans, pairs])
def test_a_batch_depends_on_seed_and_step_alone(build):
    first, second = build(), build()
    for step in (0, 3, 1):
        second.batch(step)
    assert_equal(first.batch(7), second.batch(7))
    assert_equal(first.batch(10**9), second.batch(10**9))
    assert any((first.batch(7)[key] != build(seed=4).batch(7)[key]).any() for key in first.batch(7))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_every_example_once_an_epoch_whatever_the_batch_size(batch_size):
    dataset = pairs(batch_size=batch_size)
    steps = -(-10 * 4 // batch_size)
    stream = [text for step in range(steps) for text in inputs_of(dataset.batch(step))]
    epochs = [stream[i * 10 : i * 10 + 10] for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(text for text, _ in PAIRS)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in an order of its own
    assert stream[:40] == [text for step in range(40) for text in inputs_of(pairs(batch_size=1).batch(step))]


def test_an_example_is_corrupted_afresh_every_epoch():
    texts = ["".join(chr(32 + i % 90) for i in range(35))]  # one window
    dataset = text_dataset(texts, BYTES, SpanCorruption(), 32, None, batch_size=1, seed=0)
    assert dataset.num_examples == 1
    assert len({tuple(dataset.batch(step)["encoder_input_tokens"][0]) for step in range(20)}) > 10


def test_the_draws_do_not_depend_on_the_batch_size():
    by_one, by_eight = spans(batch_size=1), spans(batch_size=8)
    rows = [by_one.batch(step) for step in range(16, 24)]
    assert_equal({key: np.concatenate([row[key] for row in rows]) for key in rows[0]}, by_eight.batch(2))


@pytest.mark.parametrize("build", [spans, pairs])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_rows_of_the_hosts_make_up_the_global_batch(build, process_count):
    dataset = build()
    for step in (0, 2, 5):
        shares = [dataset.batch(step, index, process_count) for index in range(process_count)]
        joined = {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}
        assert_equal(joined, dataset.batch(step))
    hosts = [list(dataset.eval_batches(index, process_count)) for index in range(process_count)]
    for batch, *shares in zip(dataset.eval_batches(), *hosts, strict=True):
        assert_equal(batch, {key: np.concatenate([share[key] for share in shares]) for key in batch})


def test_shapes_are_constant():
    dataset = spans()
    shapes = {key: value.shape for key, value in dataset.batch(0).items()}
    assert set(shapes.values()) == {(8, 32), (8, dataset.target_length)}
    for batch in [*map(dataset.batch, range(30)), *dataset.eval_batches()]:
        assert {key: value.shape for key, value in batch.items()} == shapes


def test_evaluation_takes_every_example_once_in_order_and_pads_the_last_batch():
    batches = list(pairs().eval_batches())
    assert [text for batch in batches for text in inputs_of(batch)] == [text for text, _ in PAIRS] + ["", ""]
    assert batches[-1]["decoder_loss_weights"].sum(axis=1).tolist() == [6, 6, 0, 0]
    assert not batches[-1]["encoder_segment_ids"][2:].any()
    for a, b in zip(spans(seed=1).eval_batches(), spans(seed=2).eval_batches(), strict=True):
        assert_equal(a, b)  # validation losses of runs with different seeds can be compared


# --- building -------------------------------------------------------------------------------------------------------


def test_windows_cross_documents_and_hold_every_token_once():
    tokens = tokenize(TEXTS, BYTES)
    raw = SpanCorruption().raw_length(32)
    dataset = spans()
    assert dataset.num_examples == -(-len(tokens.flat) // raw)
    whole = []
    for batch in dataset.eval_batches():
        for row, target in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True):
            pieces = BYTES.decode(target).split("<extra_id_")[1:]
            text = BYTES.decode(row)
            for piece in pieces:
                number, span = piece.split(">", 1)
                text = text.replace(f"<extra_id_{number}>", span)
            whole.append(text)
    assert "".join(whole) == "".join(TEXTS)


@pytest.mark.parametrize(("extra", "num_examples"), [(0, 2), (1, 2), (2, 3)])
def test_a_remainder_shorter_than_two_tokens_is_dropped(extra, num_examples):
    raw = SpanCorruption().raw_length(32)
    dataset = text_dataset(["x" * (2 * raw + extra)], BYTES, SpanCorruption(), 32, None, 2, seed=0)
    assert dataset.num_examples == num_examples
    dataset.batch(0), list(dataset.eval_batches())


def test_full_windows_leave_no_padding():
    dataset = text_dataset(["x" * 10_000], BYTES, SpanCorruption(0.15, 9.0), 256, None, 4, seed=0)
    batch = next(dataset.eval_batches())
    assert batch["encoder_segment_ids"].all()
    assert batch["decoder_segment_ids"].all()
    assert (batch["encoder_input_tokens"][:, -1] == 1).all()
    assert (batch["decoder_target_tokens"][:, -1] == 1).all()


def test_text_to_text_counts_what_it_cuts():
    examples = [("abcdefg", "x"), ("abcdefgh", "xyz"), ("", "")]
    dataset = text_to_text_dataset(examples, BYTES, 8, 3, batch_size=3, seed=0, decoder_start_id=2)
    assert dataset.components[0].examples.truncated() == (1, 1)
    batch = next(dataset.eval_batches())
    assert inputs_of(batch) == ["abcdefg", "abcdefg", ""]
    assert batch["decoder_target_tokens"].tolist() == [[123, 1, 0], [123, 124, 1], [1, 0, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[2, 123, 0], [2, 123, 124], [2, 0, 0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spans(input_length=512), "28 spans but the tokenizer has 11 sentinels"),
        (lambda: spans(input_length=2), "input_length 2"),
        (lambda: spans(batch_size=0), "batch_size 0: must be at least 1"),
        (lambda: spans(seed=-1), "seed -1: must be an integer from 0"),
        (lambda: spans().batch(-1), "step -1: must be 0 or more"),
        (lambda: spans().batch(0, 0, 3), "batch_size 8: must be a multiple of the 3 processes"),
        (lambda: spans().batch(0, 2, 2), "process_index 2: must be from 0 to 1"),
        (lambda: pairs(input_length=1), "input_length 1: must be at least 2"),
        (lambda: text_to_text_dataset([], BYTES, 8, 8, 1, 0), "no pairs of inputs and targets"),
        (
            lambda: text_dataset(["x"], BYTES, SpanCorruption(), 32, None, 1, 0),
            "no examples in data: too little data",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


# --- prefetch -------------------------------------------------------------------------------------------------------


def prefetch_threads():
    deadline = time.monotonic() + 5  # a pool's threads end a moment after it is closed
    while (alive := [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    return alive


def test_prefetch_gives_every_step_in_order():
    assert list(prefetch(lambda step: step**2, 3, 7)) == [(3, 9), (4, 16), (5, 25), (6, 36)]
    assert list(prefetch(lambda step: step, 3, 3)) == []
    assert not prefetch_threads()


def test_prefetch_loads_ahead_but_not_without_bound():
    loaded = []
    steps = prefetch(lambda step: loaded.append(step), 0, 100, depth=3)
    next(steps)
    deadline = time.monotonic() + 5
    while len(loaded) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= len(loaded) <= 6  # one taken, three waiting, and one or two on their way
    steps.close()
    assert not prefetch_threads()


def test_prefetch_raises_the_error_of_its_step_with_its_type():
    def load(step):
        if step == 2:
            raise InputError("bad record")
        return step

    steps = prefetch(load, 0, 10)
    assert [next(steps), next(steps)] == [(0, 0), (1, 1)]
    with pytest.raises(InputError, match="bad record"):
        next(steps)
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [1, 2])
def test_prefetch_ends_its_thread_when_the_consumer_stops_early(depth):
    for taken in range(10):
        for step, _ in prefetch(lambda step: time.sleep(0.0005), 0, 10**9, depth=depth):
            if step == taken % 5:
                break
        assert not prefetch_threads()


# --- causal language modelling --------------------------------------------------------------------------------------


def test_causal_windows_hold_every_token_once_with_an_eos_after_each_text() -> None:
    tokenizer = ByteTokenizer()
    texts = ["first", "the second one", "3"]
    dataset = text_dataset(texts, tokenizer, CausalLM(), 8, None, batch_size=2, seed=0, decoder_start_id=7)
    expected = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    rows = [row for batch in dataset.eval_batches() for row in zip(*batch.values(), strict=True)]
    names = list(dataset.batch(0))
    assert not [name for name in names if name.startswith("encoder")]
    seen: list[int] = []
    for values in rows:
        row = dict(zip(names, values, strict=True))
        real = row["decoder_loss_weights"] > 0
        np.testing.assert_array_equal(real, row["decoder_segment_ids"] > 0)
        # What the decoder reads is the start token, then each target one place later.
        assert row["decoder_input_tokens"][0] == (7 if real.any() else tokenizer.pad_id)
        np.testing.assert_array_equal(
            row["decoder_input_tokens"][1:][real[1:]], row["decoder_target_tokens"][:-1][real[1:]]
        )
        seen += row["decoder_target_tokens"][real].tolist()
    assert seen == expected
    assert dataset.num_examples == -(-len(expected) // 8)


def test_causal_language_modelling_needs_text_and_a_length() -> None:
    with pytest.raises(InputError, match="no examples"):
        text_dataset([], ByteTokenizer(), CausalLM(), 8, None, batch_size=2, seed=0)
    with pytest.raises(InputError, match="at least 1 token"):
        text_dataset(["a"], ByteTokenizer(), CausalLM(), 0, None, batch_size=2, seed=0)
