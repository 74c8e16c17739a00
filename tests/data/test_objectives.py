import numpy as np
import pytest

from t5x_lite.data.objectives import SpanCorruption, TextToText, Vocabulary, append_eos, mask_from_starts
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError

T5 = SpanCorruption()
SENTINELS = tuple(range(999, 899, -1))


# --- T5's algorithm, written out step by step from its TensorFlow code, with the shuffle handed in -------------------


def t5_noise_mask(length, density, mean, shuffle):
    original, length = length, max(length, 2)
    num_noise = int(np.round(np.float32(length) * np.float32(density)))
    num_noise = min(max(num_noise, 1), length - 1)
    num_spans = max(int(np.round(np.float32(num_noise) / np.float32(mean))), 1)

    def random_segmentation(num_items, num_segments):
        first_in_segment = np.pad(shuffle((np.arange(num_items - 1) < num_segments - 1).astype(int)), (1, 0))
        return np.bincount(np.cumsum(first_in_segment), minlength=num_segments)

    noise_lengths = random_segmentation(num_noise, num_spans)
    nonnoise_lengths = random_segmentation(length - num_noise, num_spans)
    interleaved = np.stack([nonnoise_lengths, noise_lengths], axis=1).reshape(num_spans * 2)
    span_starts = np.cumsum(interleaved)[:-1]
    indicator = np.zeros(length, int)
    np.add.at(indicator, span_starts, 1)
    return (np.cumsum(indicator) % 2 == 1)[:original]


def t5_unique_sentinels(tokens, mask, vocab_size):
    previous = np.pad(mask[:-1], (1, 0))
    first, subsequent = mask & ~previous, mask & previous
    sentinel = vocab_size - np.cumsum(first.astype(int))
    return np.where(first, sentinel, tokens)[~subsequent]


def t5_spans_helper(inputs_length, density, mean):
    def lengths(tokens):
        noise = round(tokens * density)
        spans = round(noise / mean)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    inputs, targets = lengths(tokens)
    return (tokens - 1, targets - 1) if density == 0.5 and targets > inputs else (tokens, targets)


