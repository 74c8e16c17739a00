import collections
import threading
import time

import numpy as np
import pytest

from t5x_lite.data import pipeline
from t5x_lite.data.objectives import SpanCorruption
from t5x_lite.data.pipeline import (
    Tokens,
    causal_lm_dataset,
    encoder_decoder_batch,
    hold_out,
    permute,
    prefetch,
    span_corruption_dataset,
    text_to_text_dataset,
    tokenize,
)
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError

BYTES = ByteTokenizer()
TEXTS = [f"Document {i} says {'something ' * (i % 4)}of its own." for i in range(60)]
PAIRS = [(f"in {i}", f"out {i}") for i in range(10)]


def spans(**changes):
    arguments = {"input_length": 32, "target_length": None, "batch_size": 8, "seed": 3} | changes
    return span_corruption_dataset(TEXTS, BYTES, SpanCorruption(), **arguments)


def pairs(**changes):
    arguments = {"input_length": 8, "target_length": 8, "batch_size": 4, "seed": 3} | changes
    return text_to_text_dataset(PAIRS, BYTES, **arguments)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def inputs_of(batch):
    return [BYTES.decode(row) for row in batch["encoder_input_tokens"]]


# --- a batch --------------------------------------------------------------------------------------------------------


def test_layout_of_a_batch():
    examples = [(np.array([5, 6, 1]), np.array([7, 1])), (np.array([8, 1]), np.array([9, 10, 1]))]
    sizes = {"rows": 3, "input_length": 4, "target_length": 3}
    batch = encoder_decoder_batch(examples, **sizes, pad_id=0, decoder_start_id=42)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "encoder_input_tokens": [[5, 6, 1, 0], [8, 1, 0, 0], [0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
        "decoder_input_tokens": [[42, 7, 1], [42, 9, 10], [42, 0, 0]],
        "decoder_target_tokens": [[7, 1, 0], [9, 10, 1], [0, 0, 0]],
        "decoder_segment_ids": [[1, 1, 0], [1, 1, 1], [0, 0, 0]],
        "decoder_loss_weights": [[1, 1, 0], [1, 1, 1], [0, 0, 0]],
    }
    assert {key: value.dtype for key, value in batch.items() if value.dtype != np.int32} == {
        "decoder_loss_weights": np.float32
    }
    with pytest.raises(InputError, match="an example of 5 tokens does not fit in a row of 4"):
        encoder_decoder_batch([(np.ones(5), np.ones(1))], **sizes, pad_id=0, decoder_start_id=0)


def test_padding_is_known_by_position_not_by_id():
    # Token id 0 inside a text is a token like any other, and the pad id need not be 0.
    batch = encoder_decoder_batch(
        [(np.array([0, 1]), np.array([0, 1]))], rows=1, input_length=3, target_length=3, pad_id=9, decoder_start_id=9
    )
    assert batch["encoder_input_tokens"].tolist() == [[0, 1, 9]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 0]]


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
    dataset = span_corruption_dataset(texts, BYTES, SpanCorruption(), 32, None, batch_size=1, seed=0)
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


@pytest.mark.parametrize("size", [1, 2, 3, 10, 257, 5000])
def test_permute_is_a_permutation(size):
    images = permute(np.arange(size), size, (7, 2))
    assert sorted(images.tolist()) == list(range(size))
    np.testing.assert_array_equal(permute(np.array([size - 1, 0]), size, (7, 2)), images[[-1, 0]])


def test_permute_gives_all_orders_equally_often():
    counts = collections.Counter(tuple(permute(np.arange(4), 4, (seed, 5)).tolist()) for seed in range(1200))
    assert len(counts) == 24
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 55  # chi-squared of 23 degrees, p = 2e-4


