"""A run as a whole: it learns, it resumes exactly, and it refuses what it cannot do."""

import dataclasses
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite.config import resolve
from t5x_lite.errors import InputError
from t5x_lite.run_directory import complete_steps
from t5x_lite.training import loop
from t5x_lite.training.loop import Observer, train
from t5x_lite.training.monitor import MetricsLog, read_metrics
from t5x_lite.training.scalars import Scalars


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def losses(out: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(out) if "split" not in record}


def test_leaves_a_run_directory_that_describes_itself(trained_run: Path, tiny_settings: list[str]) -> None:
    assert complete_steps(trained_run / "checkpoints")[-1] == 12
    assert (trained_run / "tokenizer" / "spiece.model").exists()
    assert list((trained_run / "tensorboard").glob("events.*"))
    config = resolve(trained_run / "config.yaml").config
    assert config.model.vocab_size == 384  # as the tokenizer's, which is a multiple of 128
    assert config.train.steps == 12
    records = read_metrics(trained_run)
    steps = [record for record in records if "split" not in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert {"loss", "z_loss", "accuracy", "gradient_norm", "learning_rate", "tokens_per_second"} <= steps[0].keys()
    evaluations = [record for record in records if record.get("split") == "validation"]
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    assert {"loss", "perplexity", "bits_per_byte", "accuracy"} <= evaluations[0].keys()
    # A dozen steps already teach where sentinels stand: well below the loss of a fresh model, about ln 384 + 0.5.
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0


def test_announces_mesh_and_bytes_per_device(tiny_settings: list[str], trained_run: Path, tmp_path: Path) -> None:
    notes = Notes()
    out = shutil.copytree(trained_run, tmp_path / "run")
    train(resolve(None, [*tiny_settings, f"out={out}", "mesh=data:2,model:4", "train.steps=13"]).config, notes)
    text = "\n".join(notes.notes)
    assert "mesh data:2,model:4: 8 device(s)" in text
    assert "each device holds" in text
    assert "of optimizer state" in text
    assert "continuing" in text


def test_a_longer_run_continues_as_if_it_had_never_stopped(tiny_settings: list[str], tmp_path: Path) -> None:
    def run(name: str, *settings: str) -> loop.TrainResult:
        return train(resolve(None, [*tiny_settings, f"out={tmp_path / name}", *settings]).config)

    whole = run("whole", "train.steps=10", "train.eval_every=0")
    run("parts", "train.steps=6", "train.eval_every=0")
    parts = run("parts", "train.steps=10", "train.eval_every=0")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def start(settings: list[str], out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "t5x_lite", "train", *settings, f"out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Kills with SIGKILL as soon as metrics.jsonl has this step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            break
        time.sleep(0.005)
    process.kill()
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output


KILLED_STEPS = 24


@pytest.mark.slow
def test_killed_runs_resume_to_a_bitwise_equal_loss_trace(
    tiny_settings: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    # With all that decides which examples are in a batch: two tasks, and several examples in a row.
    lines = corpus_file.read_text().splitlines()
    rows = [{"src": line, "tgt": line.split()[-1]} for line in lines[:200]]
    (tmp_path / "last.jsonl").write_text("\n".join(map(json.dumps, rows)))
    last = f"{{path: {tmp_path}/last.jsonl, objective: text_to_text, inputs: src, targets: tgt, rate: 1}}"
    settings = [setting for setting in tiny_settings if not setting.startswith("data.path=")]
    settings += [f"data.tasks=[{{path: {corpus_file}, rate: 3}}, {last}]", "data.packing=true"]
    settings += [f"train.steps={KILLED_STEPS}", "train.checkpoint_every=3", "train.eval_every=0"]
    train(resolve(None, [*settings, f"out={tmp_path / 'whole'}"]).config)

    out = tmp_path / "killed"
    for step in sorted(random.Random(5).sample(range(2, KILLED_STEPS), 5)):
        kill_after_step(start(settings, out), out, step)
    process = start(settings, out)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(losses(out)) == list(range(1, KILLED_STEPS + 1))


def test_resumes_from_the_last_good_checkpoint_and_says_so(
    tiny_settings: list[str], trained_run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained_run, tmp_path / "run")
    victim = max((out / "checkpoints" / "12" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    notes = Notes()
    train(resolve(None, [*tiny_settings, f"out={out}"]).config, notes)
    text = "\n".join(notes.notes)
    assert "12 is damaged" in text
    assert "from step 8" in text
    assert losses(out) == losses(trained_run)


def test_another_configuration_does_not_touch_a_run(tiny_settings: list[str], trained_run: Path) -> None:
    before = (trained_run / "config.yaml").read_text()
    for change, named in (
        ("model.mlp_dim=32", "model.mlp_dim=64, not 32"),
        ("train.seed=1", "train.seed=0, not 1"),
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate=None, not 0.5"),
        ("data.noise_density=0.3", "data.noise_density=None, not 0.3"),
        ("tokenizer=bytes", "tokenizer=unigram:384, not bytes"),
    ):
        with pytest.raises(InputError, match=named):
            train(resolve(None, [*tiny_settings, f"out={trained_run}", change]).config)
    assert (trained_run / "config.yaml").read_text() == before


def test_data_may_move_but_not_change(
    tiny_settings: list[str], trained_run: Path, corpus_file: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained_run, tmp_path / "run")
    moved = shutil.copy(corpus_file, tmp_path / "moved.txt")
    settings = [*tiny_settings, f"out={out}", f"data.path={moved}"]
    train(resolve(None, settings).config)
    with Path(moved).open("a") as file:
        file.write("one more sentence\n")
    with pytest.raises(InputError, match="cannot be continued exactly"):
        train(resolve(None, settings).config)


def test_fine_tunes_from_a_run(trained_run: Path, tmp_path: Path) -> None:
    rows = [{"src": f"the cat reads {n}", "tgt": "yes" if n % 2 else "no"} for n in range(64)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        f"init_from={trained_run}",
        f"data.path={tmp_path / 'task.jsonl'}",
        "data.objective=text_to_text",
        "data.inputs=src",
        "data.targets=tgt",
        "data.eval_fraction=0.2",
        "train.steps=2",
        "train.batch_size=8",
        "train.input_length=32",
        "train.target_length=8",
        "optimizer.schedule=constant",
        "optimizer.learning_rate=0",
        f"out={tmp_path / 'tuned'}",
    ]
    result = train(resolve(None, settings).config)
    from t5x_lite import load

    # At learning rate 0 the parameters are those of the run it started from.
    origin = load(trained_run)
    for a, b in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(origin.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert result.config.model.vocab_size == origin.config.vocab_size
    assert result.config.model.embed_dim == 32  # the checkpoint's, not t5-small's


def test_a_tokenizer_of_another_size_is_refused(trained_run: Path, corpus_file: Path, tmp_path: Path) -> None:
    settings = [f"init_from={trained_run}", "tokenizer=bytes", f"data.path={corpus_file}", f"out={tmp_path / 'x'}"]
    for _ in range(3):  # a refusal leaves nothing behind that would change the next answer
        with pytest.raises(InputError, match=r"'bytes' \(259 tokens\) is not the one in .* \(384 tokens\)"):
            train(resolve(None, [*settings, "train.batch_size=8"]).config)
        assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]


def test_a_model_other_than_the_checkpoint_s_is_refused(trained_run: Path, corpus_file: Path, tmp_path: Path) -> None:
    settings = [f"init_from={trained_run}", f"data.path={corpus_file}", f"out={tmp_path / 'x'}", "train.batch_size=8"]
    with pytest.raises(InputError, match=r"does not fit the model: .* is \(2, 64, 32\) there and \(2, 128, 32\) here"):
        train(resolve(None, [*settings, "model.mlp_dim=128"]).config)


def test_a_model_too_small_for_the_tokenizer_is_refused(tiny_settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the tokenizer has 384 tokens, but the model has embeddings for 128"):
        train(resolve(None, [*tiny_settings, "model.vocab_size=128", f"out={tmp_path}"]).config)


def test_a_batch_that_does_not_divide_is_refused_before_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"axis 'batch' of size 6 .* 'data x fsdp' of size 8.*train.batch_size 12"):
        train(resolve(None, ["train.batch_size=12", "train.microbatches=2", f"out={tmp_path}"]).config)


def test_heads_that_do_not_divide_are_refused(tiny_settings: list[str], tmp_path: Path) -> None:
    settings = [*tiny_settings, "model.num_heads=6", "mesh=data:2,model:4", f"out={tmp_path}"]
    with pytest.raises(InputError, match="axis 'heads' of size 6 does not divide over mesh axis 'model' of size 4"):
        train(resolve(None, settings).config)


def test_stops_at_a_loss_that_is_not_finite(tiny_settings: list[str], tmp_path: Path, monkeypatch) -> None:
    make_train_step = loop.make_train_step

    def poisoned(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def call(state, batch):
            state, metrics = step(state, batch)
            if int(state.step) == 6:
                metrics = Scalars.of({**metrics, "loss": metrics["loss"] * float("nan"), "finite": 0.0})
            return state, metrics

        return call

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 6: the loss is nan; .* last checkpoint is of step 4"):
        train(resolve(None, [*tiny_settings, f"out={tmp_path}"]).config)
    assert complete_steps(tmp_path / "checkpoints") == [4]


def test_metrics_log_drops_what_will_be_run_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    log = MetricsLog(tmp_path, 3)
    log.write({"step": 4, "loss": 4.5})
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_library_users_construct_the_configuration(corpus_file: Path, tmp_path: Path, tiny_settings: list[str]) -> None:
    config = resolve(None, tiny_settings).config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1), out=str(tmp_path))
    assert int(train(config).state.step) == 1


def test_a_start_that_was_refused_can_be_corrected(tiny_settings: list[str], tmp_path: Path) -> None:
    settings = [*tiny_settings, f"out={tmp_path}", "train.steps=1", "train.eval_every=0"]
    refused = [
        (["data.mean_span_length=1", "extra_ids=2"], "3 spans .* 2 sentinels|5 spans .* 2 sentinels"),
        (["train.target_length=2"], "target_length 2"),
        (["optimizer.schedule=linear"], "optimizer.warmup_steps 100 must be less than train.steps 1"),
        (["model.vocab_size=128"], "384 tokens, but the model has embeddings for 128"),
    ]
    for change, message in refused:
        with pytest.raises(InputError, match=message):
            train(resolve(None, [*settings, *change]).config)
    result = train(resolve(None, [*settings, "tokenizer=bpe:300"]).config)
    assert result.tokenizer.vocab_size == 300  # not the one of the refused starts


def test_killed_at_any_write_of_the_run_directory(
    tiny_settings: list[str], trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything is put in its place by a rename. The process may die just before any of them: raise there.
    config = resolve(None, [*tiny_settings, f"out={tmp_path / 'run'}"]).config
    rename = Path.rename

    class Killed(BaseException):
        pass

    for fatal in ("tokenizer", "data.sha256", "config.yaml", "checksums.json", "4", "metrics.jsonl"):

        def dies(path: Path, target: Path, fatal: str = fatal) -> Path:
            if Path(target).name == fatal:
                raise Killed
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            train(config)
        monkeypatch.setattr(Path, "rename", rename)
    assert 12 not in complete_steps(tmp_path / "run" / "checkpoints")
    train(config)
    assert losses(tmp_path / "run") == losses(trained_run)


def test_one_process_at_a_time(tiny_settings: list[str], trained_run: Path) -> None:
    from t5x_lite import run_directory

    with (
        run_directory.lock(trained_run),
        pytest.raises(InputError, match="another process is training in"),
    ):
        train(resolve(None, [*tiny_settings, f"out={trained_run}"]).config)


def test_fewer_steps_than_were_made_is_an_error(tiny_settings: list[str], trained_run: Path) -> None:
    with pytest.raises(InputError, match=r"has made 12 steps already; train.steps=5 is less"):
        train(resolve(None, [*tiny_settings, f"out={trained_run}", "train.steps=5"]).config)


def test_a_schedule_that_ends_elsewhere_is_mentioned(tiny_settings: list[str], tmp_path: Path) -> None:
    linear = [*tiny_settings, f"out={tmp_path}", "optimizer.schedule=linear", "optimizer.warmup_steps=1"]
    linear += ["train.eval_every=0"]
    train(resolve(None, [*linear, "train.steps=3"]).config)
    notes = Notes()
    train(resolve(None, [*linear, "train.steps=4"]).config, notes)
    assert any("train.steps was 3 and is 4: the linear schedule now ends there" in note for note in notes.notes)


def test_pad_eos_and_start_are_the_tokenizer_s(tiny_settings: list[str], tmp_path: Path, corpus_file: Path) -> None:
    import sentencepiece

    from t5x_lite import load

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus_file),
        model_prefix=str(tmp_path / "other"),
        vocab_size=200,
        pad_id=3,
        eos_id=2,
        unk_id=0,
        bos_id=1,
        minloglevel=2,
    )
    settings = [*tiny_settings, f"tokenizer={tmp_path / 'other.model'}", "train.steps=1", "train.eval_every=0"]
    result = train(resolve(None, [*settings, f"out={tmp_path / 'run'}"]).config)
    model = result.config.model
    assert (model.pad_id, model.eos_id, model.decoder_start_id) == (3, 2, 3)
    lm = load(tmp_path / "run")
    # Scoring by the model equals the training loss of the same pair only if both start and end alike.
    from t5x_lite.data.pipeline import text_to_text_dataset
    from t5x_lite.training.step import batch_loss

    pair = ("daba <extra_id_0> gu", "<extra_id_0> lefi")
    batch = text_to_text_dataset([pair], result.tokenizer, 32, 16, 1, 0, model.decoder_start_id).batch(0)
    sums = jax.jit(lambda params, batch: batch_loss(lm.model, params, batch))(lm.params, batch)
    assert lm.score([pair[0]], [pair[1]]).log_likelihood[0] == pytest.approx(-float(sums.cross_entropy), rel=1e-5)
    with pytest.raises(InputError, match=r"model.pad_id is 7, but the tokenizer's is 3"):
        train(resolve(None, [*settings, "model.pad_id=7", f"out={tmp_path / 'x'}"]).config)


# --- a decoder alone ------------------------------------------------------------------------------------------------

DECODER = (
    "model=decoder-small",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.num_heads=4",
    "model.head_dim=8",
    "model.num_decoder_layers=2",
    "model.num_encoder_layers=0",
    "data.objective=causal_lm",
    "train.steps=60",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "optimizer.schedule=constant",
    "optimizer.name=adamw",
    "optimizer.learning_rate=0.01",
)


def test_a_decoder_of_one_s_own_trains_on_a_text_file(tiny_settings: list[str], tmp_path: Path) -> None:
    result = train(resolve(None, [*tiny_settings, *DECODER, f"out={tmp_path}"]).config)
    assert result.metrics["loss"] < math.log(384) - 1  # where it began: nothing known of 384 pieces
    lm = t5x_lite.load(tmp_path)
    assert len(lm.generate(["ba", "do re"], max_new_tokens=4)) == 2
    (score,) = lm.score(["ba"], [" do re"]).log_likelihood
    assert score < 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model=gpt2", "data.objective=span_corruption"],
            "span_corruption needs an encoder and a decoder; the model, of family gpt, has 0 encoder",
        ),
        (
            ["model=bert-base-uncased", "data.objective=span_corruption"],
            "an encoder and a decoder; .* 0 decoder layers",
        ),
        (["data.objective=causal_lm"], "causal_lm needs a decoder and no encoder; the model, of family t5"),
        (["model=gpt2", "data.objective=causal_lm", "train.input_length=1025"], "1025 tokens .* 1024 positions"),
    ],
)
def test_an_objective_needs_its_kind_of_model(
    settings: list[str], message: str, tiny_settings: list[str], tmp_path: Path
) -> None:
    model = [setting for setting in tiny_settings if not setting.startswith("model")]
    with pytest.raises(InputError, match=message):
        train(resolve(None, [*model, *settings, f"out={tmp_path / 'run'}"]).config)
    assert not (tmp_path / "run").exists()
