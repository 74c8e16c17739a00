"""The data of a step follows from (configuration, seed, step), with everything on at once, from files to batches."""

import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite.config import resolve
from t5x_lite.data import recipe, streaming
from t5x_lite.data.packing import Batch
from t5x_lite.data.pipeline import Dataset, prefetch
from t5x_lite.data.streaming import StreamingDataset
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError

BYTES = ByteTokenizer()
STEPS, ROWS, LENGTH, BUCKETS = 40, 8, 48, [16, 32]
KINDS = ("spans", "prefixes", "sums")  # by the first letter of what they are made of: small, capital, a digit


def write(directory: Path) -> None:
    """Writes random text in small letters and in capitals, and sums."""
    rng = np.random.default_rng(3)

    def lines(first: str, count: int) -> list[str]:
        letters = [chr(ord(first) + n) for n in range(26)]
        return ["".join(rng.choice(letters, rng.integers(2, 150))) for _ in range(count)]

    def number(digits: int) -> int:
        return int("1" + "".join(map(str, rng.integers(0, 10, digits - 1))))

    sums = [(number(21), number(21)), *(tuple(map(number, rng.integers(1, 18, 2))) for _ in range(39))]
    (directory / "spans.txt").write_text("\n".join(lines("a", 30)))
    (directory / "prefixes.txt").write_text("\n".join(lines("A", 20)))
    (directory / "sums.jsonl").write_text(
        "\n".join(json.dumps({"inputs": f"{a}+{b}=", "targets": str(a + b)}) for a, b in sums)
    )
    (directory / "eval.txt").write_text("none of this is trained on\n")
    (directory / "eval.jsonl").write_text('{"inputs": "0+0=", "targets": "0"}\n')


def datasets_of(directory: Path, *settings: str) -> Dataset | StreamingDataset:
    always = (f"train.input_length={LENGTH}", f"train.batch_size={ROWS}", "train.seed=5")
    config = resolve(None, [*always, f"data.cache_dir={directory / 'caches'}", *settings]).config
    return recipe.datasets(recipe.open_data(config.data), config, BYTES).train


def mixed(directory: Path, *settings: str) -> Any:
    tasks = (
        f"{{path: {directory}/spans.txt, eval_path: {directory}/eval.txt, rate: 3}}",
        f"{{path: {directory}/prefixes.txt, eval_path: {directory}/eval.txt, objective: prefix_lm, rate: 2}}",
        f"{{path: {directory}/sums.jsonl, eval_path: {directory}/eval.jsonl, objective: text_to_text, rate: 2}}",
    )
    return datasets_of(directory, f"data.tasks=[{', '.join(tasks)}]", *settings)


def bucketed(directory: Path, *settings: str) -> Any:
    paths = f"data.path={directory}/sums.jsonl", f"data.eval_path={directory}/eval.jsonl"
    return datasets_of(directory, *paths, "data.objective=text_to_text", f"data.buckets={BUCKETS}", *settings)


@dataclasses.dataclass(frozen=True)
class Together:
    """Gives the batches of several datasets, so that worker processes have to be started once for all of them."""

    datasets: dict[str, Any]

    @staticmethod
    def made(directory: Path, *settings: str) -> "Together":
        return Together(
            {
                "mixed": mixed(directory, *settings),
                "packed": mixed(directory, "data.packing=true", *settings),
                "bucketed": bucketed(directory, *settings),
            }
        )

    def __call__(self, step: int) -> dict[str, Batch]:
        return {name: dataset.batch(step) for name, dataset in self.datasets.items()}


def digest(batch: Batch) -> str:
    told = hashlib.sha256()
    for name, array in sorted(batch.items()):
        told.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return told.hexdigest()


def joined(shares: list[Batch]) -> Batch:
    assert all(share.keys() == shares[0].keys() for share in shares)
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write(made)
    return made


@pytest.fixture(scope="module")
def read(directory: Path) -> Iterator[Any]:
    """A function `workers -> {dataset: batches of all steps}`."""

    @functools.cache
    def batches(workers: int) -> dict[str, list[Batch]]:
        steps = list(prefetch(Together.made(directory), 0, STEPS, workers=workers))
        assert [step for step, _ in steps] == list(range(STEPS))
        return {name: [batches[name] for _, batches in steps] for name in steps[0][1]}

    # The processes import what reads several datasets at a time from here.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        yield batches


