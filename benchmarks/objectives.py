"""How many tokens of text every training objective turns into examples each second, on one core.

    python benchmarks/objectives.py

A line of JSON for each objective: the tokens of a window, and the best of five times over 2,000 windows of random ids
of a vocabulary of T5's size, in tokens per second of processor time. Making the random generator of each example, as
the pipeline does it, is part of it.
"""

import json
import time

import numpy as np

from t5x_lite.data.objectives import (
    UL2,
    Bart,
    CausalLM,
    DocumentRotation,
    IidDenoising,
    MaskedLM,
    Masking,
    NextSentence,
    Objective,
    PrefixLM,
    SentencePermutation,
    SpanCorruption,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
    Vocabulary,
)

OBJECTIVES: dict[str, tuple[Objective, int]] = {
    "span_corruption": (SpanCorruption(), 568),
    "span_corruption, random_roll": (SpanCorruption(random_roll=True), 568),
    "iid_denoising": (IidDenoising(), 511),
    "causal_lm": (CausalLM(), 512),
    "prefix_lm": (PrefixLM(), 512),
    "prefix_lm, decoder": (PrefixLM(sides="decoder"), 512),
    "bart (permutation, infilling)": (Bart(), 510),
    "bart, token masking": (Bart((TokenMasking(),)), 510),
    "bart, token deletion": (Bart((TokenDeletion(),)), 510),
    "bart, infilling of whole words": (Bart((TextInfilling(whole_words=True),)), 510),
    "bart, sentence permutation": (Bart((SentencePermutation(),)), 510),
    "bart, document rotation": (Bart((DocumentRotation(),)), 510),
    "masked_lm": (MaskedLM(), 510),
    "masked_lm, huggingface": (MaskedLM(Masking(style="huggingface")), 510),
    "masked_lm, whole words": (MaskedLM(Masking(whole_words=True)), 510),
    "next_sentence": (NextSentence(), 509),
    "ul2": (UL2(), 509),
}
EXAMPLES = 2000


def vocabulary() -> Vocabulary:
    ids, rng = np.arange(32128), np.random.default_rng(0)
    special = (ids < 5) | (ids >= 32000)
    return Vocabulary(
        vocab_size=len(ids),
        pad_id=0,
        eos_id=1,
        bos_id=3,
        mask_id=4,
        unk_id=2,
        sentinels=tuple(range(32099, 31999, -1)),
        prefix_ids=(3,),
        suffix_ids=(1,),
        target_affixes=((3,), (1,)),
        special=special,
        word_starts=special | (rng.random(len(ids)) < 0.7),
        sentence_ends=~special & (rng.random(len(ids)) < 0.05),
        modes={"[NLU]": (32100,), "[NLG]": (32101,), "[S2S]": (32102,)},
    )


def seconds(objective: Objective, length: int, flat: np.ndarray, words: Vocabulary) -> float:
    other = (flat[-2000:],) if "other" in objective.arrays else ()
    start = time.process_time()
    for index in range(EXAMPLES):
        key, counter = np.array([1, 0], np.uint64), np.array([0, index, 1, 0], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        objective(flat[index * length : (index + 1) * length], *other, rng, words)
    return time.process_time() - start


def main() -> None:
    words = vocabulary()
    flat = np.random.default_rng(1).integers(5, 32000, 568 * EXAMPLES + 2000).astype(np.uint16)
    for name, (objective, length) in OBJECTIVES.items():
        best = min(seconds(objective, length, flat, words) for _ in range(5))
        line = {"objective": name, "window": length, "tokens_per_second": round(EXAMPLES * length / best)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