def test_permute_leaves_no_order_behind():
    images = permute(np.arange(20_000), 20_000, (0, 0))
    assert abs(np.corrcoef(np.arange(20_000), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert permute(np.array([10**12 - 1]), 10**12, (0, 0))[0] < 10**12


def test_neighbouring_large_seeds_differ():
    draws = {pipeline._generator(2**64 - 1 - i, 0, 0, 0).integers(2**60) for i in range(8)}
    assert len(draws) == 8


# --- building -------------------------------------------------------------------------------------------------------


def test_windows_cross_documents_and_hold_every_token_once():
    tokens = tokenize(TEXTS, BYTES)
    assert (tokens.flat.dtype, len(tokens), BYTES.decode(tokens[7])) == (np.uint16, 60, TEXTS[7])
    raw = SpanCorruption().raw_length(32)
    dataset = span_corruption_dataset(tokens, BYTES, SpanCorruption(), 32, None, 8, seed=3)
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
    assert_equal(dataset.batch(4), spans().batch(4))  # from texts or from tokens


@pytest.mark.parametrize(("extra", "num_examples"), [(0, 2), (1, 2), (2, 3)])
def test_a_remainder_shorter_than_two_tokens_is_dropped(extra, num_examples):
    raw = SpanCorruption().raw_length(32)
    dataset = span_corruption_dataset(["x" * (2 * raw + extra)], BYTES, SpanCorruption(), 32, None, 2, seed=0)
    assert dataset.num_examples == num_examples
    dataset.batch(0), list(dataset.eval_batches())


def test_full_windows_leave_no_padding():
    dataset = span_corruption_dataset(["x" * 10_000], BYTES, SpanCorruption(0.15, 9.0), 256, None, 4, seed=0)
    batch = next(dataset.eval_batches())
    assert batch["encoder_segment_ids"].all()
    assert batch["decoder_segment_ids"].all()
    assert (batch["encoder_input_tokens"][:, -1] == 1).all()
    assert (batch["decoder_target_tokens"][:, -1] == 1).all()


def test_text_to_text_counts_what_it_cuts():
    examples = [("abcdefg", "x"), ("abcdefgh", "xyz"), ("", "")]
    dataset = text_to_text_dataset(examples, BYTES, 8, 3, batch_size=3, seed=0, decoder_start_id=2)
    assert (dataset.truncated_inputs, dataset.truncated_targets) == (1, 1)
    batch = next(dataset.eval_batches())
    assert inputs_of(batch) == ["abcdefg", "abcdefg", ""]
    assert batch["decoder_target_tokens"].tolist() == [[123, 1, 0], [123, 124, 1], [1, 0, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[2, 123, 1], [2, 123, 124], [2, 1, 0]]


def test_large_vocabularies_keep_their_ids():
    class Wide(ByteTokenizer):
        vocab_size = 100_000

        def encode_batch(self, texts):
            return [[99_999]] * len(texts)

    assert tokenize(["a", "b"], Wide()).flat.tolist() == [99_999, 99_999]
    assert len(tokenize([], BYTES)) == 0
    assert len(tokenize(["a"] * 2500, BYTES)) == 2500


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spans(target_length=5), "target_length 5: input_length 32 needs at least [0-9]+"),
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
            lambda: span_corruption_dataset(["x"], BYTES, SpanCorruption(), 32, None, 1, 0),
            "tokens in the corpus: 1; span corruption needs at least 2",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


# --- prefetch -------------------------------------------------------------------------------------------------------


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_gives_every_step_in_order():
    assert list(prefetch(lambda step: step**2, 3, 7)) == [(3, 9), (4, 16), (5, 25), (6, 36)]
    assert list(prefetch(lambda step: step, 3, 3)) == []
    assert not prefetch_threads()


def test_prefetch_loads_ahead_but_not_without_bound():
    loaded = []
    steps = prefetch(lambda step: loaded.append(step), 0, 100, depth=3)
    next(steps)
    deadline = time.monotonic() + 5
    while len(loaded) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(loaded) == 5  # one taken, three waiting, one waiting for room
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
    for taken in range(30):
        for step, _ in prefetch(lambda step: time.sleep(0.0005), 0, 10**9, depth):
            if step == taken % 5:
                break
        assert not prefetch_threads()


# --- hold_out -------------------------------------------------------------------------------------------------------


def test_hold_out_follows_content_and_seed():
    records = [{"text": f"record {i % 400}", "n": str(i % 400)} for i in range(1000)]
    train, validation = hold_out(records, 0.1, seed=5)
    assert len(train) + len(validation) == 1000
    assert 50 < len(validation) < 150
    key = lambda record: record["text"]  # noqa: E731
    assert not set(map(key, train)) & set(map(key, validation))  # repeats are on one side
    assert train == [record for record in records if record in train]  # in the given order
    assert hold_out(records, 0.1, seed=5) == (train, validation)
    assert hold_out(records, 0.1, seed=6) != (train, validation)
    swapped = [{"n": record["n"], "text": record["text"]} for record in records]
    assert hold_out(swapped, 0.1, seed=5) == (train, validation)
    more_train, more_validation = hold_out([*records, {"text": "new", "n": "new"}], 0.1, seed=5)
    assert more_train[: len(train)] == train
    assert more_validation[: len(validation)] == validation


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_hold_out_leaves_neither_side_empty(fraction):
    for records in (["a", "b"], ["a", "a", "b"], list(map(str, range(20)))):
        train, validation = hold_out(records, fraction)
        assert train
        assert validation
        assert not set(train) & set(validation)


def test_hold_out_errors():
    for records in ([], ["a"], ["a", "a"]):
        with pytest.raises(InputError, match=f"{len(records)} records, fewer than 2 different"):
            hold_out(records, 0.1)
    for fraction in (0, 1, -0.5, 2):
        with pytest.raises(InputError, match=f"validation fraction {fraction}: must be above 0 and below 1"):
            hold_out(["a", "b"], fraction)


def test_tokens():
    tokens = Tokens(np.array([1, 2, 3]), np.array([0, 2, 2, 3]))
    assert [tokens[i].tolist() for i in range(len(tokens))] == [[1, 2], [], [3]]
    assert tokens.lengths.tolist() == [2, 0, 1]


# --- causal language modelling --------------------------------------------------------------------------------------


def test_causal_windows_hold_every_token_once_with_an_eos_after_each_text() -> None:
    tokenizer = ByteTokenizer()
    texts = ["first", "the second one", "3"]
    dataset = causal_lm_dataset(texts, tokenizer, length=8, batch_size=2, seed=0, decoder_start_id=7)
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
        assert row["decoder_input_tokens"][0] == 7
        np.testing.assert_array_equal(row["decoder_input_tokens"][1:], row["decoder_target_tokens"][:-1])
        seen += row["decoder_target_tokens"][real].tolist()
    assert seen == expected
    assert dataset.num_examples == -(-len(expected) // 8)


def test_causal_language_modelling_needs_text_and_a_length() -> None:
    with pytest.raises(InputError, match="no text"):
        causal_lm_dataset([], ByteTokenizer(), length=8, batch_size=2, seed=0)
    with pytest.raises(InputError, match="length 0"):
        causal_lm_dataset(["a"], ByteTokenizer(), length=0, batch_size=2, seed=0)
