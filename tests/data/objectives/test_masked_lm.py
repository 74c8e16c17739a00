import dataclasses

import numpy as np
import pytest
from scipy import stats

from t5x_lite.data.objectives import MaskedLM, Masking
from t5x_lite.errors import InputError

N = 10_000


class Fixed:
    """Stands for a generator, and gives what it is told."""

    def __init__(self, *values):
        self.values = list(values)

    def __getattr__(self, name):
        dtype = float if name == "random" else int
        return lambda *arguments, **options: np.array(self.values.pop(0), dtype)


def places(example):
    return np.flatnonzero(example.input_weights).tolist()


# --- by hand --------------------------------------------------------------------------------------------------------


def test_google_by_hand(vocabulary):
    # 9 tokens between BOS and EOS: 30 % of 11 are 3; the first becomes a mask, the second 7, the third stays.
    tokens = np.arange(20, 29, dtype=np.uint16)
    rng = Fixed([6, 0, 4, 1, 2, 3, 5, 7, 8], [0.79, 0.89, 0.95], [2])
    example = MaskedLM(Masking(0.3))(tokens, rng, vocabulary)
    assert example.inputs.tolist() == [3, 4, 21, 22, 23, 7, 25, 26, 27, 28, 1]
    assert example.input_targets.tolist() == [3, *range(20, 29), 1]
    assert example.input_weights.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    assert example.inputs.dtype == example.input_targets.dtype == np.int32
    assert example.input_weights.dtype == np.float32
    assert example.targets is example.input_types is example.next_sentence is None
    assert tokens.tolist() == list(range(20, 29))


def test_hugging_face_by_hand(vocabulary):
    rng = Fixed([0.16, 0.14, 0.5, 0.0], [0.85, 0.1], [5])
    example = MaskedLM(Masking(style="huggingface"))(np.array([20, 21, 22, 23]), rng, vocabulary)
    assert example.inputs.tolist() == [3, 20, 10, 22, 4, 1]
    assert places(example) == [2, 4]


def test_whole_words_by_hand(vocabulary):
    # Words: 21 (it begins the text) | 20 21 23 | 22 | 24 25. 40 % of 9 are 4; of the words in the order drawn the
    # first two fit (3 + 1), after which nothing else does.
    tokens = np.array([21, 20, 21, 23, 22, 24, 25])
    masking = Masking(0.4, whole_words=True, mask=1.0, random=0.0)
    example = MaskedLM(masking)(tokens, Fixed([1, 2, 3, 0], [0.5] * 4, []), vocabulary)
    assert example.inputs.tolist() == [3, 21, 4, 4, 4, 4, 24, 25, 1]
    # The word of three is passed over when there is room for two.
    example = MaskedLM(masking)(tokens, Fixed([3, 1, 0, 2], [0.5] * 4, []), vocabulary)
    assert places(example) == [1, 5, 6, 7]
    words = Masking(0.4, "huggingface", whole_words=True)
    example = MaskedLM(words)(tokens, Fixed([0.1, 0.9, 0.9, 0.3], [0.5] * 3, []), vocabulary)
    assert places(example) == [1, 6, 7]


def test_a_special_token_parts_words(vocabulary):
    masking = Masking(0.5, "huggingface", whole_words=True)
    example = MaskedLM(masking)(np.array([20, 21, 1, 23, 25]), Fixed([0.9, 0.1], [0.5] * 2, []), vocabulary)
    assert places(example) == [4, 5]


@pytest.mark.parametrize(
    ("masking", "length", "count"),
    [
        (Masking(), 8, 2),  # 1.5 with the special tokens, which Python rounds to 2; without them it were 1.2
        (Masking(), 126, 19),
        (Masking(max_predictions=20), 510, 20),
        (Masking(), 510, 77),
        (Masking(), 1, 1),
        (Masking(0.4), 126, 51),
        (Masking(1.0), 10, 10),  # no special token makes up the number
    ],
)
def test_google_hides_an_exact_number(masking, length, count, vocabulary, draws):
    tokens = np.arange(10, 10 + length)
    for i in range(20):
        assert len(places(MaskedLM(masking)(tokens, draws(i), vocabulary))) == count


def test_whole_words_never_exceed_the_number(vocabulary, draws):
    masking = Masking(0.3, whole_words=True)
    tokens = np.random.default_rng(0).integers(10, 800, 60)
    words = np.cumsum(tokens % 2 == 0)
    reached = 0
    for i in range(500):
        example = MaskedLM(masking)(tokens, draws(i), vocabulary)
        weights = example.input_weights[1:-1]
        assert weights.sum() <= 19
        reached += weights.sum() == 19
        for word in np.unique(words):
            assert len(set(weights[words == word])) == 1
    assert reached > 450


# --- BERT's `create_masked_lm_predictions`, step by step, with the order of the candidates handed in -----------------