class Replay:
    """Stands for a generator, and gives the draws of `seed` to both implementations."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def permutation(self, values):
        return self.rng.permutation(values)


@pytest.mark.parametrize(
    "objective", [T5, SpanCorruption(0.3, 4.0), SpanCorruption(0.5, 3.0), SpanCorruption(0.15, 1.0)]
)
def test_masks_inputs_and_targets_equal_t5(objective):
    density, mean = objective.noise_density, objective.mean_span_length
    rng = np.random.default_rng(0)
    for length in range(1, 601):
        tokens = rng.integers(3, 500, length)
        mask = objective.noise_mask(length, Replay(length))
        np.testing.assert_array_equal(mask, t5_noise_mask(length, density, mean, Replay(length).permutation))
        sentinels = tuple(range(999, 500, -1))
        inputs, targets = objective.corrupt(tokens, mask, sentinels)
        np.testing.assert_array_equal(inputs, t5_unique_sentinels(tokens, mask, 1000))
        np.testing.assert_array_equal(targets, t5_unique_sentinels(tokens, ~mask, 1000))


def test_window_of_568_equals_t5_for_many_seeds():
    for seed in range(500):
        expected = t5_noise_mask(568, 0.15, 3.0, Replay(seed).permutation)
        np.testing.assert_array_equal(T5.noise_mask(568, Replay(seed)), expected)


# --- fixed examples, worked out by hand -----------------------------------------------------------------------------


def test_the_example_of_the_paper():
    # "Thank you for inviting me to your party last week": "for inviting" and "last" are replaced.
    tokens = np.arange(10, 20)
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    inputs, _ = T5.corrupt(tokens, mask, SENTINELS)
    assert inputs.tolist() == [10, 11, 999, 14, 15, 16, 17, 998, 19]
    # The last token is noise in every mask that is drawn, so that nothing closes the targets.
    mask[9] = True
    inputs, targets = T5.corrupt(tokens, mask, SENTINELS)
    assert inputs.tolist() == [10, 11, 999, 14, 15, 16, 17, 998]
    assert targets.tolist() == [999, 12, 13, 998, 18, 19]


def test_mask_from_draws():
    noise_starts = np.array([0, 1, 0], bool)  # noise spans of 2 and 2
    nonnoise_starts = np.array([1, 0, 0, 0], bool)  # stretches of 1 and 4
    assert mask_from_starts(noise_starts, nonnoise_starts).astype(int).tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_call_closes_both_sides_with_eos_and_opens_the_targets_with_the_first_sentinel():
    tokenizer = ByteTokenizer()
    tokens = np.arange(3, 3 + 40).astype(np.uint16)
    example = T5(tokens, np.random.default_rng(0), Vocabulary.of(tokenizer))
    inputs, targets = example.inputs, example.targets
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs[-1] == targets[-1] == tokenizer.eos_id
    assert targets[0] == tokenizer.sentinels[0]
    assert targets[-2] not in tokenizer.sentinels  # no closing sentinel
    assert rebuild(inputs[:-1], targets[:-1], tokenizer.sentinels) == tokens.tolist()


def rebuild(inputs, targets, sentinels):
    spans = {}
    for token in targets.tolist():
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    return [token for item in inputs.tolist() for token in spans.get(item, [item])]


@pytest.mark.parametrize("length", [2, 3, 7, 19, 190, 568])
def test_inputs_and_targets_hold_every_token_once(length):
    tokens = np.random.default_rng(length).integers(3, 800, length)
    mask = T5.noise_mask(length, np.random.default_rng(1))
    inputs, targets = T5.corrupt(tokens, mask, SENTINELS)
    assert rebuild(inputs, targets, SENTINELS) == tokens.tolist()
    assert [t for t in targets if t in SENTINELS] == list(SENTINELS[: T5.num_spans(length)])


def test_very_short_texts():
    rng = np.random.default_rng(0)
    assert T5.noise_mask(1, rng).tolist() == [False]
    assert T5.noise_mask(2, rng).tolist() == [False, True]
    one, two = (T5(np.arange(7, 7 + n), rng, Vocabulary.of(ByteTokenizer())) for n in (1, 2))
    assert (one.inputs.tolist(), one.targets.tolist()) == ([7, 1], [258, 1])
    assert (two.inputs.tolist(), two.targets.tolist()) == ([7, 258, 1], [258, 8, 1])


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_length", "raw", "target"), [(512, 568, 114), (1024, 1137, 229), (256, 284, 58), (2048, 2274, 456)]
)
def test_published_lengths(input_length, raw, target):
    assert (T5.raw_length(input_length), T5.target_length(input_length)) == (raw, target)


def test_lengths_equal_t5_except_where_its_windows_overflow():
    differ = []
    for input_length in range(3, 1200):
        ours = T5.raw_length(input_length), T5.target_length(input_length)
        theirs = t5_spans_helper(input_length, 0.15, 3.0)
        if ours != theirs:
            mask = t5_noise_mask(theirs[0], 0.15, 3.0, Replay(0).permutation)
            inputs = t5_unique_sentinels(np.ones(theirs[0], int), mask, 9999)
            targets = t5_unique_sentinels(np.ones(theirs[0], int), ~mask, 9999)
            assert len(inputs) + 1 > input_length or len(targets) + 1 > theirs[1]
            differ.append(input_length)
    assert differ == [3, 4, 5, 6, 7, 8, 9, 172, 316, 352, 604, 640, 676, 712, 748, 1180]


@pytest.mark.parametrize("density", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0])
def test_every_window_fits_and_a_longer_one_would_not(density, mean):
    objective = SpanCorruption(density, mean)
    for input_length in (3, 4, 10, 64, 173):
        raw, target_length = objective.raw_length(input_length), objective.target_length(input_length)
        sizes = []
        for length in range(2, raw + 2):
            mask = objective.noise_mask(length, np.random.default_rng(length))
            inputs, targets = objective.corrupt(np.ones(length, int), mask, tuple(range(9999, 0, -1)))
            sizes.append((len(inputs) + 1, len(targets) + 1))
        assert all(inputs <= input_length and targets <= target_length for inputs, targets in sizes[:-1])
        assert sizes[-1][0] > input_length or (density == 0.5 and sizes[-1][1] > sizes[-1][0])


def test_half_noise_keeps_the_targets_no_longer_than_the_inputs():
    objective = SpanCorruption(noise_density=0.5, mean_span_length=3.0)
    expected = [t5_spans_helper(input_length, 0.5, 3.0)[0] for input_length in range(10, 600)]
    assert [objective.raw_length(input_length) for input_length in range(10, 600)] == expected
    for input_length in range(10, 600):
        assert objective.target_length(input_length) <= input_length


# --- the statistics of the mask -------------------------------------------------------------------------------------


def test_statistics_of_the_mask():
    rng = np.random.default_rng(0)
    masks = np.stack([T5.noise_mask(568, rng) for _ in range(2000)])
    assert (masks.sum(axis=1) == 85).all()
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    starts = masks[:, 1:] & ~masks[:, :-1]
    assert (starts.sum(axis=1) == 28).all()
    # Away from the ends every position is replaced equally often; 5 standard deviations of a mean of 2000.
    middle = masks[:, 100:468].mean(axis=0)
    assert abs(middle - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 2000)
    # All divisions of 85 into 28 parts are equally likely: the first part is 1 with probability 27/84.
    first = [np.flatnonzero(np.diff(mask.astype(int)) == -1)[0] - np.flatnonzero(mask)[0] for mask in masks]
    assert np.mean(np.array(first) == 0) == pytest.approx(27 / 84, abs=5 * np.sqrt(0.32 * 0.68 / 2000))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_more_spans_than_sentinels():
    message = r"12 spans but the tokenizer has 11 sentinels .*mean_span_length.*noise_density.*more sentinels"
    mask = T5.noise_mask(240, np.random.default_rng(0))
    with pytest.raises(InputError, match=message):
        T5.corrupt(np.ones(240, int), mask, ByteTokenizer().sentinels)


def test_more_spans_than_tokens_between_them():
    # T5's own code fails on this one; here there are as many spans as there are tokens to part them.
    objective = SpanCorruption(noise_density=0.9, mean_span_length=1.0)
    mask = objective.noise_mask(20, np.random.default_rng(0))
    assert (objective.num_spans(20), mask.sum()) == (2, 18)


@pytest.mark.parametrize(
    ("field", "value"), [("noise_density", 0.0), ("noise_density", 0.999), ("mean_span_length", 0.5)]
)
def test_settings_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field} {value}"):
        SpanCorruption(**{field: value})


def test_input_length_too_short():
    with pytest.raises(InputError, match="input_length 2: span corruption needs at least 3"):
        T5.raw_length(2)


# --- text to text ---------------------------------------------------------------------------------------------------


def test_text_to_text_cuts_and_then_appends_eos():
    objective = TextToText(input_length=4, target_length=3)
    inputs, targets = (np.array(ByteTokenizer().encode(text)) for text in ("abcdef", "é"))
    example = objective(inputs, targets, np.random.default_rng(0), Vocabulary.of(ByteTokenizer()))
    inputs, targets = example.inputs, example.targets
    assert inputs.tolist() == [100, 101, 102, 1]
    assert targets.tolist() == [198, 172, 1]
    assert inputs.dtype == targets.dtype == np.int32
    assert append_eos(np.array([5, 6]), 1).tolist() == [5, 6, 1]


@pytest.mark.parametrize("field", ["input_length", "target_length"])
def test_text_to_text_lengths_too_short(field):
    with pytest.raises(InputError, match=f"{field} 1: must be at least 2"):
        TextToText(**({"input_length": 8, "target_length": 8} | {field: 1}))
