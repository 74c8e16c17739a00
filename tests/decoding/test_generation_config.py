import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.errors import InputError

# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not True"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, not -1"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": "4"}, "num_beams must be a whole number, not '4'"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, not 0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, not -1"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": 2**32}, "seed must be below 2**32, not 4294967296"),
        (
            {"temperature": 0},
            "temperature must be 1e-30 to 1e30 (do_sample=False gives the most likely token), not 0",
        ),
        (
            {"temperature": math.inf},
            "temperature must be 1e-30 to 1e30 (do_sample=False gives the most likely token), not inf",
        ),
        # In float32 these are 0, infinite, or make a logit infinite.
        *(
            ({name: value}, f"{name} must be 1e-30 to 1e30{words}, not {value}")
            for name, words in (
                ("temperature", " (do_sample=False gives the most likely token)"),
                ("repetition_penalty", ""),
            )
            for value in (1e-45, 1e-38, 1e38, 1e39)
        ),
        ({"top_p": 1e-40}, "top_p must be 1e-30 to 1, not 1e-40"),
        ({"typical_p": 1e-40}, "typical_p must be 1e-30 to 1, not 1e-40"),
        ({"stop_strings": ["a", "b\udcff"]}, "stop_strings must be valid UTF-8, not 'b\\udcff'"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_p": 0.0}, "top_p must be 1e-30 to 1, not 0.0"),
        ({"top_p": 1.5}, "top_p must be 1e-30 to 1, not 1.5"),
        ({"top_p": math.nan}, "top_p must be 1e-30 to 1, not nan"),
        ({"min_p": 1.0}, "min_p must be at least 0 and below 1, not 1.0"),
        ({"min_p": -0.1}, "min_p must be at least 0 and below 1, not -0.1"),
        ({"typical_p": 0}, "typical_p must be 1e-30 to 1, not 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 1e-30 to 1e30, not 0.0"),
        ({"length_penalty": math.inf}, "length_penalty must be finite, not inf"),
        ({"do_sample": 1}, "do_sample must be one of True, False, not 1"),
        ({"length_penalty_style": "gnmt"}, "length_penalty_style must be one of hf, t5, not 'gnmt'"),
        ({"early_stopping": "always"}, "early_stopping must be one of True, False, never, not 'always'"),
        ({"early_stopping": 1}, "early_stopping must be one of True, False, never, not 1"),
        ({"cache_dtype": "int4"}, "cache_dtype must be one of float32, bfloat16, int8, not 'int4'"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of lists of token ids, not 5"),
        ({"bad_words_ids": 5}, "bad_words_ids must be a list of lists of token ids, not 5"),
        ({"bad_words_ids": [[3], []]}, "bad_words_ids must not contain an empty list"),
        ({"bad_words_ids": [[3, -2]]}, "every id in bad_words_ids must be at least 0, not -2"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list of token ids, not 5"),
        ({"suppress_tokens": [-1]}, "every id in suppress_tokens must be at least 0, not -1"),
        ({"begin_suppress_tokens": ["a"]}, "every id in begin_suppress_tokens must be a whole number, not 'a'"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id must be at least 0, not -1"),
        ({"forced_eos_token_id": [1]}, "forced_eos_token_id must be one id, not [1]"),
        ({"decoder_start_token_id": 0.5}, "decoder_start_token_id must be a whole number, not 0.5"),
        ({"eos_token_id": [1, -1]}, "every id in eos_token_id must be at least 0, not -1"),
        ({"eos_token_id": False}, "eos_token_id must be a whole number, not False"),
        ({"stop_strings": [""]}, "stop_strings must not contain an empty text"),
        ({"stop_strings": ""}, "stop_strings must not contain an empty text"),
        ({"stop_strings": ["a", 1]}, "stop_strings must be a text or a list of texts, not ['a', 1]"),
        ({"stop_strings": 1}, "stop_strings must be a text or a list of texts, not 1"),
    ],
)
def test_a_value_that_is_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        GenerationConfig(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 must be at most max_new_tokens 8"),
        ({"temperature": 0.7}, "temperature 0.7 needs do_sample=True"),
        ({"top_k": 50}, "top_k 50 needs do_sample=True"),
        ({"top_p": 0.9}, "top_p 0.9 needs do_sample=True"),
        ({"min_p": 0.1}, "min_p 0.1 needs do_sample=True"),
        ({"typical_p": 0.9, "num_beams": 4}, "typical_p 0.9 needs do_sample=True"),
        (
            {"num_beams": 4, "do_sample": True},
            "num_beams 4 and do_sample=True exclude each other: leave out one of them",
        ),
        ({"length_penalty": 2}, "length_penalty 2.0 needs num_beams of at least 2"),
        ({"length_penalty_style": "t5"}, "length_penalty_style t5 needs num_beams of at least 2"),
        ({"early_stopping": "never", "do_sample": True}, "early_stopping never needs num_beams of at least 2"),
        ({"num_return_sequences": 3}, "num_return_sequences 3 needs do_sample=True, or num_beams of at least 3"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences 3 must be at most num_beams 2"),
        (
            {"num_beams": 2, "length_penalty_style": "t5", "early_stopping": True},
            "length_penalty_style t5 needs early_stopping=False, not True",
        ),
        (
            {"forced_bos_token_id": 5, "suppress_tokens": [4, 5]},
            "forced_bos_token_id 5 must not be in suppress_tokens as well",
        ),
        (
            {"forced_eos_token_id": 5, "suppress_tokens": [5]},
            "forced_eos_token_id 5 must not be in suppress_tokens as well",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        GenerationConfig(**settings)
    assert str(error.value) == message


def test_the_bounds_themselves_are_allowed() -> None:
    GenerationConfig(max_new_tokens=1, min_new_tokens=1, seed=2**32 - 1, forced_bos_token_id=0, eos_token_id=0)
    GenerationConfig(do_sample=True, top_p=1.0, min_p=0.0, typical_p=1.0, top_k=1, num_return_sequences=3)
    GenerationConfig(num_beams=3, num_return_sequences=3, early_stopping="never", length_penalty=-1.0)
    GenerationConfig(num_beams=2, length_penalty_style="t5", length_penalty=0.6)


def test_lists_become_tuples_and_a_single_one_a_tuple_of_one() -> None:
    config = GenerationConfig(
        bad_words_ids=[[1, 2], (3,)],  # type: ignore[arg-type]
        suppress_tokens=[np.int64(4)],  # type: ignore[arg-type]
        eos_token_id=5,
        stop_strings="stop",
        num_beams=2,
        length_penalty=2,
    )
    assert config.bad_words_ids == ((1, 2), (3,))
    assert config.suppress_tokens == (4,)
    assert config.eos_token_id == (5,)
    assert config.stop_strings == ("stop",)
    assert [type(x) for x in (*config.suppress_tokens, config.length_penalty)] == [int, float]
    same = dataclasses.replace(config, stop_strings=["stop"], eos_token_id=[5])
    assert same == config
    assert hash(same) == hash(config)


def test_none_is_the_default() -> None:
    nothing: dict[str, Any] = {field.name: None for field in dataclasses.fields(GenerationConfig)}
    assert GenerationConfig(**nothing) == GenerationConfig()
    assert GenerationConfig(do_sample=True, top_k=None).top_k == 0  # type: ignore[arg-type]


def test_end_ids_are_the_configurations_or_the_models() -> None:
    assert GenerationConfig().end_ids((1, 2)) == (1, 2)
    assert GenerationConfig(eos_token_id=7).end_ids((1, 2)) == (7,)
    assert GenerationConfig(eos_token_id=()).end_ids((1, 2)) == ()


# --- a user's settings on top of a checkpoint's ---------------------------------------------------------------------

SUMMARIES = {
    "num_beams": 4,
    "length_penalty": 2.0,
    "early_stopping": True,
    "min_new_tokens": 56,
    "max_new_tokens": 142,
    "no_repeat_ngram_size": 3,
}
CHAT = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_return_sequences": 3, "eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("defaults", "settings", "wanted"),
    [
        (SUMMARIES, {}, SUMMARIES),
        (CHAT, {}, CHAT),
        (CHAT, {"temperature": 0.8, "top_p": None}, CHAT | {"temperature": 0.8}),
        (SUMMARIES, {"num_beams": 2}, SUMMARIES | {"num_beams": 2}),
        # Another mode than the defaults'.
        (SUMMARIES, {"num_beams": 1, "min_new_tokens": 0}, {"max_new_tokens": 142, "no_repeat_ngram_size": 3}),
        (
            SUMMARIES,
            {"do_sample": True, "top_k": 5, "min_new_tokens": 0},
            {"do_sample": True, "top_k": 5, "max_new_tokens": 142, "no_repeat_ngram_size": 3},
        ),
        (SUMMARIES, {"do_sample": False}, SUMMARIES),
        (CHAT, {"do_sample": False}, {"eos_token_id": (1, 2)}),
        (CHAT, {"num_beams": 2}, {"eos_token_id": (1, 2), "num_beams": 2, "num_return_sequences": 2}),
        (CHAT, {"num_beams": 1}, CHAT),
        (
            SUMMARIES | {"num_return_sequences": 4},
            {"num_beams": 1, "min_new_tokens": 0},
            {"max_new_tokens": 142, "no_repeat_ngram_size": 3},
        ),
        (
            {"num_beams": 4, "early_stopping": True},
            {"length_penalty_style": "t5"},
            {"num_beams": 4, "length_penalty_style": "t5"},
        ),
        # As some publish them, for whoever samples.
        ({"temperature": 0.9, "top_p": 0.6}, {}, {}),
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": True},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
        ),
        ({"length_penalty": 2.0}, {}, {}),
        # Too long for the user.
        (SUMMARIES, {"max_new_tokens": 20}, SUMMARIES | {"max_new_tokens": 20, "min_new_tokens": 20}),
        ({"min_new_tokens": 100}, {}, {"min_new_tokens": 64}),
        ({"top_k": None, "temperature": None}, {}, {}),
    ],
)
def test_defaults_give_way_to_the_users_mode(
    defaults: dict[str, Any], settings: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert GenerationConfig.from_settings(settings, defaults) == GenerationConfig(**wanted)


@pytest.mark.parametrize(
    ("settings", "defaults", "message"),
    [
        ({"top_q": 0.5}, {}, "generation setting 'top_q' is unknown; did you mean 'top_p'?"),
        ({}, {"xyzzy": 1}, "generation setting 'xyzzy' is unknown"),
        ({"num_beams": "4"}, SUMMARIES, "num_beams must be a whole number, not '4'"),
        ({}, {"max_new_tokens": "many"}, "max_new_tokens must be a whole number, not 'many'"),
        # What the user asks for is not dropped, whatever the defaults are.
        ({"temperature": 0.7}, SUMMARIES, "temperature 0.7 needs do_sample=True"),
        ({"temperature": 0.7}, {}, "temperature 0.7 needs do_sample=True"),
        ({"length_penalty": 0.6}, CHAT, "length_penalty 0.6 needs num_beams of at least 2"),
        ({"do_sample": True, "num_beams": 2}, CHAT, "num_beams 2 and do_sample=True exclude each other"),
        (
            {"min_new_tokens": 30, "max_new_tokens": 20},
            SUMMARIES,
            "min_new_tokens 30 must be at most max_new_tokens 20",
        ),
        ({"num_return_sequences": 5}, SUMMARIES, "num_return_sequences 5 must be at most num_beams 4"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], defaults: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        GenerationConfig.from_settings(settings, defaults)
    assert str(error.value).startswith(message)
