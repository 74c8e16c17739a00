import dataclasses

import numpy as np
import pytest

from t5x_lite.data.objectives import Chat, TextToText
from t5x_lite.errors import InputError

PROMPT, ANSWER = np.arange(10, 15, dtype=np.uint16), np.arange(20, 23, dtype=np.uint16)


def ids(example):
    return [None if side is None else side.tolist() for side in (example.inputs, example.targets)]


# --- text to text ---------------------------------------------------------------------------------------------------


def test_each_side_is_cut_and_then_closed(vocabulary, draws):
    def pair(*lengths):
        return ids(TextToText(*lengths)(PROMPT, ANSWER, draws(0), vocabulary))

    assert pair(7, 5) == [[3, 10, 11, 12, 13, 14, 1], [3, 20, 21, 22, 1]]
    assert pair(6, 4) == [[3, 10, 11, 12, 13, 1], [3, 20, 21, 1]]
    example = TextToText(7, 5)(PROMPT, ANSWER, draws(0), vocabulary)
    assert example.target_weights is None
    assert example.inputs.dtype == example.targets.dtype == np.int32


def test_a_decoder_reads_the_prompt_and_learns_the_answer(vocabulary, draws):
    def row(length):
        example = TextToText(2, length, sides="decoder")(PROMPT, ANSWER, draws(0), vocabulary)
        assert example.inputs is None
        assert example.target_weights.dtype == np.float32
        return example.targets.tolist(), example.target_weights.tolist()

    assert row(9) == ([10, 11, 12, 13, 14, 20, 21, 22, 1], [0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert row(20) == row(9)
    assert row(6) == ([10, 11, 20, 21, 22, 1], [0, 0, 1, 1, 1, 1])
    assert row(4) == ([20, 21, 22, 1], [1, 1, 1, 1])
    assert row(3) == ([20, 21, 1], [1, 1, 1])  # EOS stays


def test_what_is_cut_is_told(vocabulary):
    inputs, targets = np.array([3, 4, 5, 5, 9]), np.array([2, 3, 4, 8, 1])
    cut = TextToText(6, 5).truncated(inputs, targets, vocabulary)
    assert [side.tolist() for side in cut] == [[False, False, True, True, True], [False, False, True, True, False]]
    cut = TextToText(2, 8, "decoder").truncated(inputs, targets, vocabulary)
    assert [side.tolist() for side in cut] == [[False, False, True, True, True], [False, False, False, True, False]]
    for sides in ("encoder_decoder", "decoder"):
        objective = TextToText(6, 8, sides)
        made = [
            objective(np.full(n, 10), np.full(m, 20), None, vocabulary) for n, m in zip(inputs, targets, strict=True)
        ]
        expected = [[0 if ids is None else len(ids) for ids in (e.inputs, e.targets)] for e in made]
        assert objective.lengths(inputs, targets, vocabulary).tolist() == expected
    for n, m, first, second in zip(inputs, targets, *cut, strict=True):
        example = TextToText(2, 8, "decoder")(np.full(n, 10), np.full(m, 20), None, vocabulary)
        assert ((example.targets == 10).sum() < n, (example.targets == 20).sum() < m) == (first, second)


# --- conversations --------------------------------------------------------------------------------------------------

#                 question | answer | question | answer, closed
CHAT = np.array([10, 11, 20, 21, 12, 13, 14, 22, 23, 1])
ASKED = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], np.uint8)


def test_a_decoder_learns_every_answer(vocabulary, draws):
    def row(length, tokens=CHAT, asked=ASKED):
        example = Chat(2, length)(tokens, asked, draws(0), vocabulary)
        assert example.inputs is None
        return example.targets.tolist(), example.target_weights.tolist()

    assert row(20) == (CHAT.tolist(), ASKED.tolist())
    # Cut without an EOS, which would tell the model to stop there.
    assert row(8) == (CHAT[:8].tolist(), ASKED[:8].tolist())
    # Closed, if the tokenizer's template did not, with the weight of what it closes.
    assert row(20, CHAT[:9], ASKED[:9]) == (CHAT.tolist(), ASKED.tolist())
    assert row(9, CHAT[:9], ASKED[:9]) == (CHAT[:9].tolist(), ASKED[:9].tolist())
    # Or with its own token for the end of a turn.
    turn = np.append(CHAT[:9], 890)
    assert row(20, turn) == (turn.tolist(), ASKED.tolist())
    assert row(20, CHAT[:6], ASKED[:6]) == ([*CHAT[:6].tolist(), 1], [*ASKED[:6].tolist(), 0])


def test_an_encoder_decoder_learns_the_last_answer(vocabulary, draws):
    def pair(lengths, tokens=CHAT, asked=ASKED):
        return ids(Chat(*lengths, sides="encoder_decoder")(tokens, asked, draws(0), vocabulary))

    assert pair((20, 20)) == [[3, 10, 11, 20, 21, 12, 13, 14, 1], [3, 22, 23, 1]]
    # The beginning of what was said is left out, and the end of the answer.
    assert pair((6, 3)) == [[3, 21, 12, 13, 14, 1], [3, 22, 1]]
    assert pair((20, 20), CHAT[:6], ASKED[:6]) == [[3, 10, 11, 1], [3, 20, 21, 1]]
    assert pair((20, 20), CHAT[2:4], ASKED[2:4]) == [[3, 1], [3, 20, 21, 1]]
    with pytest.raises(InputError, match="a conversation without an answer"):
        pair((20, 20), CHAT[:2], ASKED[:2])


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [TextToText, Chat])
def test_errors(objective, vocabulary):
    with pytest.raises(InputError, match="target_length 1: must be at least 2, one token and EOS"):
        objective(8, 1, "decoder")
    with pytest.raises(InputError, match="input_length 1: must be at least 2, one token and EOS"):
        objective(1, 8, "encoder_decoder")
    with pytest.raises(InputError, match="sides 'encoder': allowed are encoder_decoder, decoder"):
        objective(8, 8, "encoder")
    with pytest.raises(InputError, match="no end-of-sequence token"):
        objective(8, 8, "decoder").check(8, dataclasses.replace(vocabulary, eos_id=None))
