"""How to generate: Hugging Face's settings by their names, every one of them checked."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from t5x_lite.errors import InputError, nearest


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; names and meanings are Hugging Face's, and None is the default of any of them.

    The most likely token is taken again and again, unless `do_sample` draws it or `num_beams` above 1 searches.
    Lists are kept as tuples, and a single `eos_token_id` or stop string as a tuple of one: a configuration is hashable.

    Attributes:
      max_new_tokens: tokens after which a row ends, EOS included.
      min_new_tokens: tokens before which no EOS is generated.
      do_sample: whether tokens are drawn from the model's distribution.
      num_beams: sequences that beam search keeps; 1: no search.
      num_return_sequences: sequences returned for a row, of those sampled or of the beams.
      temperature: divides the logits before sampling.
      top_k: sample among this many most likely tokens (and those as likely as the last of them); 0: all.
      top_p: sample among the smallest set of most likely tokens whose probabilities sum to this (Holtzman et al. 2020).
      min_p: leave out tokens less likely than this share of the most likely one's probability (Nguyen et al. 2024).
      typical_p: sample among the tokens whose information is closest to the entropy and whose probabilities sum to
        this (Meister et al. 2022).
      repetition_penalty: divides positive and multiplies negative scores of tokens that the decoder has seen (Keskar et
        al. 2019).
      no_repeat_ngram_size: no sequence of this many tokens appears twice; 0: off.
      bad_words_ids: sequences of token ids that are never completed.
      suppress_tokens: ids that are never generated.
      begin_suppress_tokens: ids that are not generated first (after the forced first, if there is one).
      forced_bos_token_id: the first token, after a decoder start token alone; None: the model's.
      forced_eos_token_id: the token at `max_new_tokens`; None: the model's.
      decoder_start_token_id: the decoder's first input; None: the model's.
      eos_token_id: id or ids that end a sequence; None: the model's; (): none does.
      stop_strings: texts that end a sequence once they are complete in what was generated, of which they remain a part.
      length_penalty: exponent of the length by which beams are compared; above 0.0 favours long ones.
      length_penalty_style: hf: length ** length_penalty; t5: ((5 + length) / 6) ** length_penalty (Wu et al. 2016).
      early_stopping: beam search ends with `num_beams` finished ones (True), when a better one is unlikely (False), or
        when there can be none ("never").
      cache_dtype: of the cached keys and values; None: the model's.
      num_assistant_tokens: tokens that a draft model proposes per round of speculative decoding.
      seed: of the draws.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    stop_strings: str | tuple[str, ...] = ()
    length_penalty: float = 1.0
    length_penalty_style: Literal["hf", "t5"] = "hf"
    early_stopping: bool | Literal["never"] = False
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    num_assistant_tokens: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value that is not allowed, or for two that contradict each other."""
        for name in _DEFAULTS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        _need(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} must be at most max_new_tokens {self.max_new_tokens}",
        )
        self._check_mode()
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            _need(forced not in self.suppress_tokens, f"{name} {forced} must not be in suppress_tokens as well")

    def _check_mode(self) -> None:
        beams = self.num_beams > 1
        _need(
            not (beams and self.do_sample),
            f"num_beams {self.num_beams} and do_sample=True exclude each other: leave out one of them",
        )
        for name in _SAMPLING:
            value = getattr(self, name)
            _need(self.do_sample or value == _DEFAULTS[name], f"{name} {value} needs do_sample=True")
        for name in _BEAMS:
            value = getattr(self, name)
            _need(beams or value == _DEFAULTS[name], f"{name} {value} needs num_beams of at least 2")
        several = self.num_return_sequences
        _need(
            several == 1 or beams or self.do_sample,
            f"num_return_sequences {several} needs do_sample=True, or num_beams of at least {several}",
        )
        _need(
            not beams or several <= self.num_beams,
            f"num_return_sequences {several} must be at most num_beams {self.num_beams}",
        )
        _need(
            self.length_penalty_style == "hf" or self.early_stopping is False,
            f"length_penalty_style t5 needs early_stopping=False, not {self.early_stopping}",
        )

    def end_ids(self, model: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the ids that end a sequence: `eos_token_id`, or without it the model's."""
        ids = model if self.eos_token_id is None else self.eos_token_id
        return (ids,) if isinstance(ids, int) else ids

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> "GenerationConfig":
        """Returns the configuration that a user's settings give on top of a checkpoint's own.

        A default gives way where it does not suit the user's choice of a mode: what is for sampling alone is dropped
        unless the result samples, what is for beams alone unless it searches; `min_new_tokens` is lowered to
        `max_new_tokens` and `num_return_sequences` to what the mode can return. None is as good as absent.

        Args:
          settings: the user's, by name.
          defaults: those published with the checkpoint, by name.

        Raises:
          InputError: for an unknown name and whatever `GenerationConfig` refuses.
        """
        chosen, given = _known(settings), _known(defaults or {})
        # What the user chose is a choice against the defaults that contradict it.
        if chosen.get("num_beams", 1) > 1:
            given.pop("do_sample", None)
        if chosen.get("do_sample"):
            given.pop("num_beams", None)
        if chosen.get("length_penalty_style") == "t5":
            given.pop("early_stopping", None)
        merged = _DEFAULTS | given | chosen
        unsuitable = (*(() if merged["do_sample"] else _SAMPLING), *(() if merged["num_beams"] > 1 else _BEAMS))
        for name in unsuitable:
            given.pop(name, None)
        most = {"min_new_tokens": merged["max_new_tokens"]}
        if not merged["do_sample"]:
            most["num_return_sequences"] = merged["num_beams"]
        lowered = {name: min(given[name], limit) for name, limit in most.items() if name in given}
        return cls(**given | lowered | chosen)


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerationConfig)}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_BEAMS = ("length_penalty", "length_penalty_style", "early_stopping")

