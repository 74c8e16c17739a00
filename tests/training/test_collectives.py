"""What devices send each other in a training step, read from the compiled program: no more than the layouts ask for."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.sharding import batch_sharding, make_mesh
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.schedules import make_schedule
from t5x_lite.training.state import abstract_state
from t5x_lite.training.step import make_train_step

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"

# Sizes of which no two are alike, so that a shape says what it is of. Matrices have the 128 rows and columns at least
# from which on Adafactor factors their moments.
ROWS, INPUTS, TARGETS = 16, 24, 8
EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 128, 8, 17, 144, 192
ENCODER, DECODER = 2, 3

Shape = tuple[int, ...]


def small(name: str, **changes: Any) -> TransformerConfig:
    return dataclasses.replace(
        preset(name),
        vocab_size=VOCAB,
        embed_dim=EMBED,
        num_heads=HEADS,
        head_dim=changes.pop("head_dim", HEAD_DIM),
        mlp_dim=MLP,
        num_encoder_layers=ENCODER if preset(name).num_encoder_layers else 0,
        num_decoder_layers=DECODER,
        pad_id=0,
        bos_id=1,
        eos_id=1,
        decoder_start_id=0,
        **changes,
    )


CONFIGS = {
    "t5": small("t5-v1.1-small", dropout_rate=0.1),
    "llama": small("llama-2-70b", num_kv_heads=2, head_dim=6),
}


# --- reading a program ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange; its shape is that of the result, of the whole array after a gather."""

    kind: str
    dtype: str
    shape: Shape
    operation: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sides(self) -> Shape:
        """The shape without axes of size 1, transposed as it may be: the compiler chooses."""
        return tuple(sorted(size for size in self.shape if size > 1))


def collectives(text: str) -> Counter[Collective]:
    """Returns how often each collective of a compiled program runs, loops and branches included.

    Loops that do not say how often they run count once: the optimizer's is of one round or none.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)

    @cache
    def of(name: str) -> Counter[Collective]:
        found: Counter[Collective] = Counter()
        for line in lines[name]:
            found.update(_read(line))
            called = re.findall(r"(?:body|condition|calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            inside = sum((of(other) for other in called), Counter())
            if not inside:
                continue
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            times = int(rounds[1]) if rounds else 1
            found.update({collective: times * count for collective, count in inside.items()})
        return found

    return of(entry)


def _read(line: str) -> Iterator[Collective]:
    found = re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)
    if found is None:
        return
    operation = re.search(r'op_name="(.*?)"', line)
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Collective(found[2], dtype, shape, operation[1] if operation else "")


def test_a_program_is_read_with_its_loops() -> None:
    program = """HloModule invented

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), replica_groups={}, to_apply=%add
  %nested = (s32[], f32[4]{0}) while(%z), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

