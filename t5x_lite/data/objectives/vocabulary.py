"""What the training objectives need to know of a tokenizer, as arrays that any process can be given."""

import dataclasses
import functools
import unicodedata
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.errors import InputError

MODE_NAMES = ("[NLU]", "[NLG]", "[S2S]")
"""UL2's names for its modes (Tay et al. 2022): regular, extreme and sequential denoising."""

_FULL_STOPS = ".!?…。！？"  # noqa: RUF001
_CLOSING = "\"'”’)]»"  # noqa: RUF001


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids and their kinds. It holds no object of a library, so that it can be pickled.

    Attributes:
        vocab_size: every id is below it.
        pad_id, eos_id, bos_id, unk_id: as those of `Tokenizer`; None where there is no such token.
        mask_id: likewise; where there is no mask, `<extra_id_0>` takes its place, so that a vocabulary that was trained
            here serves every objective.
        sentinels: the ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order.
        prefix_ids, suffix_ids: what stands before and after a text.
        target_affixes: the same (prefix, suffix) for a target.
        special: bool [vocab_size], the ids that are never masked and never drawn as a random token: those that stand
            for no text, the unknown token among them, and the sentinels.
        word_starts: bool [vocab_size], the ids that begin a word: those that begin with a space, those of punctuation
            alone (a word of its own, as in BERT), and the special ones. None where tokens do not show it.
        sentence_ends: bool [vocab_size], the ids that end a sentence: full stop, question mark or exclamation mark,
            with or without a closing quotation mark or bracket. None where a token's text is not known.
        modes: UL2's mode names, for those that the vocabulary can spell, and their ids.
    """

    vocab_size: int
    pad_id: int
    eos_id: int | None
    bos_id: int | None
    mask_id: int | None
    unk_id: int | None
    sentinels: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    target_affixes: tuple[tuple[int, ...], tuple[int, ...]]
    special: np.ndarray
    word_starts: np.ndarray | None = None
    sentence_ends: np.ndarray | None = None
    modes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer, mode_names: tuple[str, ...] = MODE_NAMES) -> "Vocabulary":
        """Returns what there is to know of a tokenizer; `mode_names` are the texts that may become `modes`."""
        special = np.zeros(tokenizer.vocab_size, bool)
        roles = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.mask_id, tokenizer.unk_id)
        around = (
            *tokenizer.prefix_ids,
            *tokenizer.suffix_ids,
            *tokenizer.target_affixes[0],
            *tokenizer.target_affixes[1],
        )
        special[[*(token for token in roles if token is not None), *tokenizer.sentinels, *around]] = True
        word_starts = sentence_ends = None
        try:
            spelled = tokenizer.token_bytes()
        except InputError:  # this tokenizer's tokens cannot be told apart; few objectives need it
            spelled = None
        if spelled is not None:
            texts = [token.decode(errors="replace") for token in spelled]
            special |= np.array([not text for text in texts], bool)
            if any(text[:1].isspace() for text in texts):  # not GPT-1's, whose spaces are at the ends of words
                word_starts = special | np.array([_begins_word(text) for text in texts], bool)
            sentence_ends = ~special & np.array([_ends_sentence(text) for text in texts], bool)
        return cls(
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            mask_id=tokenizer.mask_id if tokenizer.mask_id is not None else next(iter(tokenizer.sentinels), None),
            unk_id=tokenizer.unk_id,
            sentinels=tuple(tokenizer.sentinels),
            prefix_ids=tuple(tokenizer.prefix_ids),
            suffix_ids=tuple(tokenizer.suffix_ids),
            target_affixes=tokenizer.target_affixes,
            special=special,
            word_starts=word_starts,
            sentence_ends=sentence_ends,
            modes=_spell(mode_names, tokenizer),
        )

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """The ids that are not special, int32 [ordinary ids]."""
        return np.flatnonzero(~self.special).astype(np.int32)

    def require_eos(self) -> int:
        """Returns the id of EOS; raises InputError if there is none."""
        if self.eos_id is None:
            raise InputError(
                "this tokenizer has no end-of-sequence token; name one as eos_token in tokenizer_config.json"
            )
        return self.eos_id

    def require_mask(self) -> int:
        """Returns the id of the mask; raises InputError if there is none."""
        if self.mask_id is None:
            raise InputError("this tokenizer has no mask token; name one as mask_token in tokenizer_config.json")
        return self.mask_id

    def require_word_starts(self) -> np.ndarray:
        """Returns `word_starts`; raises InputError if no token is known to begin a word."""
        if self.word_starts is None:
            raise InputError("whole words: this tokenizer does not show where a word begins; mask tokens instead")
        return self.word_starts

    def require_sentence_ends(self) -> np.ndarray:
        """Returns `sentence_ends`; raises InputError if no token is known to end a sentence."""
        if self.sentence_ends is None or not self.sentence_ends.any():
            raise InputError("sentences: this tokenizer has no token of a full stop, by which sentences are told apart")
        return self.sentence_ends


def _begins_word(text: str) -> bool:
    return text[:1].isspace() or (bool(text) and all(map(_is_punctuation, text)))


def _is_punctuation(character: str) -> bool:
    # As BERT's tokenizer has it: all of ASCII that is visible and no letter or digit, and Unicode's punctuation.
    if character.isascii():
        return character.isprintable() and not character.isalnum() and not character.isspace()
    return unicodedata.category(character).startswith("P")


def _ends_sentence(text: str) -> bool:
    stop = text.strip().rstrip(_CLOSING)
    return bool(stop) and not stop.strip(_FULL_STOPS)


def _spell(names: tuple[str, ...], tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    spelled: dict[str, tuple[int, ...]] = {}
    for name in names:
        try:
            ids = tuple(tokenizer.encode(name))
        except InputError:  # a vocabulary without an unknown token that cannot spell the name
            continue
        if ids and tokenizer.unk_id not in ids:
            spelled[name] = ids
    return spelled