def google_places(tokens, vocabulary, masking, order):
    candidates = []
    for place, token in enumerate(tokens):
        if vocabulary.special[token]:
            continue
        continues = masking.whole_words and candidates and not vocabulary.word_starts[token]
        if continues and candidates[-1][-1] == place - 1:  # Google's joins what a special token parts
            candidates[-1].append(place)
        else:
            candidates.append([place])
    count = min(masking.max_predictions or len(tokens), max(1, round(len(tokens) * masking.rate)))
    chosen = []
    for candidate in order(len(candidates)):
        if len(chosen) >= count:
            break
        if len(chosen) + len(candidates[candidate]) > count:
            continue
        chosen += candidates[candidate]
    return sorted(chosen)


class Seeded:
    """Gives both implementations the same order."""

    def __init__(self, seed):
        self.permutation = np.random.default_rng(seed).permutation


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("settings", [{}, {"rate": 0.4}, {"max_predictions": 5}])
def test_places_equal_those_of_google(whole_words, settings, vocabulary):
    masking = Masking(whole_words=whole_words, **settings)
    rng = np.random.default_rng(0)
    for seed in range(200):
        tokens = rng.integers(10, 800, rng.integers(1, 100))
        tokens[rng.random(len(tokens)) < 0.05] = 1
        tokens = np.array([3, *tokens, 1])
        expected = google_places(tokens.tolist(), vocabulary, masking, Seeded(seed).permutation)
        assert masking.choose(tokens, Seeded(seed), vocabulary).tolist() == expected


# --- in numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masking", "rate"),
    [(Masking(0.4), 0.4 * 20 / 18), (Masking(0.4, "huggingface"), 0.4), (Masking(0.15, "huggingface"), 0.15)],
)
def test_which_tokens_and_what_they_become(masking, rate, vocabulary, draws, fits, sigmas):
    tokens = np.arange(100, 118)
    examples = [MaskedLM(masking)(tokens, draws(i), vocabulary) for i in range(N)]
    inputs, weights = (np.stack([getattr(e, name) for e in examples]) for name in ("inputs", "input_weights"))
    assert sigmas(weights[:, 1:-1].mean(axis=0), rate, N) < 5
    assert sigmas(weights[:, 1:-1].mean(), rate, 18 * N) < 5
    hidden = weights == 1
    before, after = np.stack([e.input_targets for e in examples])[hidden], inputs[hidden]
    # A random token is one of 885, and may be the original.
    random = 0.1 * 884 / 885
    became = (after == 4).sum(), ((after != 4) & (after != before)).sum(), (after == before).sum()
    assert fits(became, [0.8, random, 0.2 - random])
    if masking.rate == 0.4:
        drawn = np.bincount(after[(after != 4) & (after != before)], minlength=1000)
        assert not drawn[vocabulary.special].any()
        # About 8,000 draws in 12 groups of ids; those of the text are left out, being the original's.
        groups = [ids.sum() for ids in np.array_split(np.delete(drawn[5:890], np.arange(95, 113)), 12)]
        sizes = [len(ids) for ids in np.array_split(np.arange(885 - 18), 12)]
        assert fits(groups, sizes)
    assert (inputs[~hidden] == np.stack([e.input_targets for e in examples])[~hidden]).all()


def test_hugging_face_hides_each_token_by_itself(vocabulary, draws, fits):
    masking = Masking(0.15, "huggingface")
    counts = [len(places(MaskedLM(masking)(np.arange(100, 110), draws(i), vocabulary))) for i in range(N)]
    expected = stats.binom.pmf(np.arange(5), 10, 0.15)
    assert fits([*np.bincount(counts, minlength=11)[:5], sum(c > 4 for c in counts)], [*expected, 1 - expected.sum()])


@pytest.mark.parametrize("style", ["google", "huggingface"])
@pytest.mark.parametrize("whole_words", [False, True])
def test_special_tokens_are_never_hidden(style, whole_words, vocabulary, draws):
    tokens = np.array([0, 1, 2, 3, 4, 999, 890, 10, 11])  # padding, EOS, unknown, BOS, mask, a sentinel, a mode
    objective = MaskedLM(Masking(0.9, style, whole_words=whole_words))
    for i in range(300):
        assert set(places(objective(tokens, draws(i), vocabulary))) <= {8, 9}
    nothing = objective(tokens[:5], draws(0), vocabulary)
    assert places(nothing) == []
    assert nothing.inputs.tolist() == [3, 0, 1, 2, 3, 4, 1]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate 0.0: must be above 0 and at most 1"),
        ({"style": "fairseq"}, "style 'fairseq': allowed are google, huggingface"),
        ({"max_predictions": 0}, "max_predictions 0: must be at least 1"),
        ({"mask": 0.8, "random": 0.3}, "mask 0.8 and random 0.3: must be fractions that come to at most 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        Masking(**settings)


def test_check(vocabulary):
    MaskedLM(Masking(whole_words=True)).check(100, vocabulary)
    with pytest.raises(InputError, match="no mask token"):
        MaskedLM().check(100, dataclasses.replace(vocabulary, mask_id=None))
    with pytest.raises(InputError, match="whole words"):
        MaskedLM(Masking(whole_words=True)).check(100, dataclasses.replace(vocabulary, word_starts=None))
    with pytest.raises(InputError, match="input_length 2: must be at least 3"):
        MaskedLM().window(2, None, vocabulary)