_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 1,
    "seed": 0,
}
# Logits times or divided by these have to be float32 numbers, of which 1e-38 is about the smallest that is not 0.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 1e-30 <= x <= 1e30, "1e-30 to 1e30 (do_sample=False gives the most likely token)"),
    "top_p": (lambda x: 1e-30 <= x <= 1, "1e-30 to 1"),
    "min_p": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "typical_p": (lambda x: 1e-30 <= x <= 1, "1e-30 to 1"),
    "repetition_penalty": (lambda x: 1e-30 <= x <= 1e30, "1e-30 to 1e30"),
    "length_penalty": (math.isfinite, "finite"),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False),
    "length_penalty_style": ("hf", "t5"),
    "early_stopping": (True, False, "never"),
    "cache_dtype": ("float32", "bfloat16", "int8"),
}


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    for name in settings:
        if name not in _DEFAULTS:
            raise InputError(f"generation setting '{name}' is unknown{nearest(name, _DEFAULTS)}")
    return {name: _checked(name, value) for name, value in settings.items() if value is not None}


def _checked(name: str, value: Any) -> Any:
    """Returns a setting as it is kept, whatever the others are."""
    if value is None:
        return _DEFAULTS[name]
    if name in _LEAST:
        return _whole(name, value, _LEAST[name])
    if name in _RANGES:
        allowed, words = _RANGES[name]
        _need(_is(value, Real), f"{name} must be a number, not {value!r}")
        _need(allowed(value), f"{name} must be {words}, not {value}")
        return float(value)
    if name in _CHOICES:
        # 1 == True, but it is no answer to the question whether.
        for choice in _CHOICES[name]:
            if type(value) is type(choice) and value == choice:
                return value
        raise InputError(f"{name} must be one of {', '.join(map(str, _CHOICES[name]))}, not {value!r}")
    if name == "stop_strings":
        return _stop_strings(value)
    if name == "bad_words_ids":
        _need(isinstance(value, list | tuple), f"{name} must be a list of lists of token ids, not {value!r}")
        words = tuple(_ids(name, word, "a list of lists of token ids") for word in value)
        _need(all(words), f"{name} must not contain an empty list")
        return words
    if name.endswith("_token_id") and not isinstance(value, list | tuple):
        token = _whole(name, value, 0)
        return (token,) if name == "eos_token_id" else token
    _need(name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"), f"{name} must be one id, not {value!r}")
    return _ids(name, value, "a list of token ids")


def _whole(name: str, value: Any, least: int) -> int:
    _need(_is(value, Integral), f"{name} must be a whole number, not {value!r}")
    _need(value >= least, f"{name} must be at least {least}, not {value}")
    _need(value < 2**32, f"{name} must be below 2**32, not {value}")
    return int(value)


def _ids(name: str, value: Any, wanted: str) -> tuple[int, ...]:
    _need(isinstance(value, list | tuple), f"{name} must be {wanted}, not {value!r}")
    return tuple(_whole(f"every id in {name}", token, 0) for token in value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    fine = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    _need(fine, f"stop_strings must be a text or a list of texts, not {value!r}")
    _need("" not in texts, "stop_strings must not contain an empty text")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"stop_strings must be valid UTF-8, not {text[:40]!r}") from None
    return tuple(texts)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as a number


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
