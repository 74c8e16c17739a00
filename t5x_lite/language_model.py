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
from t5x_lite.data.pipeline import encoder_decoder_batch
from t5x_lite.data.tokenizers import Tokenizer, load_tokenizer
from t5x_lite.decoding.generate import Generated, GenerationConfig, generate
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Batch, Transformer
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
        """Returns the greedy continuation of each text.

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
            part = [self._encode(text) for text in texts[start : start + batch_size]]
            batch = self._batch([(tokens, []) for tokens in part], target_length=1)
            inputs = {key: value for key, value in batch.items() if key.startswith("encoder")}
            tokens = np.asarray(self.generate_tokens(inputs, config).tokens)
            out += [tokenizer.decode(row.tolist()) for row in tokens[: len(part)]]
        return out

    def generate_tokens(self, batch: Batch, config: GenerationConfig | None = None) -> Generated:
        """Returns tokens `[B, N]`, lengths and scores for a batch of token ids; see `decoding.generate`."""
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        with jax.set_mesh(self.mesh):
            return generate(self.model, self.params, dict(batch), config or GenerationConfig(), vocab_size=vocab_size)

    def score(self, inputs: Sequence[str], targets: Sequence[str], *, batch_size: int = 32) -> Scores:
        """Returns the log-likelihood of each target given its input.

        Raises:
          InputError: the two have different lengths.
        """
        if len(inputs) != len(targets):
            raise InputError(f"{len(inputs)} inputs for {len(targets)} targets")
        likelihoods, counts = [], []
        for start in range(0, len(inputs), batch_size):
            pairs = [
                (self._encode(source), self._encode(target))
                for source, target in zip(
                    inputs[start : start + batch_size], targets[start : start + batch_size], strict=True
                )
            ]
            batch = self._batch(pairs, target_length=max(len(target) for _, target in pairs))
            with jax.set_mesh(self.mesh):
                scores = _log_likelihood(self.model, self.params, batch)
            likelihoods.append(np.asarray(scores)[: len(pairs)])
            counts += [len(target) for _, target in pairs]
        return Scores(np.concatenate(likelihoods or [np.zeros(0, np.float32)]), np.array(counts, np.int32))

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> list[np.ndarray]:
        """Returns the encoder's hidden states of each text, float32 `[L_i, D]`, EOS included."""
        out: list[np.ndarray] = []
        for start in range(0, len(texts), batch_size):
            part = [self._encode(text) for text in texts[start : start + batch_size]]
            batch = self._batch([(tokens, []) for tokens in part], target_length=1)
            with jax.set_mesh(self.mesh):
                hidden = np.asarray(_encode(self.model, self.params, batch), np.float32)
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

    def _encode(self, text: str) -> list[int]:
        return [*self.require_tokenizer().encode(text), self.config.eos_id]

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]], target_length: int) -> Mapping[str, np.ndarray]:
        examples = [(np.array(source, np.int32), np.array(target, np.int32)) for source, target in pairs]
        return encoder_decoder_batch(
            examples,
            rows=_bucket(len(pairs), sharding.axis_size(self.mesh, sharding.RULES["batch"])),
            input_length=_bucket(max(len(source) for source, _ in pairs), 16),
            target_length=_bucket(target_length, 16),
            pad_id=self.config.pad_id,
            decoder_start_id=self.config.decoder_start_id,
        )


def load(path: str | Path, dtype: str = "float32", mesh: Mesh | str | None = None) -> LanguageModel:
    """Loads a model that t5x_lite has trained.

    Args:
      path: a run directory, or one of its checkpoints, `run/checkpoints/1000`.
      dtype: of computation and parameters, float32 or bfloat16.
      mesh: a mesh or its description, such as `model:8`; by default one device.

    A damaged checkpoint is passed over for the one before, with a warning that names it.

    Raises:
      InputError: nothing there that can be loaded.
    """
    run = configuration.run_directory(path)
    if not (run / "config.yaml").exists():
        raise InputError(f"{path} is not a run directory: it has no config.yaml")
    model = build(configuration.resolve(run / "config.yaml").config.model, dtype)
    if not isinstance(mesh, Mesh):
        mesh = sharding.make_mesh(mesh) if mesh else sharding.make_mesh("data:1", jax.devices()[:1])
    sharding.check_divides(mesh, model.config.sharded_sizes())
    shapes = model.param_shapes()
    layouts = sharding.tree_shardings(mesh, model.logical_axes(), shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s), shapes, layouts)
    params, checkpoint, notes = load_params(path, abstract)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    tokenizer = load_tokenizer(run / "tokenizer") if (run / "tokenizer").exists() else None
    return LanguageModel(model, params, tokenizer, mesh, checkpoint)


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
def _encode(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    encoded: Any = model.apply({"params": params}, batch, method="encode")
    return encoded