%inner (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-gather.7 = bf16[8,1]{1,0} all-gather(%p), dimensions={0}, metadata={op_name="jit(f)/mul" stack_frame_id=3}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]{0}) while(%t), condition=%less, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %once = (s32[], f32[4]{0}) while(%t), condition=%less, body=%inner
  %choice = f32[] conditional(%i, %a, %b), branch_computations={%inner, %add}
}
"""
    program = program.replace("%inner (state", "%less (s: s32[]) -> pred[] {\n}\n\n%inner (state")
    assert collectives(program) == {
        Collective("all-reduce", "f32", (4,), ""): 3,
        Collective("all-reduce", "f32", (2, 3), ""): 3,
        Collective("all-gather", "bf16", (8, 1), "jit(f)/mul"): 17,
    }


# --- steps ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """A compiled training step.

    Attributes:
      found: its collectives.
      parameters: sides (see `Collective.sides`) of each parameter, of one layer where there are several, and how often
        there are such.
    """

    found: Counter[Collective]
    parameters: Counter[Shape]

    def arrays(self, *kinds: str, least: int = 2) -> Counter[Shape]:
        """How often arrays of at least so many numbers are exchanged, by their sides."""
        counts: Counter[Shape] = Counter()
        for collective, times in self.found.items():
            if collective.size >= least and (not kinds or collective.kind in kinds):
                counts[collective.sides] += times
        return counts

    @property
    def kinds(self) -> set[str]:
        return {collective.kind for collective in self.found}

    @property
    def matrices(self) -> Counter[Shape]:
        return Counter({shape: count for shape, count in self.parameters.items() if len(shape) > 1})


Steps = Callable[..., Step]


@pytest.fixture(scope="module")
def steps() -> Steps:
    """A function `(family, mesh, ...) -> Step`; nothing runs."""

    @cache
    def compiled(
        name: str,
        mesh_text: str,
        optimizer: str = "adamw",
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
        microbatches: int = 1,
        chunk: int = 0,
    ) -> Step:
        config = CONFIGS[name]
        model, mesh = build(config), make_mesh(mesh_text)
        schedule = make_schedule("constant", 1e-3, 0, 1)
        tx = make_optimizer(optimizer, schedule, model.logical_axes(), clip_norm=clip_norm)
        state = abstract_state(model, tx, mesh, ema=ema_decay > 0)

        def tokens(length: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            shape = ROWS, length
            return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))

        batch = {f"decoder_{what}_tokens": tokens(TARGETS) for what in ("input", "target")}
        batch["decoder_loss_weights"] = tokens(TARGETS, jnp.float32)
        if config.num_encoder_layers:
            batch["encoder_input_tokens"] = tokens(INPUTS)
        loss, parts = LossSettings(z_loss=1e-4, chunk=chunk), {"microbatches": microbatches, "ema_decay": ema_decay}
        step = make_train_step(model, tx, schedule, mesh, state, loss=loss, **parts)
        program = step.lower(state, batch).compile()
        parameters: Counter[Shape] = Counter()
        axes = jax.tree.leaves(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
        for names, leaf in zip(axes, jax.tree.leaves(state.params), strict=True):
            layers = leaf.shape[0] if "layers" in names else 1
            parameters[tuple(sorted(leaf.shape["layers" in names :]))] += layers
        return Step(collectives(program.as_text()), parameters)

    return compiled


# T5's position bias is the same for all rows and layers. Each layer gives it a gradient, summed over the rows.
BIASES = Counter({(HEADS, INPUTS, INPUTS): ENCODER, (TARGETS, HEADS, TARGETS): DECODER})


def test_data_alone_sums_gradients_once(steps: Steps) -> None:
    step = steps("t5", "data:8")
    assert step.kinds == {"all-reduce"}
    got = step.arrays() - BIASES
    # The table of the position bias is told of its gradient by the biases, once the devices agree on those.
    table = (HEADS, 32)
    wanted = Counter({shape: count for shape, count in step.parameters.items() if shape != table})
    wanted[EMBED, VOCAB] += 1  # encoder and decoder look their words up in one table
    assert got == wanted


def test_parts_of_a_batch_clipping_and_a_mean_of_the_parameters_send_gradients_alone(steps: Steps) -> None:
    parts = 2
    step = steps("t5", "data:8", "adafactor", clip_norm=1.0, ema_decay=0.99, microbatches=parts, chunk=TARGETS // parts)
    assert step.kinds == {"all-reduce"}
    # Every microbatch what the whole batch would send, and every chunk the gradient of the head, which is one more of
    # this shape; a compiler may first add what it then sums.
    most = Counter({shape: parts * count for shape, count in steps("t5", "data:8").arrays().items()})
    most[EMBED, VOCAB] += parts
    assert step.arrays() <= most


def test_fsdp_gathers_every_parameter_twice_and_sums_its_gradient_once(steps: Steps) -> None:
    step = steps("t5", "fsdp:8")
    assert step.kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = step.arrays("all-gather")
    # Of the table of the position bias every device has a copy: `embed` is no axis of it.
    split = Counter({shape: count for shape, count in step.parameters.items() if EMBED in shape and HEADS not in shape})
    assert gathered.keys() == split.keys()
    for shape, count in split.items():
        # Once for the forward pass and once for the backward pass of a layer; outside of layers once may do.
        assert gathered[shape] == 2 * count or (gathered[shape] <= 2 * count and VOCAB in shape), shape
    summed = step.arrays("all-reduce", "reduce-scatter") - BIASES
    split[EMBED, VOCAB] += 1
    assert sum(summed[shape] for shape in split) == sum(split.values())
    # A compiler may leave a device its own part of a sum only; nothing else is larger.
    assert all(shape in split or math.prod(shape) <= EMBED * VOCAB // 8 for shape in summed)


def test_tensor_parallelism_sums_activations_alone(steps: Steps) -> None:
    step = steps("t5", "model:8")
    assert step.kinds == {"all-reduce"}
    summed = step.arrays(least=ROWS * TARGETS + 1)
    encoded, decoded = tuple(sorted((ROWS, INPUTS, EMBED))), tuple(sorted((ROWS, TARGETS, EMBED)))
    # Forward: after attention and feed-forward, and after the look-up. Backward: what query, key, value, gate and up
    # make of the gradient; a compiler may add some of them before they are summed.
    assert summed.keys() <= {encoded, decoded, (INPUTS, INPUTS)}
    assert summed[encoded] <= ENCODER * (2 + 5) + DECODER * 2 + 1
    assert summed[decoded] <= DECODER * (3 + 6) + 2
    # Statistics of the softmax over the vocabulary, two a token and their gradients.
    assert step.arrays(least=ROWS * TARGETS)[TARGETS, ROWS] <= 4


@pytest.mark.parametrize(
    ("optimizer", "shape"),
    [
        # Means over the rows or columns that devices share.
        ("adafactor", (EMBED,)),
        # Products of matrices with themselves: over the side that devices share, the longer one.
        ("muon", (EMBED, EMBED)),
    ],
)
def test_tensor_parallelism_gathers_no_parameter_for_the_optimizer(optimizer: str, shape: Shape, steps: Steps) -> None:
    step = steps("t5", "model:8", optimizer)
    assert step.kinds == {"all-reduce"}
    # Beside what it takes with AdamW, which treats every number on its own. A matrix or a stack of them: that shape,
    # and a number for its norm.
    more = step.arrays() - steps("t5", "model:8").arrays()
    assert more.keys() <= {layers + sides for layers in ((), (ENCODER,), (DECODER,)) for sides in ((), shape)}
    assert more[DECODER, *shape] >= 11  # a layer's matrices: 4 + 4 of attention, 3 of the feed-forward block


def test_context_gathers_keys_and_values_and_sums_gradients(steps: Steps) -> None:
    step = steps("t5", "context:4,data:2")
    parts, rows = 4, ROWS // 2
    keys, own_keys = (tuple(sorted((rows, HEADS, length, HEAD_DIM))) for length in (INPUTS, TARGETS))
    gathered = Counter({c.sides: 0 for c in step.found})
    for collective, times in step.found.items():
        if collective.kind == "all-gather" and collective.dtype == "f32":
            gathered[collective.sides] += times
    # Keys and values, forward; the encoder's those of its own layers and of each layer of the decoder.
    wanted = Counter({keys: 2 * (ENCODER + DECODER), own_keys: 2 * DECODER})
    assert +gathered == wanted
    returned = step.arrays("reduce-scatter")
    part, own_part = (tuple(sorted((rows, HEADS, length // parts, HEAD_DIM))) for length in (INPUTS, TARGETS))
    assert returned == {part: wanted[keys], own_part: wanted[own_keys]}
    # The masks: which tokens are padding, once for all layers; and the places in the table of the position bias.
    others = [c for c in step.found if c.kind == "all-gather" and c.dtype != "f32"]
    assert {c.sides for c in others} <= {(rows, INPUTS), (rows, TARGETS)}
    assert sum(step.found[c] for c in others) <= 6
    moved = [c for c in step.found if c.kind == "collective-permute"]
    assert all("position_bias" in c.operation and c.size <= HEADS * (INPUTS + TARGETS) for c in moved)
    assert step.kinds == {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    # Gradients are summed over `context` and over `data`, in one step or two.
    summed = step.arrays("all-reduce")
    for shape, count in (step.parameters + Counter({(EMBED, VOCAB): 1})).items():
        assert shape == (HEADS, 32) or count <= summed[shape] <= 2 * count, shape
    biases = {(HEADS, length, length // parts) for length in (INPUTS, TARGETS)}
    whole_tables = {(HEADS, 2 * length) for length in (INPUTS, TARGETS)}
    allowed = step.parameters.keys() | {tuple(sorted(shape)) for shape in biases | whole_tables}
    assert summed.keys() <= allowed


def test_fsdp_and_model_together_gather_no_more_than_a_device_s_heads(steps: Steps) -> None:
    step = steps("llama", "fsdp:4,model:2")
    assert step.kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = step.arrays("all-gather")
    # The full parameter, of which `model` leaves a device one half of the other side.
    halves = {tuple(sorted((EMBED, next(s for s in shape if s != EMBED) // 2))): shape for shape in step.matrices}
    assert gathered.keys() == halves.keys() | {(EMBED,)}
    assert not gathered.keys() & step.matrices.keys()
    for half, shape in halves.items():
        assert 0 < gathered[half] <= 2 * step.parameters[shape], half