# --- the same batches, whoever reads them ---------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("name", ["mixed", "packed", "bucketed"])
def test_hosts_share_one_global_batch(name: str, hosts: int, directory: Path, read: Any) -> None:
    own = [Together.made(directory).datasets[name].loader(0, host, hosts) for host in range(hosts)]
    for step, wanted in enumerate(read(0)[name]):
        shares = [load(step) for load in own]
        assert {len(array) for share in shares for array in share.values()} == {ROWS // hosts}
        assert digest(joined(shares)) == digest(wanted), step


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_batches(workers: int, read: Any) -> None:
    for name, batches in read(workers).items():
        assert list(map(digest, batches)) == list(map(digest, read(0)[name]))


def test_another_process_makes_the_same_batches(directory: Path, tmp_path: Path, read: Any) -> None:
    # Even from caches of its own, and where Python hashes strings differently.
    program = f"""
from pathlib import Path
from test_exact_order import STEPS, Together, digest
load = Together.made(Path({str(directory)!r}), f"data.cache_dir={tmp_path}")
for step in range(STEPS):
    print(*map(digest, load(step).values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        " ".join(map(digest, batches)) for batches in zip(*read(0).values(), strict=True)
    ]


def test_worker_processes_leave_no_shared_memory_behind(directory: Path) -> None:
    def shared() -> int:
        return sum(type(thing).__name__ == "SharedMemoryArray" for thing in gc.get_objects())

    before = shared()
    batches = [batch for _, batch in prefetch(mixed(directory).loader(0), 0, 12, workers=1)]
    assert shared() == before
    assert {type(array) for batch in batches for array in batch.values()} == {np.ndarray}


@pytest.mark.parametrize("start", [1, 17])
def test_a_resumed_run_goes_on_where_it_was(start: int, directory: Path, read: Any) -> None:
    for name, dataset in Together.made(directory).datasets.items():
        again = prefetch(dataset.loader(start), start, STEPS)
        assert [digest(batch) for _, batch in again] == list(map(digest, read(0)[name][start:]))


def test_batches_are_not_alike(directory: Path, read: Any) -> None:
    for name in ("mixed", "packed"):
        assert len(set(map(digest, read(0)[name]))) == STEPS
    other = mixed(directory, "data.packing=true", "train.seed=6")
    assert not {digest(other.batch(step)) for step in range(STEPS)} & set(map(digest, read(0)["packed"]))


def test_what_workers_are_sent_is_an_index_of_the_data(directory: Path) -> None:
    for dataset in Together.made(directory).datasets.values():
        examples = dataset.num_examples
        for step in range(3):
            dataset.batch(step)  # which fills what is computed once
        sent = pickle.dumps(dataset.loader(0))
        # Some numbers of eight bytes for an example; the rest is mostly what there is to say of each of the 259 ids.
        assert len(sent) < 4000 + 5 * 8 * examples
        for component in dataset.components:
            source = getattr(component.examples, "source", None) or component.examples.stream.source
            for tokens in source.features.values():
                longest = tokens[int(np.argmax(tokens.lengths))]
                assert len(longest) > 10
                assert longest.tobytes() not in sent
        assert digest(pickle.loads(sent)(4)) == digest(dataset.batch(4))


# --- every example once an epoch ------------------------------------------------------------------------------------


def texts(batch: Batch) -> Iterator[list[str]]:
    """Yields the texts that the examples of each row are made of: a masked span is put back, targets follow inputs."""
    sentinels = set(BYTES.sentinels)
    sides = [
        (batch[f"{side}_{tokens}_tokens"], batch[f"{side}_segment_ids"])
        for side, tokens in (("encoder", "input"), ("decoder", "target"))
    ]
    for (inputs, marks), (targets, target_marks) in zip(*(zip(*side, strict=True) for side in sides), strict=True):
        row = []
        assert marks.max() == target_marks.max()
        for number in range(1, marks.max() + 1):
            said: dict[int, list[int]] = {-1: []}
            at = -1
            for token in targets[target_marks == number].tolist():
                if token in sentinels:
                    said[at := token] = []
                elif token != BYTES.eos_id:
                    said[at].append(token)
            text = [said.pop(token, [token]) for token in inputs[marks == number].tolist() if token != BYTES.eos_id]
            row.append(BYTES.decode([*itertools.chain(*text), *said.pop(-1)]))
            assert not said
        yield row


def kind(text: str) -> str:
    return KINDS[0] if text[0].islower() else KINDS[1] if text[0].isupper() else KINDS[2]


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def sums_of(directory: Path) -> list[str]:
    records = map(json.loads, (directory / "sums.jsonl").read_text().splitlines())
    return [record["inputs"] + record["targets"] for record in records]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("name", ["mixed", "packed"])
def test_a_mixture_has_every_example_of_each_component_once_an_epoch(
    name: str, workers: int, directory: Path, read: Any
) -> None:
    rows: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    for row in itertools.chain.from_iterable(map(texts, read(workers)[name])):
        (component,) = {kind(text) for text in row}
        rows[component].append(row)
    sizes = {component: max(len(text) for row in rows[component] for text in row) for component in KINDS[:2]}
    lines = {component: (directory / f"{component}.txt").read_text().split("\n") for component in KINDS[:2]}
    wanted = {
        component: [p for line in lines[component] for p in pieces(line, sizes[component])] for component in lines
    }
    if name == "mixed":  # T5 lays documents end to end, unless they have to be kept apart
        wanted["spans"] = pieces("".join(lines["spans"]), sizes["spans"])
    wanted["sums"] = sums_of(directory)
    for component in KINDS:
        epochs = list(epochs_of(rows[component], len(wanted[component])))
        assert len(epochs) > 1
        for epoch in epochs[:-1]:
            assert Counter(itertools.chain(*epoch)) == Counter(wanted[component])
        assert not Counter(itertools.chain(*epochs[-1])) - Counter(wanted[component])
        assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == len(epochs)  # each in an order of its own
        assert (max(map(len, rows[component])) > 1) == (name == "packed")


def epochs_of(rows: list[list[str]], examples: int) -> Iterator[list[list[str]]]:
    """Yields the rows of each epoch; the last one may not be complete."""
    epoch: list[list[str]] = []
    for row in rows:
        epoch.append(row)
        if sum(map(len, epoch)) >= examples:
            yield epoch
            epoch = []
    yield epoch


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_buckets_have_every_example_once_an_epoch(workers: int, directory: Path, read: Any) -> None:
    wanted = sums_of(directory)
    target_length = bucketed(directory).target_length
    longest = {width: (width, -(-width * target_length // LENGTH)) for width in (*BUCKETS, LENGTH)}

    def width_of(text: str) -> int:
        inputs, _, targets = text.partition("=")
        sizes = len(inputs) + 2, len(targets) + 1  # the sign, and an EOS each
        return next(
            width for width in longest if all(size <= most for size, most in zip(sizes, longest[width], strict=True))
        )

    members = Counter(map(width_of, wanted))
    assert len(members) > 1
    count = sum(-(-members[width] // ROWS) for width in members)  # steps of an epoch
    batches = read(workers)["bucketed"]
    assert 3 * count <= STEPS
    for start in range(0, STEPS - count + 1, count):
        epoch = batches[start : start + count]
        assert Counter(text for batch in epoch for row in texts(batch) for text in row) == Counter(wanted)
        # In rows no longer than they need to be.
        shapes = [(batch["encoder_input_tokens"].shape[1], batch["decoder_input_tokens"].shape[1]) for batch in epoch]
        assert Counter(shapes) == {longest[width]: -(-number // ROWS) for width, number in members.items()}


def test_a_bucket_is_as_long_as_it_says(directory: Path) -> None:
    def widths(*settings: str, side: str = "encoder") -> set[int]:
        dataset = bucketed(directory, *settings)
        return {dataset.batch(step)[f"{side}_input_tokens"].shape[1] for step in range(16)}

    # 25 * (14 / 25) is more than 14 in floating point.
    assert widths("train.input_length=25", "data.buckets=[14]") == {14, 25}
    # Rows are no longer than the data needs, but what was asked of the buckets stays.
    assert widths("train.input_length=100") == {16, 32, 48}
    assert widths("train.input_length=100", "data.buckets=[16, 48, 64]") == {16, 48}
    assert widths("model=decoder-small", "train.input_length=50", side="decoder") == {16, 32, 50}


def test_components_are_drawn_apart(directory: Path) -> None:
    # The same file twice: of two tasks of one size neither order nor masks may be alike.
    def epoch(one: str, other: str) -> list[str]:
        dataset: Any = datasets_of(directory, f"data.tasks=[{{{one}}}, {{{other}}}]")
        rows = [
            row for step in range(-(-dataset.num_rows // ROWS)) for row in dataset.batch(step)["encoder_input_tokens"]
        ]
        return [BYTES.decode(row) for row in rows[: dataset.num_rows]]

    sums = f"path: {directory}/sums.jsonl, eval_path: {directory}/eval.jsonl, rate: 1, objective: text_to_text"
    texts = epoch(f"{sums}, name: one", f"{sums}, name: other, prefix: ' '")
    first, second = ([text.strip() for text in texts if text.startswith(" ") == spaced] for spaced in (False, True))
    assert sorted(first) == sorted(second)
    assert first != second
    spans = f"path: {directory}/spans.txt, eval_path: {directory}/eval.txt, rate: 1"
    texts = epoch(f"{spans}, name: one", f"{spans}, name: other")
    assert len(set(texts)) >= len(texts) - 1  # the last window may be so short that there is little to draw


def test_an_example_is_drawn_alike_in_a_row_of_its_own_and_in_one_that_it_shares(directory: Path) -> None:
    def examples(dataset: Any) -> Counter[Any]:
        sides = [("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")]
        return Counter(
            tuple(tuple(batch[name][row][batch[f"{side}_segment_ids"][row] == number]) for side, name in sides)
            for batch in dataset.component(1).eval_batches()
            for row, marks in enumerate(batch["encoder_segment_ids"])
            for number in range(1, marks.max() + 1)
        )

    assert examples(mixed(directory, "data.packing=true")) == examples(mixed(directory))


# --- data that is not kept ------------------------------------------------------------------------------------------

SHARDS = 5


def write_shards(directory: Path, total: int) -> dict[str, str]:
    """Writes documents of `total` letters in all to several files; returns the text of each, a `|` for its ends."""
    rng = np.random.default_rng(9)
    ends = np.sort(rng.choice(np.arange(1, total), 3 * SHARDS, replace=False))
    documents = [
        "".join(rng.choice([chr(97 + n) for n in range(26)], size)) for size in np.diff([0, *ends, total]).tolist()
    ]
    shards = {f"shard-{n}.txt": documents[n::SHARDS] for n in range(SHARDS)}
    for name, lines in shards.items():
        (directory / name).write_text("\n".join(lines))
    return {name: "".join(f"{line}|" for line in lines) for name, lines in shards.items()}


def streamed(directory: Path, *settings: str) -> Any:
    return datasets_of(directory, "data.streaming=true", *settings)


def causal(directory: Path, *settings: str) -> Any:
    paths = f"data.path={directory}/shard-*.txt", f"data.eval_path={directory}/eval.txt"
    return streamed(
        directory, *paths, "model=decoder-small", "data.objective=causal_lm", "train.input_length=16", *settings
    )


def mixed_streams(directory: Path, *settings: str) -> Any:
    tasks = (
        f"{{path: {directory}/spans.txt, eval_path: {directory}/eval.txt, rate: 2}}",
        f"{{path: {directory}/sums.jsonl, eval_path: {directory}/eval.jsonl, objective: text_to_text, rate: 1}}",
    )
    return streamed(directory, f"data.tasks=[{', '.join(tasks)}]", *settings)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_streams_are_shared_by_hosts_and_resumed(hosts: int, directory: Path) -> None:
    load = mixed_streams(directory).loader(0)
    wanted = [digest(load(step)) for step in range(STEPS)]
    assert len(set(wanted)) == STEPS
    for start in (0, 17):
        own = [mixed_streams(directory).loader(start, host, hosts) for host in range(hosts)]
        steps = [[share(step) for share in own] for step in range(start, STEPS)]
        assert [digest(joined(shares)) for shares in steps] == wanted[start:]
    assert digest(mixed_streams(directory, "train.seed=6").loader(0)(0)) != wanted[0]


def test_streams_have_every_example_once_an_epoch(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 7)
    load = mixed_streams(directory).loader(0)
    rows: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    for step in range(STEPS):
        for row in texts(load(step)):
            rows[kind(row[0])].append(row)
    assert len(rows["spans"]) / len(rows["sums"]) == pytest.approx(2, rel=0.02)
    text = (directory / "spans.txt").read_text().replace("\n", "")
    size = max(len(text) for (text,) in rows["spans"])
    for component, wanted in (("spans", pieces(text, size)), ("sums", sums_of(directory))):
        epochs = list(epochs_of(rows[component], len(wanted)))
        assert len(epochs) > 1
        assert all(Counter(itertools.chain(*epoch)) == Counter(wanted) for epoch in epochs[:-1])
        assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("more", range(3))
def test_streams_have_every_token_once_an_epoch(more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path, 50 * 16 - 3 * SHARDS - 1 + more)  # with the ends of texts 50 windows, and `more`
    (tmp_path / "eval.txt").write_text("none of this is trained on\n")
    steps = 3 * 51 // ROWS + 1

    def windows(shuffled: int) -> list[list[str]]:
        monkeypatch.setattr(streaming, "WINDOW", shuffled)
        load = causal(tmp_path).loader(0)
        rows = [
            "".join("|" if token == BYTES.eos_id else BYTES.decode([token]) for token in row[weights > 0].tolist())
            for batch in map(load, range(steps))
            for row, weights in zip(batch["decoder_target_tokens"], batch["decoder_loss_weights"], strict=True)
        ]
        count = 50 + (more > 0)
        return [rows[epoch * count : (epoch + 1) * count] for epoch in range(3)]

    # Read in order it is the text of one file after the other; in which order the files come is drawn for each epoch.
    epochs = windows(shuffled=1)
    orders = {"".join(epoch) for epoch in epochs}
    assert orders <= {"".join(order) for order in itertools.permutations(shards.values())}
    assert len(orders) > 1
    for epoch, read in zip(windows(shuffled=4096), epochs, strict=True):
        assert Counter(epoch) == Counter(read)
        assert epoch != read
    # What is shuffled together is read together.
    for epoch, read in zip(windows(shuffled=10), epochs, strict=True):
        for start in range(0, len(read), 10):
            assert sorted(epoch[start : start + 10]) == sorted(read[start : start + 10])


def test_no_two_examples_of_a_stream_share_their_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 4)
    (tmp_path / "same.txt").write_text(LENGTH * 60 * "x")
    load = streamed(tmp_path, f"data.path={tmp_path}/same.txt", f"data.eval_path={tmp_path}/same.txt").loader(0)
    # The windows of an epoch are alike, and what is masked in them is not; more than an epoch would also do.
    rows = [row.tobytes() for step in range(6) for row in load(step)["encoder_input_tokens"]]
    assert len(set(rows)) > 0.9 * len(rows)


def test_a_stream_behind_prefetch_is_the_stream(directory: Path) -> None:
    load = mixed_streams(directory).loader(3)
    wanted = [digest(load(step)) for step in range(3, 20)]
    steps = list(prefetch(mixed_streams(directory).loader(3), 3, 20))
    assert [(step, digest(batch)) for step, batch in steps] == list(enumerate(wanted, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.workers=1"], "data.streaming and data.workers exclude each other"),
        (["data.packing=true"], "data.packing and data.streaming exclude each other"),
        (["model=bert-base-uncased", "data.objective=next_sentence"], "next-sentence prediction needs other documents"),
    ],
)
def test_what_a_stream_cannot_do(settings: list[str], message: str, directory: Path) -> None:
    with pytest.raises(InputError, match=message):
        streamed(directory, f"data.path={directory}/spans.txt", f"data.eval_path={directory}/spans.txt", *settings)


def test_errors_of_streams_come_at_their_step(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size 8: must be a multiple of the 3 processes"):
        mixed_streams(directory).loader(0, 0, 3)
    (tmp_path / "bad.jsonl").write_text(('{"text": "' + 4 * LENGTH * "fine " + '"}\n') * 20 + "{broken\n")
    (tmp_path / "short.txt").write_text("x")
    eval_path = f"data.eval_path={directory}/eval.txt"
    with pytest.raises(InputError, match="there are no examples in short: too little data for rows of this length"):
        streamed(tmp_path, f"data.path={tmp_path}/short.txt", eval_path).loader(0)(0)
    steps = prefetch(streamed(tmp_path, f"data.path={tmp_path}/bad.jsonl", eval_path).loader(0), 0, 100)
    with pytest.raises(InputError, match=r"bad\.jsonl:21"):
        list(steps)
