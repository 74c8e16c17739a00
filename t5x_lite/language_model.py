"""The friendly face: a model, its parameters and its tokenizer in one object."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_lite import sharding
from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Layout, decoder_batch
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.decoding.batches import checked
from t5x_lite.decoding.buckets import bucket, length_bucket, padded
from t5x_lite.decoding.generate import Decoder, Generated
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.speculative import Speculator
from t5x_lite.decoding.stopping import stop_table
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.t5 import tokens_in_use
from t5x_lite.models.transformer import Batch, Transformer
from t5x_lite.training.losses import chunked_log_likelihood, number_of_chunks


class Scores(NamedTuple):
    """Likelihoods of targets.

    Attributes:
      log_likelihood: float32 `[N]`, sum over the target's tokens, EOS included, in nats.
      num_tokens: int32 `[N]`, how many those are.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray


class Answer(NamedTuple):
    """One generated text.

    Attributes:
      text: decoded, without special tokens.
      score: see `decoding.generate.Generated`, in nats.
      num_tokens: how many tokens were generated, EOS included.
    """

    text: str
    score: float
    num_tokens: int


class LanguageModel:
    """A model that takes and gives text.

    Attributes:
      model: the Flax module.
      tokenizer: None if the checkpoint had none; then only `generate_tokens` works. Ids that are none of its tokens,
        or without it padding of T5's vocabulary, are never generated.
      mesh: where it computes.
      checkpoint: what it was loaded from, if it was.
      generation: the checkpoint's own settings of `GenerationConfig`.
      compilations: programs that were compiled to generate: one for each configuration and bucket of shapes.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        checkpoint: Path | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.checkpoint = checkpoint
        self.generation = dict(generation or {})
        self.compilations = 0
        self._stop_tables: dict[str | tuple[str, ...], jax.Array] = {}
        self._generate = self._counting(Decoder.generate)
        self._begin = self._counting(Decoder.begin)
        self._advance = self._counting(Decoder.advance, donate_argnums=2)
        self._speculate = self._counting(Speculator.generate)

    @property
    def params(self) -> Any:
        """The parameters, a nested dict of arrays on `mesh`."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params
        self._unstacked = None

    @property
    def config(self) -> TransformerConfig:
        """The shape of the model."""
        return self.model.config

    def generation_config(self, **settings: Any) -> GenerationConfig:
        """Returns how the model generates: its checkpoint's own settings, and over them fields of `GenerationConfig`.

        Raises:
          InputError: an unknown field, a value that is not allowed, or two that contradict each other or the model.
        """
        config = GenerationConfig.from_settings(settings, self.generation)
        start = settings.get("decoder_start_token_id")
        if start is not None and not self.config.num_encoder_layers:
            raise InputError(
                f"decoder_start_token_id {start} needs a model with an encoder: a decoder alone begins with its prompt"
            )
        self._check_config(config)
        return config

    def generate(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        max_input_tokens: int | None = None,
        draft: "LanguageModel | None" = None,
        **settings: Any,
    ) -> list[str]:
        """Returns an answer to each text, or where the model is a decoder alone its continuation.

        Args:
          texts: inputs; their number and lengths are padded up to powers of two, so that few shapes are compiled.
          batch_size: texts that are decoded together.
          max_input_tokens: a text of more, special ones counted, is cut at its end, as in training; None: none is.
          draft: a smaller model of the same vocabulary, whose proposals this one checks: the same answers, sooner.
          **settings: fields of `GenerationConfig`, such as `max_new_tokens=64`, over the checkpoint's own. With
            `num_return_sequences` there are that many answers to a text, one after the other.

        Raises:
          InputError: a setting that is not allowed, a draft that does not fit the model, or a text that is too long for
            either or, where it is the prompt, empty.
        """
        answers = self.generate_scored(
            texts, batch_size=batch_size, max_input_tokens=max_input_tokens, draft=draft, **settings
        )
        return [answer.text for several in answers for answer in several]

    def generate_scored(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        max_input_tokens: int | None = None,
        row_ids: Sequence[int] | None = None,
        draft: "LanguageModel | None" = None,
        **settings: Any,
    ) -> list[list[Answer]]:
        """Returns the answers to each text with their scores.

        Args:
          texts: as `generate`.
          batch_size: as `generate`.
          max_input_tokens: as `generate`.
          row_ids: a number for each text, by default 0, 1, ...: what is sampled for it depends on the seed and on this
            number, not on the texts beside it.
          draft: as `generate`.
          **settings: as `generate`.
        """
        _check_texts("generate", texts)
        _check_at_least_one("batch_size", batch_size)
        tokenizer = self.require_tokenizer()
        config = self.generation_config(**settings)
        if max_input_tokens is not None:
            _check_at_least_one("max_input_tokens", max_input_tokens)
        self.check_draft(draft, **settings)
        inputs = [self._input(text, config, draft, max_input_tokens) for text in texts]
        numbers = _row_numbers(row_ids, len(texts))
        # Texts of like length are decoded together.
        order = sorted(range(len(texts)), key=lambda index: len(inputs[index]))
        answers: list[list[Answer]] = [[] for _ in texts]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = self._input_batch([inputs[index] for index in part])
            out = jax.device_get(self.generate_tokens(batch, config, row_ids=numbers[part], draft=draft))
            several = config.num_return_sequences
            for row, (tokens, length, score) in enumerate(zip(out.tokens, out.lengths, out.scores, strict=True)):
                text = tokenizer.decode(tokens[:length].tolist())
                answers[part[row // several]].append(Answer(text, float(score), int(length)))
        return answers

    def generate_tokens(
        self,
        batch: Batch,
        config: GenerationConfig | None = None,
        *,
        row_ids: Any = None,
        draft: "LanguageModel | None" = None,
    ) -> Generated:
        """Returns tokens `[B * num_return_sequences, N]`, lengths and scores for a batch of token ids.

        Args:
          batch: see `decoding.generate`; it is padded to the shape of its bucket.
          config: by default the checkpoint's own.
          row_ids: int32 `[B]`, see `decoding.generate`.
          draft: as `generate`.

        Raises:
          InputError: an encoder alone, a batch that is none, prompts that are not padded on the right, an input or a
            prompt with new tokens that take more positions than the model or the draft has, or a draft that does not
            fit the model.
        """
        config = self.generation_config() if config is None else config
        if not isinstance(config, GenerationConfig):
            raise InputError(f"config must be a GenerationConfig, not {_shown(config)}")
        self._check_config(config)
        self._check_generates()
        speculator = None if draft is None else self._speculator(config, draft)
        arrays = self._check_batch(batch, config, draft)
        rows = len(next(iter(arrays.values())))
        arrays, row_ids = self._padded(arrays, _row_numbers(row_ids, rows))
        table = self._stop_table(config)
        decoder, params = self._decoding(config)
        rest = arrays, jnp.uint32(config.seed), row_ids, table
        with jax.set_mesh(self.mesh):
            if speculator is None or draft is None:
                out = self._generate(decoder, params, *rest)
            else:
                out, _ = self._speculate(speculator, params, draft._decoding(config)[1], *rest)
        return jax.tree.map(lambda x: x[: rows * config.num_return_sequences], out)

    def stream(self, text: str, *, tokens_at_once: int = 4, row_id: int = 0, **settings: Any) -> Iterator[str]:
        """Yields the answer to one text piece by piece, as it is generated; together they are what `generate` returns.

        A tokenizer may take away a space once it knows what follows, as BERT's does before punctuation; what has been
        yielded stays then, and the rest follows from where the two part.

        Args:
          text: the input.
          tokens_at_once: tokens after which a piece is yielded.
          row_id: see `generate_scored`.
          **settings: as `generate`; neither beams, whose past may still change, nor several sequences.

        Raises:
          InputError: as `generate`.
        """
        config = self.generation_config(**settings)
        for name in ("num_beams", "num_return_sequences"):
            if getattr(config, name) > 1:
                raise InputError(f"{name} {getattr(config, name)} cannot be streamed, only a single sequence can")
        _check_at_least_one("tokens_at_once", tokens_at_once)
        batch = self._input_batch([self._input(text, config)])
        return self._pieces(batch, config, tokens_at_once, _row_numbers([row_id], 1))

    def check_input(self, text: str, *, draft: "LanguageModel | None" = None, **settings: Any) -> None:
        """Raises the InputError with which `generate` would refuse this text with a draft that fits, if it would."""
        self._input(text, self.generation_config(**settings), draft)

    def check_draft(self, draft: "LanguageModel | None", **settings: Any) -> None:
        """Raises the InputError with which `generate` would refuse this draft, if any, whatever the text."""
        if draft is not None:
            self._speculator(self.generation_config(**settings), draft)

    def score(self, inputs: Sequence[str], targets: Sequence[str], *, batch_size: int = 32) -> Scores:
        """Returns the log-likelihood of each target given its input.

        With an encoder a target ends in EOS, which counts. For a decoder alone it is the continuation of the input,
        and nothing is added to it. Logits exist for a part of the tokens at a time, as while training.

        Raises:
          InputError: the two have different lengths, or the model is an encoder alone.
        """
        self._check_generates()
        _check_at_least_one("batch_size", batch_size)
        for texts in (inputs, targets):
            _check_texts("score", texts)
        if len(inputs) != len(targets):
            raise InputError(f"{len(inputs)} inputs for {len(targets)} targets")
        likelihoods, counts = [], []
        for start in range(0, len(inputs), batch_size):
            part = zip(inputs[start : start + batch_size], targets[start : start + batch_size], strict=True)
            if self.config.num_encoder_layers:
                batch = self._pairs_batch(
                    [(self._framed(source), self._framed(target, is_target=True)) for source, target in part]
                )
            else:
                encode = self.require_tokenizer().encode
                # The last token is not read.
                batch = self._decoder_batch(
                    [(self._prompt(source, True), encode(target)) for source, target in part], 1
                )
            rows = min(batch_size, len(inputs) - start)
            with jax.set_mesh(self.mesh):
                scores = _log_likelihood(self.model, self.params, batch)
            likelihoods.append(np.asarray(scores)[:rows])
            counts.append(np.sum(batch["decoder_loss_weights"][:rows], axis=1).astype(np.int32))
        empty = [np.zeros(0)]
        return Scores(np.concatenate(likelihoods or empty), np.concatenate(counts or empty).astype(np.int32))

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> list[np.ndarray]:
        """Returns the hidden states of each text, float32 `[L_i, D]`, special tokens around it included.

        They are those of the encoder; where there is none, of the decoder.
        """
        _check_texts("embed", texts)
        _check_at_least_one("batch_size", batch_size)
        out: list[np.ndarray] = []
        for start in range(0, len(texts), batch_size):
            part = [self._framed(text) for text in texts[start : start + batch_size]]
            if self.config.num_encoder_layers:
                batch = self._encoder_batch(part)
            else:
                batch = self._decoder_batch([(tokens, []) for tokens in part])
            with jax.set_mesh(self.mesh):
                hidden = np.asarray(_hidden_states(self.model, self.params, batch), np.float32)
            out += [hidden[row, : len(tokens)] for row, tokens in enumerate(part)]
        return out

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
          InputError: the checkpoint has none.
        """
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer; use generate_tokens with token ids")
        return self.tokenizer

    def _counting(self, function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            self.compilations += 1  # this runs when JAX traces, which it does once for every program
            return function(*args)

        return jax.jit(traced, static_argnums=0, **kwargs)

    def _decoding(self, config: GenerationConfig) -> tuple[Decoder, Any]:
        if self._unstacked is None:
            self._unstacked = self.model.unstacked(self.params)
        return self._decoder(config), self._unstacked

    def _decoder(self, config: GenerationConfig) -> Decoder:
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else tokens_in_use(self.config)
        return Decoder(self.model, config, vocab_size).without_seed()

    def _speculator(self, config: GenerationConfig, draft: "LanguageModel") -> Speculator:
        if not isinstance(draft, LanguageModel):
            raise InputError(f"draft must be a LanguageModel, not {_shown(draft)}")
        if draft.mesh != self.mesh:
            there, here = sharding.describe(draft.mesh), sharding.describe(self.mesh)
            raise InputError(f"the draft model is on mesh {there}, the model on {here}")
        return Speculator(self._decoder(config), draft.model)

    def _stop_table(self, config: GenerationConfig) -> jax.Array | None:
        texts = config.stop_strings
        if texts and texts not in self._stop_tables:
            self._stop_tables[texts] = jnp.asarray(stop_table(texts, self.require_tokenizer().token_bytes()))
        return self._stop_tables.get(texts)

    def _pieces(
        self, batch: Batch, config: GenerationConfig, tokens_at_once: int, numbers: np.ndarray
    ) -> Iterator[str]:
        tokenizer, given = self.require_tokenizer(), ""
        batch, row_ids = self._padded(batch, numbers)
        decoder, params = self._decoding(config)
        with jax.set_mesh(self.mesh):
            rest = jnp.uint32(config.seed), row_ids, self._stop_table(config)
            progress = self._begin(decoder, params, batch, *rest)
        until, finished = 0, False
        while not finished:
            until = min(until + tokens_at_once, config.max_new_tokens)
            with jax.set_mesh(self.mesh):
                progress = self._advance(decoder, params, progress, until)
            tokens, length = (np.asarray(x)[0, 0] for x in (progress.search.tokens, progress.search.lengths))
            finished = until == config.max_new_tokens or bool(progress.search.finished[0, 0])
            text = tokenizer.decode(tokens[:length].tolist())
            # Of a character whose bytes are not all there yet, the rest comes with the next tokens.
            sure = text if finished else text.rstrip("\N{REPLACEMENT CHARACTER}")
            while finished and not sure.startswith(given):
                given = given[:-1]
            if sure.startswith(given) and len(sure) > len(given):
                yield sure[len(given) :]
                given = sure

    def _framed(self, text: str, is_target: bool = False, limit: int | None = None) -> list[int]:
        tokenizer = self.require_tokenizer()
        prefix, suffix = tokenizer.target_affixes if is_target else (tokenizer.prefix_ids, tokenizer.suffix_ids)
        room = None if limit is None else max(limit - len(prefix) - len(suffix), 0)
        return [*prefix, *tokenizer.encode(text)[:room], *suffix]

    def _input(
        self,
        text: str,
        config: GenerationConfig,
        draft: "LanguageModel | None" = None,
        limit: int | None = None,
    ) -> list[int]:
        _check_texts("generate", [text])
        self._check_generates()
        has_encoder = bool(self.config.num_encoder_layers)
        tokens = self._framed(text, limit=limit) if has_encoder else self._prompt(text)[:limit]
        self._check_ids(tokens)
        source, prompt = (len(tokens), 1) if has_encoder else (0, len(tokens))
        self._check_lengths(source, prompt, config, draft)
        return tokens

    def _input_batch(self, inputs: Sequence[list[int]]) -> dict[str, np.ndarray]:
        side = "encoder" if self.config.num_encoder_layers else "decoder"
        longest = max(len(tokens) for tokens in inputs)
        tokens = [[*tokens, *[self.config.fill_id] * (longest - len(tokens))] for tokens in inputs]
        segments = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in inputs]
        return {f"{side}_input_tokens": np.array(tokens, np.int32), f"{side}_segment_ids": np.array(segments, np.int32)}

    def _prompt(self, text: str, or_start: bool = False) -> list[int]:
        tokenizer = self.require_tokenizer()
        prompt = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        if not prompt and not or_start:
            raise InputError("an empty text is no prompt for this model: its texts begin with no special token")
        return prompt or [self.config.decoder_start_id]

    def _padded(self, batch: Mapping[str, Any], row_ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        arrays = padded(batch, self.config, sharding.batch_ways(self.mesh))
        below = len(next(iter(arrays.values()))) - len(row_ids)
        return arrays, np.pad(row_ids, (0, below), mode="edge")

    def _check_config(self, config: GenerationConfig) -> None:
        ids = config.decoder_start_token_id, config.forced_bos_token_id, config.forced_eos_token_id
        self._check_ids([token for token in (*ids, *config.end_ids(())) if token is not None])
        decoder = self._decoder(config)
        decoder.check()
        size = decoder.vocab_size or self.config.vocab_size
        if {*config.suppress_tokens, *config.begin_suppress_tokens}.issuperset(range(size)):
            raise InputError(f"suppress_tokens and begin_suppress_tokens leave none of the {size} ids to generate")

    def _check_batch(
        self, batch: Batch, config: GenerationConfig, draft: "LanguageModel | None"
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of the batch."""
        arrays, source, prompt = checked(batch, self.config)
        self._check_ids(*(array for name, array in arrays.items() if name.endswith("_input_tokens")))
        self._check_lengths(source, prompt, config, draft)
        return arrays

    def _check_lengths(self, source: int, prompt: int, config: GenerationConfig, draft: "LanguageModel | None") -> None:
        for lm, name in ((self, "the model"), (draft, "the draft model")):
            if lm is None:
                continue
            for length in (source, prompt):
                lm._check_length(length, f"the {length} tokens of a text", name)
            # The last token is not read again.
            ends = prompt + config.max_new_tokens - 1
            lm._check_length(ends, f"max_new_tokens {config.max_new_tokens} and the prompt", name)

    def _check_ids(self, *tokens: Any) -> None:
        for ids in tokens:
            for extreme in (int(np.max(ids, initial=0)), int(np.min(ids, initial=0))):
                if not 0 <= extreme < self.config.vocab_size:
                    raise InputError(
                        f"token id {extreme}: the model has embeddings for {self.config.vocab_size}, from 0"
                    )

    def _check_generates(self) -> None:
        if not self.config.num_decoder_layers:
            raise InputError("the model has no decoder: it cannot predict what comes next")

    def _check_length(self, length: int, what: str, name: str = "the model") -> None:
        limit = self.config.max_positions
        if self.config.positions == "learned" and length > limit:
            raise InputError(f"{what} take {length} positions, but {name} has {limit}")

    def _length(self, sequences: Sequence[Sequence[int]], unread: int = 0) -> int:
        self._check_ids(*sequences)
        longest = max(len(sequence) for sequence in sequences)
        self._check_length(longest - unread, f"the {longest} tokens of a text")
        return length_bucket(longest - unread, self.config)

    def _pairs_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Mapping[str, np.ndarray]:
        layout = self._layout([source for source, _ in pairs], [target for _, target in pairs])
        rows = [[Example(np.array(source, np.int32), np.array(target, np.int32))] for source, target in pairs]
        return layout(rows, self._rows(pairs))

    def _encoder_batch(self, sequences: Sequence[list[int]]) -> Mapping[str, np.ndarray]:
        rows = [[Example(np.array(tokens, np.int32))] for tokens in sequences]
        return self._layout(sequences)(rows, self._rows(sequences))

    def _layout(self, inputs: Sequence[list[int]], targets: Sequence[list[int]] | None = None) -> Layout:
        return Layout(
            self._length(inputs),
            0 if targets is None else self._length(targets),
            self.config.fill_id,
            self.config.decoder_start_id,
        )

    def _decoder_batch(self, pairs: Sequence[tuple[list[int], list[int]]], unread: int = 0) -> Mapping[str, np.ndarray]:
        length = self._length([[*prompt, *target] for prompt, target in pairs], unread)
        whole = decoder_batch(pairs, rows=self._rows(pairs), length=length + unread, pad_id=self.config.fill_id)
        return {name: array[:, :length] for name, array in whole.items()}

    def _rows(self, examples: Sequence[Any]) -> int:
        return bucket(len(examples), sharding.batch_ways(self.mesh))


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InputError(f"{name} takes a list of texts: [{texts[:40]!r}], not {texts[:40]!r}")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{name} takes texts, not {_shown(text)}")


def _shown(value: Any) -> str:
    return f"{' '.join(str(value).split())[:40]} ({type(value).__name__})"


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")


def _row_numbers(row_ids: Any, rows: int) -> np.ndarray:
    numbers = np.arange(rows) if row_ids is None else np.asarray(row_ids)
    if numbers.shape != (rows,):
        raise InputError(f"row_ids must be {rows} numbers, one for each row, not {numbers.size}")
    return numbers.astype(np.int32)


@jax.jit(static_argnums=0)
def _log_likelihood(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    apply: Any = model.apply
    variables = {"params": params}
    hidden = apply(variables, batch, method="prediction_inputs")
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    chunks = number_of_chunks(targets.shape, model.config.vocab_size, None)
    return chunked_log_likelihood(partial(apply, method="head_logits"), variables, hidden, targets, weights, chunks)


@jax.jit(static_argnums=0)
def _hidden_states(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    hidden: Any = model.apply({"params": params}, batch, method="hidden_states")
    return hidden
