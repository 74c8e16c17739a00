"""Token for token what transformers generates, with every model of the fixtures that generates at all.

Greedy decoding of the same models is in `tests/test_language_model_families.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite.decoding import GenerationConfig, generate

FIXTURES = Path(__file__).parents[1] / "fixtures"
SETTINGS = json.loads((FIXTURES / "generation_settings.json").read_text())
NEW_TOKENS = 12
BEAMS = {
    "beam4": GenerationConfig(max_new_tokens=NEW_TOKENS, num_beams=4),
    "beam3": GenerationConfig(max_new_tokens=NEW_TOKENS, num_beams=3, length_penalty=0.6, early_stopping=True),
}
# Of sums of a dozen log-probabilities, whose logits differ by up to 1e-5: see `float32_vs_float64_logits` in ref.json.
ATOL = 1e-4

Rows = list[list[int]]


def with_array(name: str) -> list[str]:
    """Returns the fixtures whose references have an array of this name."""
    found = []
    for path in sorted((FIXTURES / "huggingface").glob("*/ref.npz")):
        with np.load(path) as file:
            found += [path.parent.name] if name in file else []
    return found


SEARCHED, LEFT_PADDED = with_array("beam4_ids"), with_array("prompt_mask")


def cut(ids: Any, sizes: Any) -> Rows:
    return [row[:size].tolist() for row, size in zip(np.asarray(ids), np.asarray(sizes), strict=True)]


def given(reference: dict[str, np.ndarray]) -> Rows:
    """Returns what is generated from, without padding."""
    if "prompt_mask" in reference:
        rows = zip(reference["prompt_ids"], reference["prompt_mask"] > 0, strict=True)
        return [ids[real].tolist() for ids, real in rows]
    if "prompt_ids" in reference:
        return cut(reference["prompt_ids"], reference["prompt_len"])
    return cut(reference["input_ids"], np.sum(reference["attention_mask"], axis=1))


def run(case: Any, rows: Sequence[list[int]], config: GenerationConfig, width: int = 0) -> tuple[Rows, np.ndarray]:
    """Returns tokens and scores for rows that are padded on the right with an id that elsewhere means something."""
    width = max(width, *map(len, rows))
    side = "encoder" if case.config.num_encoder_layers else "decoder"
    batch = {
        f"{side}_input_tokens": np.array([row + [5] * (width - len(row)) for row in rows], np.int32),
        f"{side}_segment_ids": np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int32),
    }
    made = generate(case.model, case.params, batch, config)
    return cut(made.tokens, made.lengths), np.asarray(made.scores)


def test_the_references_are_there() -> None:
    assert (len(SEARCHED), len(LEFT_PADDED), len(SETTINGS)) == (18, 3, 6)


@pytest.mark.parametrize("setting", BEAMS)
@pytest.mark.parametrize("name", SEARCHED)
def test_beam_search_finds_what_transformers_finds(name: str, setting: str, huggingface_case: Any) -> None:
    case = huggingface_case(name)
    reference, notes = case.reference, case.notes["generation"][setting]
    rows, wanted = given(reference), cut(reference[f"{setting}_ids"], reference[f"{setting}_len"])
    tokens, scores = run(case, rows, BEAMS[setting])
    assert tokens == wanted
    np.testing.assert_allclose(scores, notes["sequences_scores"], atol=ATOL, rtol=0)
    # Whatever the neighbours are: here each row is its own, in the same program.
    width = max(map(len, rows))
    for row, expected in zip(rows, wanted, strict=True):
        assert run(case, [row] * len(rows), BEAMS[setting], width)[0] == [expected] * len(rows)


@pytest.mark.parametrize("name", ["umt5", "bart", "gpt2"])
def test_beam_search_of_a_text_alone(name: str, huggingface_case: Any) -> None:
    case = huggingface_case(name)
    rows, wanted = given(case.reference), cut(case.reference["beam4_ids"], case.reference["beam4_len"])
    row = int(np.argmin([len(row) for row in rows]))
    tokens, scores = run(case, [rows[row]], BEAMS["beam4"])
    assert tokens == [wanted[row]]
    np.testing.assert_allclose(scores, case.notes["generation"]["beam4"]["sequences_scores"][row], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", LEFT_PADDED)
def test_prompts_that_transformers_has_padded_on_the_left(name: str, huggingface_case: Any) -> None:
    case = huggingface_case(name)
    tokens, _ = run(case, given(case.reference), GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert tokens == cut(case.reference["greedy_ids"], case.reference["greedy_len"])


@pytest.mark.parametrize("number", range(6), ids=lambda number: f"{SETTINGS[number]['fixture']}-{number}")
def test_settings_that_change_the_scores(number: int, huggingface_case: Any) -> None:
    stored = SETTINGS[number]
    case = huggingface_case(stored["fixture"])
    tokens, scores = run(case, stored["rows"], GenerationConfig(**stored["settings"]))
    assert tokens == stored["tokens"]
    np.testing.assert_allclose(scores, stored["scores"], atol=ATOL, rtol=0)
