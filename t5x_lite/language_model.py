"""The friendly face: a model, its parameters and its tokenizer in one object."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_lite import config as configuration
from t5x_lite import sharding
from t5x_lite.data.pipeline import decoder_batch, encoder_decoder_batch
from t5x_lite.data.tokenizers import Tokenizer, find_tokenizer
from t5x_lite.decoding.generate import Generated, GenerationConfig, generate
from t5x_lite.errors import InputError
from t5x_lite.interop import checkpoints
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Batch, Transformer, decoder_segments, encoder_segments
from t5x_lite.training.checkpoints import load_params


class Scores(NamedTuple):
    """Likelihoods of targets.

    Attributes:
      log_likelihood: float32 `[N]`, sum over the target's tokens, EOS included, in nats.
      num_tokens: int32 `[N]`, how many those are.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray


class LanguageModel:
    """A model that takes and gives text.

    Attributes:
      model: the Flax module.
      params: its parameters, a nested dict of arrays on `mesh`.
      tokenizer: None if the checkpoint had none; then only `generate_tokens` works.
      mesh: where it computes.
      checkpoint: what it was loaded from, if it was.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        checkpoint: Path | None = None,
    ):
        self.model = model
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.checkpoint = checkpoint

    @property
    def config(self) -> TransformerConfig:
        """The shape of the model."""
        return self.model.config

    def generate(self, texts: Sequence[str], *, batch_size: int = 32, **settings: Any) -> list[str]:
        """Returns the greedy answer to each text, or where the model is a decoder alone its continuation.

        Args:
          texts: inputs; their number and lengths are padded up to powers of two, so that few shapes are compiled.
          batch_size: texts that are decoded together.
          **settings: fields of `GenerationConfig`, such as `max_new_tokens=64`.
        """
        if isinstance(texts, str):
            raise InputError(f"generate takes a list of texts: [{texts[:40]!r}], not {texts[:40]!r}")
        tokenizer = self.require_tokenizer()
        config = GenerationConfig(**settings)
        out: list[str] = []
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            if self.config.num_encoder_layers:
                batch = self._encoder_batch([self._framed(text) for text in part])
            else:
                prompts = [self._prompt(text) for text in part]
                batch = self._decoder_batch([(prompt, []) for prompt in prompts])
                batch = {key: batch[key] for key in ("decoder_input_tokens", "decoder_segment_ids")}
            tokens = np.asarray(self.generate_tokens(batch, config).tokens)
            out += [tokenizer.decode(row.tolist()) for row in tokens[: len(part)]]
        return out

    def generate_tokens(self, batch: Batch, config: GenerationConfig | None = None) -> Generated:
        """Returns tokens `[B, N]`, lengths and scores for a batch of token ids; see `decoding.generate`.

        Raises:
          InputError: an encoder alone, prompts that are not padded on the right, or an input or a prompt with new
            tokens that take more positions than the model has.
        """
        config = config or GenerationConfig()
        self._check_generates()
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        start = np.full((1, 1), self.config.decoder_start_id, np.int32)  # of a side that is not there
        given = {"encoder_input_tokens": start, "decoder_input_tokens": start, **batch}
        self._check_ids(*(given[f"{side}_input_tokens"] for side in ("encoder", "decoder")))
        sources = np.asarray(encoder_segments(given, self.config.pad_id))
        prompts = np.asarray(decoder_segments(given, self.config.pad_id))
        if np.any(prompts[:, 1:] > prompts[:, :-1]):
            raise InputError("decoder_segment_ids rise within a row; prompts are padded on the right, with 0")
        source, prompt = (int(np.max(np.sum(segments > 0, axis=1))) for segments in (sources, prompts))
        self._check_length(source, f"the {source} tokens of an input")
        # The last token is not read again.
        self._check_length(prompt + config.max_new_tokens - 1, f"max_new_tokens {config.max_new_tokens} and the prompt")
        with jax.set_mesh(self.mesh):
            return generate(self.model, self.params, dict(batch), config, vocab_size=vocab_size)

    def score(self, inputs: Sequence[str], targets: Sequence[str], *, batch_size: int = 32) -> Scores:
        """Returns the log-likelihood of each target given its input.

        With an encoder a target ends in EOS, which counts. For a decoder alone it is the continuation of the input,
        and nothing is added to it.

        Raises:
          InputError: the two have different lengths, or the model is an encoder alone.
        """
        self._check_generates()
        if isinstance(inputs, str) or isinstance(targets, str):
            raise InputError("score takes a list of inputs and a list of targets, not texts")
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
                batch = self._decoder_batch([(self._prompt(source, True), encode(target)) for source, target in part])
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
        if isinstance(texts, str):
            raise InputError(f"embed takes a list of texts: [{texts[:40]!r}], not {texts[:40]!r}")
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

    def _framed(self, text: str, is_target: bool = False) -> list[int]:
        tokenizer = self.require_tokenizer()
        prefix, suffix = tokenizer.target_affixes if is_target else (tokenizer.prefix_ids, tokenizer.suffix_ids)
        return [*prefix, *tokenizer.encode(text), *suffix]

    def _prompt(self, text: str, or_start: bool = False) -> list[int]:
        tokenizer = self.require_tokenizer()
        prompt = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        if not prompt and not or_start:
            raise InputError("an empty text is no prompt for this model: its texts begin with no special token")
        return prompt or [self.config.decoder_start_id]

    def _check_ids(self, *tokens: Any) -> None:
        for ids in tokens:
            highest = int(np.max(ids, initial=0))
            if highest >= self.config.vocab_size:
                raise InputError(f"token id {highest}: the model has embeddings for {self.config.vocab_size}")

    def _check_generates(self) -> None:
        if not self.config.num_decoder_layers:
            raise InputError("the model has no decoder: it cannot predict what comes next")

    def _check_length(self, length: int, what: str) -> None:
        limit = self.config.max_positions
        if self.config.positions == "learned" and length > limit:
            raise InputError(f"{what} take {length} positions, but the model has {limit}")

    def _length(self, sequences: Sequence[Sequence[int]]) -> int:
        self._check_ids(*sequences)
        longest = max(len(sequence) for sequence in sequences)
        self._check_length(longest, f"the {longest} tokens of a text")
        bucket = _bucket(longest, 16)
        return min(bucket, self.config.max_positions) if self.config.positions == "learned" else bucket

    def _pairs_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Mapping[str, np.ndarray]:
        return encoder_decoder_batch(
            [(np.array(source, np.int32), np.array(target, np.int32)) for source, target in pairs],
            rows=self._rows(pairs),
            input_length=self._length([source for source, _ in pairs]),
            target_length=self._length([target for _, target in pairs]),
            pad_id=self.config.fill_id,
            decoder_start_id=self.config.decoder_start_id,
        )

    def _encoder_batch(self, sequences: Sequence[list[int]]) -> Mapping[str, np.ndarray]:
        batch = self._pairs_batch([(tokens, []) for tokens in sequences])
        return {key: value for key, value in batch.items() if key.startswith("encoder")}

    def _decoder_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Mapping[str, np.ndarray]:
        return decoder_batch(
            pairs,
            rows=self._rows(pairs),
            length=self._length([[*prompt, *target] for prompt, target in pairs]),
            pad_id=self.config.fill_id,
        )

    def _rows(self, examples: Sequence[Any]) -> int:
        return _bucket(len(examples), sharding.axis_size(self.mesh, sharding.RULES["batch"]))


def load(
    path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | str | None = None,
    *,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    config: TransformerConfig | None = None,
) -> LanguageModel:
    """Loads a model: one that t5x_lite has trained, or a published one.

    Args:
      path: a run directory; one of its checkpoints, `run/checkpoints/1000`; a Hugging Face directory, with
        safetensors or `pytorch_model.bin`; or a T5X or Mesh TensorFlow checkpoint of the T5 family.
      dtype: of computation and parameters, float32 or bfloat16.
      mesh: a mesh or its description, such as `model:8`; by default one device.
      allow_missing: patterns such as `classifier/*` of parameters that a Hugging Face file may lack; they are drawn
        afresh.
      allow_unused: patterns such as `cls.*` of a Hugging Face file's tensors that the model may leave unread.
      config: of the model, where it is not all that a published checkpoint says, or another head is wanted.

    A damaged checkpoint of a run is passed over for the one before, with a warning that names it.

    Raises:
      InputError: nothing there that can be loaded.
      CheckpointMismatch: a published model whose tensors are not exactly the model's parameters.
    """
    run = configuration.run_directory(path)
    ours = (run / "config.yaml").exists()
    if not ours and not checkpoints.is_foreign(path):
        raise InputError(f"{path} is not a run directory (it has no config.yaml), nor {checkpoints.KINDS}")
    if ours and (allow_missing or allow_unused):
        raise InputError(f"allow_missing and allow_unused are for Hugging Face directories; {path} is a run of ours")
    if config is None:
        config = configuration.resolve(run / "config.yaml").config.model if ours else checkpoints.read_config(path)
    model = build(config, dtype)
    if not isinstance(mesh, Mesh):
        mesh = sharding.make_mesh(mesh) if mesh else sharding.make_mesh("data:1", jax.devices()[:1])
    sharding.check_divides(mesh, model.config.sharded_sizes())
    shapes = model.param_shapes()
    layouts = sharding.tree_shardings(mesh, model.logical_axes(), shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s), shapes, layouts)
    if not ours:
        params = checkpoints.load_params(path, config, abstract, allow_missing=allow_missing, allow_unused=allow_unused)
        try:
            tokenizer = find_tokenizer(path)
        except InputError as error:  # the weights are of use without it
            warnings.warn(f"{path} has a tokenizer that cannot be read, so texts cannot: {error}", stacklevel=2)
            tokenizer = None
        return LanguageModel(model, params, tokenizer, mesh)
    params, checkpoint, notes = load_params(path, abstract)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return LanguageModel(model, params, find_tokenizer(run / "tokenizer"), mesh, checkpoint)


def _bucket(size: int, multiple: int) -> int:
    # Powers of two times `multiple`: at most log2 many different shapes are ever compiled.
    bucket = multiple
    while bucket < size:
        bucket *= 2
    return bucket


@jax.jit(static_argnums=0)
def _log_likelihood(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    logits: Any = model.apply({"params": params}, batch)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["decoder_target_tokens"][..., None], axis=-1)[..., 0]
    return jnp.sum(chosen * batch["decoder_loss_weights"], axis=-1)


@jax.jit(static_argnums=0)
def _hidden_states(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    hidden: Any = model.apply({"params": params}, batch, method="hidden_states")
    return hidden
