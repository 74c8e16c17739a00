"""Where sentences end, and texts made of whole ones."""

import numpy as np

from t5x_lite.data.objectives.vocabulary import Vocabulary


def sentence_bounds(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Returns int64 [sentences + 1]: sentence i of int `tokens` [n] is `tokens[bounds[i]:bounds[i + 1]]`.

    A sentence ends with a token that ends one, or the last of several in a row; what is left at the end is one too.

    Raises:
        InputError: for a vocabulary without such tokens.
    """
    stops = vocabulary.require_sentence_ends()[tokens]
    if not len(stops):
        return np.zeros(1, np.int64)
    ends = stops.copy()
    ends[:-1] &= ~stops[1:]
    ends[-1] = True
    return np.concatenate([[0], np.flatnonzero(ends) + 1])


def sentence_windows(tokens: np.ndarray, limit: int, vocabulary: Vocabulary) -> np.ndarray:
    """Returns int64 [windows + 1]: bounds of windows of whole sentences, each as long as fits in `limit` tokens.

    RoBERTa's "full sentences" (Liu et al. 2019, section 4.2), for a text or for several laid end to end. A sentence
    longer than `limit` is cut.
    """
    bounds = sentence_bounds(tokens, vocabulary)
    windows = [0]
    while windows[-1] < len(tokens):
        last = int(bounds[np.searchsorted(bounds, windows[-1] + limit, "right") - 1])
        windows.append(last if last > windows[-1] else min(windows[-1] + limit, len(tokens)))
    return np.array(windows, np.int64)
