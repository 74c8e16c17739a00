"""Published models through the friendly face and the command line: loaded, used, brought in, and given back."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite import GenerationConfig, LanguageModel
from t5x_lite.cli.main import main
from t5x_lite.data.packing import decoder_batch
from t5x_lite.data.tokenizers import load_tokenizer
from t5x_lite.errors import InputError
from t5x_lite.interop import huggingface
from t5x_lite.interop.tensor_files import open_tensors, write_safetensors
from t5x_lite.models import TransformerConfig, preset
from t5x_lite.sharding import make_mesh

FIXTURES = Path(__file__).parent / "fixtures" / "huggingface"
TOKENIZERS = Path(__file__).parent / "fixtures" / "tokenizers"
NEW_TOKENS = 12

Arrays = dict[str, np.ndarray]


# --- fixtures of transformers: ids ----------------------------------------------------------------------------------


def stored(name: str) -> tuple[Arrays, dict[str, Any]]:
    with np.load(FIXTURES / name / "ref.npz") as file:
        return dict(file), json.loads((FIXTURES / name / "ref.json").read_text())


def generative(array: str) -> list[str]:
    """Returns the fixtures with greedy tokens and an array of this name, but for those that have no weights."""
    paths = sorted(FIXTURES.glob("*/hf"))
    return [path.parent.name for path in paths if {"greedy_ids", array} <= stored(path.parent.name)[0].keys()]


ENCODER_DECODERS, DECODERS = generative("decoder_input_ids"), generative("prompt_ids")


def open_fixture(name: str, mesh: Any = None) -> LanguageModel:
    directory, notes = FIXTURES / name / "hf", stored(name)[1]
    config = None
    if "attention_window" in notes:  # GPT-3's: no class of transformers has it
        window = {"attention_window": notes["attention_window"], "alternating_window": True}
        config = dataclasses.replace(huggingface.read_config(directory), **window)
    return t5x_lite.load(directory, mesh=mesh, config=config)


def rows(ids: np.ndarray, sizes: np.ndarray) -> list[list[int]]:
    return [row[:size].tolist() for row, size in zip(np.asarray(ids), np.asarray(sizes), strict=True)]


def inputs(reference: Arrays) -> Arrays:
    """Returns the batch that is to be continued: texts for the encoder, or prompts, padded on the right."""
    if "prompt_ids" not in reference:
        names = {"encoder_input_tokens": "input_ids", "encoder_segment_ids": "attention_mask"}
        return {ours: reference[theirs].astype(np.int32) for ours, theirs in names.items()}
    prompts = rows(reference["prompt_ids"], reference["prompt_len"])
    length = max(map(len, prompts))
    made = decoder_batch([(prompt, []) for prompt in prompts], rows=len(prompts), length=length, pad_id=0)
    return {name: made[name] for name in ("decoder_input_tokens", "decoder_segment_ids")}


def greedy(lm: LanguageModel, batch: Arrays) -> list[list[int]]:
    made = lm.generate_tokens(batch, GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert made.tokens.shape == (len(next(iter(batch.values()))), NEW_TOKENS)
    return rows(made.tokens, made.lengths)


def test_the_fixtures_are_there() -> None:
    assert (len(ENCODER_DECODERS), len(DECODERS)) == (9, 9)


@pytest.mark.parametrize("name", ENCODER_DECODERS + DECODERS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    reference, notes = stored(name)
    lm, batch = open_fixture(name), inputs(reference)
    wanted = rows(reference["greedy_ids"], reference["greedy_len"])
    assert len({len(row) for row in wanted}) > 1 or name not in ("bart", "gpt2")
    made = lm.generate_tokens(batch, GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert rows(made.tokens, made.lengths) == wanted
    np.testing.assert_allclose(made.scores, notes["generation"]["greedy"]["sum_logprob"], atol=1e-4, rtol=0)
    # In the same program, every row among texts that are nothing but their first token.
    for row in range(len(wanted)):
        others = (np.arange(len(wanted)) == row)[:, None] | (np.arange(next(iter(batch.values())).shape[1]) == 0)
        changed = {key: np.where(others, array, 0) if key.endswith("ids") else array for key, array in batch.items()}
        assert greedy(lm, changed)[row] == wanted[row]


@pytest.mark.parametrize("name", ["openai_gpt", "gpt2", "sliding_window", "bart"])
def test_greedy_tokens_of_a_text_alone(name: str) -> None:
    reference, _ = stored(name)
    lm, batch = open_fixture(name), inputs(reference)
    segments = next(array for key, array in batch.items() if key.endswith("segment_ids"))
    row = int(np.argmin(np.sum(segments, axis=1)))
    alone = {key: array[[row], : int(np.sum(segments[row]))] for key, array in batch.items()}
    assert alone.keys() == batch.keys()
    assert next(iter(alone.values())).shape[1] < segments.shape[1]
    assert greedy(lm, alone) == [rows(reference["greedy_ids"], reference["greedy_len"])[row]]
    if name == "gpt2":  # and without segment ids: nothing of a prompt is a pad
        del alone["decoder_segment_ids"]
        assert greedy(lm, alone) == [rows(reference["greedy_ids"], reference["greedy_len"])[row]]


@pytest.mark.parametrize(
    ("name", "mesh_text"),
    [
        ("t5_v1_1", "data:2,fsdp:2"),
        ("t5_sharded", "data:2,model:2"),
        ("bart", "data:2,model:4"),
        ("gpt3_sparse", "data:2,fsdp:2,model:2"),
        ("llama2_head_dim", "data:2,model:2"),
    ],
)
def test_greedy_tokens_on_a_mesh(name: str, mesh_text: str) -> None:
    devices = int(np.prod([int(part.partition(":")[2]) for part in mesh_text.split(",")]))
    lm = open_fixture(name, make_mesh(mesh_text, jax.devices()[:devices]))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(lm.params))
    reference, _ = stored(name)
    wanted = rows(reference["greedy_ids"], reference["greedy_len"])
    batch = {key: array[[0, 1, 2, 0]] for key, array in inputs(reference).items()}  # rows that divide
    assert greedy(lm, batch) == [*wanted, wanted[0]]


def test_a_prompt_and_its_continuation_have_to_fit_the_position_table() -> None:
    lm = open_fixture("gpt2")
    batch = {"decoder_input_tokens": np.full((1, 40), 7, np.int32)}
    with pytest.raises(InputError, match="max_new_tokens 10 and the prompt take 49 positions, but the model has 48"):
        lm.generate_tokens(batch, GenerationConfig(max_new_tokens=10))
    with pytest.raises(InputError, match=r"max_new_tokens 46 and the prompt take 46 .* has 44"):
        open_fixture("bart").generate_tokens(
            {"encoder_input_tokens": np.full((1, 4), 7, np.int32)}, GenerationConfig(max_new_tokens=46)
        )
    long = {"encoder_input_tokens": np.full((1, 45), 7, np.int32), "encoder_segment_ids": np.ones((1, 45), np.int32)}
    with pytest.raises(InputError, match=r"the 45 tokens of a text take 45 positions, .* has 44"):
        open_fixture("bart").generate_tokens(long, GenerationConfig(max_new_tokens=2))


def test_prompts_are_padded_on_the_right() -> None:
    batch = {"decoder_input_tokens": np.array([[9, 9, 7, 8]]), "decoder_segment_ids": np.array([[0, 0, 1, 1]])}
    with pytest.raises(InputError, match="decoder_segment_ids rise within a row"):
        open_fixture("gpt2").generate_tokens(batch, GenerationConfig(max_new_tokens=2))


# --- tiny models with tokenizers: texts -----------------------------------------------------------------------------

TEXTS = ["The keeper waited.", "ships", "two  spaces and   three of winter"]


def settings(name: str) -> tuple[str, TransformerConfig]:
    """Returns the tokenizer and the shape of a model for it; more rows than it has tokens, as the published have."""
    sizes: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "head_dim": 4, "mlp_dim": 24}
    t5 = {**sizes, "vocab_size": 224, "num_encoder_layers": 2, "num_decoder_layers": 2}
    bart = {**t5, "vocab_size": 408, "max_positions": 40}
    gpt2 = {**sizes, "vocab_size": 404, "num_decoder_layers": 2, "max_positions": 40}
    llama = {**sizes, "vocab_size": 424, "num_decoder_layers": 2, "num_kv_heads": 2}
    bert = {**sizes, "vocab_size": 352, "num_encoder_layers": 2, "max_positions": 40}
    ids = {"bos_id": 400, "eos_id": 400, "decoder_start_id": 400}
    return {
        "t5": ("t5_json", dataclasses.replace(preset("t5-v1.1-small"), **t5)),
        "bart": ("roberta", dataclasses.replace(preset("bart-base"), **bart)),
        "gpt2": ("gpt2", dataclasses.replace(preset("gpt2"), **gpt2, **ids)),
        "llama": ("llama", dataclasses.replace(preset("llama-2-7b"), **llama)),
        "bert": ("bert_uncased", dataclasses.replace(preset("bert-base-uncased"), **bert)),
    }[name]


@pytest.fixture(scope="module")
def published(random_params: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function `name -> directory` of a tiny model with its tokenizer, as transformers would save both."""

    @cache
    def write(name: str) -> Path:
        tokenizer, config = settings(name)
        directory = tmp_path_factory.mktemp("published") / name
        huggingface.save(random_params(config), config, directory)
        for file in (TOKENIZERS / tokenizer).iterdir():
            if file.name not in ("config.json", "generation_config.json"):  # a model's, and this model has its own
                shutil.copyfile(file, directory / file.name)
        return directory

    return write


@pytest.fixture(scope="module")
def open_published(published: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A function `name -> LanguageModel`."""
    return cache(lambda name: t5x_lite.load(published(name)))


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_texts_are_continued_and_scored(name: str, open_published: Callable[[str], LanguageModel]) -> None:
    lm = open_published(name)
    tokenizer = lm.require_tokenizer()
    assert tokenizer.vocab_size == load_tokenizer(TOKENIZERS / settings(name)[0]).vocab_size < lm.config.vocab_size
    answers = lm.generate(TEXTS, max_new_tokens=8)
    assert any(answers)

    framed = [[*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.suffix_ids] for text in TEXTS]
    assert {"t5": framed[0][-1] == 1, "bart": framed[0][0] == 0}.get(name, True)
    targets = ["the ships", "winter and the keeper", "a"]
    scores = lm.score(TEXTS, targets)
    apply = jax.jit(lambda batch: jax.nn.log_softmax(lm.model.apply({"params": lm.params}, batch)))
    for row, (source, target) in enumerate(zip(framed, targets, strict=True)):
        # By hand, without any padding. A decoder alone has one line; an encoder's answer ends as all its texts do.
        target_ids = tokenizer.encode(target)
        if lm.config.num_encoder_layers:
            target_ids = [*tokenizer.prefix_ids, *target_ids, *tokenizer.suffix_ids]
            line = [lm.config.decoder_start_id, *target_ids]
        else:
            line = [*source, *target_ids]
        # One width for all, so that one program is compiled: what follows a token cannot change its probability.
        width = 32
        batch = {"decoder_input_tokens": np.array([[*line, *[5] * (width - len(line))]])}
        if lm.config.num_encoder_layers:
            padded = [*source, *[5] * (width - len(source))]
            real = np.arange(width)[None, :] < len(source)
            batch |= {"encoder_input_tokens": np.array([padded]), "encoder_segment_ids": real.astype(np.int32)}
        logs = np.asarray(apply(batch))[0]
        begin = len(line) - len(target_ids)
        wanted = sum(float(logs[place - 1, line[place]]) for place in range(begin, len(line)))
        assert scores.num_tokens[row] == len(target_ids)
        assert scores.log_likelihood[row] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_embeddings(name: str, open_published: Callable[[str], LanguageModel]) -> None:
    lm = open_published(name)
    tokenizer = lm.require_tokenizer()
    side, method = ("encoder", "encode") if name == "bert" else ("decoder", "hidden_states")
    embeddings = lm.embed(TEXTS)
    assert len(embeddings) == len(TEXTS)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.suffix_ids]
        assert (ids[0] == 2 and ids[-1] == 3) == (name == "bert")
        assert embedding.shape == (len(ids), lm.config.embed_dim)
        width = 32  # one program: padding that segment ids tell
        batch = {
            f"{side}_input_tokens": np.array([[*ids, *[5] * (width - len(ids))]]),
            f"{side}_segment_ids": (np.arange(width)[None, :] < len(ids)).astype(np.int32),
        }
        wanted = jax.jit(lambda batch: lm.model.apply({"params": lm.params}, batch, method=method))(batch)
        np.testing.assert_allclose(embedding, np.asarray(wanted)[0, : len(ids)], atol=1e-5)


def test_an_empty_prompt(open_published: Callable[[str], LanguageModel]) -> None:
    with pytest.raises(InputError, match="an empty text is no prompt"):
        open_published("gpt2").generate(["ships", ""], max_new_tokens=8)
    assert len(open_published("llama").generate(["", "ships"], max_new_tokens=8)) == 2  # it begins with BOS
    # The likelihood of a whole text: it follows the token that texts start with.
    assert open_published("gpt2").score([""], ["ships"]).num_tokens.tolist() == [
        len(open_published("gpt2").require_tokenizer().encode("ships"))
    ]


def test_texts_have_to_fit_the_position_table(open_published: Callable[[str], LanguageModel]) -> None:
    long = "The keeper waited. " * 12
    for name in ("gpt2", "bart", "bert"):
        lm = open_published(name)
        tokenizer = lm.require_tokenizer()
        size = len(tokenizer.prefix_ids) + len(tokenizer.encode(long)) + len(tokenizer.suffix_ids)
        assert size > 40
        calls = [(lambda lm=lm: lm.embed(["ships", long]), size)]
        if name != "bert":
            unread = name == "gpt2"  # the last token of a target, which nothing follows
            calls += [
                (lambda lm=lm: lm.generate(["ships", long], max_new_tokens=2), size),
                (lambda lm=lm: lm.score([long], [""]), size - unread),
            ]
        for call, read in calls:
            with pytest.raises(InputError, match=f"the {size} tokens of a text take {read} positions, .* has 40"):
                call()
    prompt = len(open_published("gpt2").require_tokenizer().encode(TEXTS[0]))
    with pytest.raises(InputError, match=f"max_new_tokens 40 and the prompt take {prompt + 39} positions, .* has 40"):
        open_published("gpt2").generate(TEXTS[:1], max_new_tokens=40)


def test_an_encoder_alone_does_not_generate(open_published: Callable[[str], LanguageModel]) -> None:
    with pytest.raises(InputError, match="no decoder"):
        open_published("bert").generate(["ships"], max_new_tokens=4)
    with pytest.raises(InputError, match="no decoder"):
        open_published("bert").score(["ships"], ["ships"])


def test_padding_of_a_prompt_is_known_by_its_id() -> None:
    lm = open_fixture("t5_v1_1")
    source = {"encoder_input_tokens": np.array([[9, 8, 7, 1]])}
    prompts = [np.array([[0, 5, 6, *pads]]) for pads in ((), (0, 0))]
    few = GenerationConfig(max_new_tokens=4)
    alone, padded = (lm.generate_tokens({**source, "decoder_input_tokens": prompt}, few) for prompt in prompts)
    np.testing.assert_array_equal(alone.tokens, padded.tokens)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"decoder_input_tokens must be \[rows, length\], .*, not \[2, 0\]"):
        open_fixture("gpt2").generate_tokens(
            {"decoder_input_tokens": np.zeros((2, 0), np.int32)}, GenerationConfig(max_new_tokens=2)
        )


def test_ids_that_the_model_has_no_embedding_for() -> None:
    with pytest.raises(InputError, match="token id 98: the model has embeddings for 98"):
        open_fixture("gpt2").generate_tokens({"decoder_input_tokens": np.array([[5, 98]])})


@pytest.mark.parametrize("place", ["file", "file/under"])
def test_places_that_cannot_be_directories(place: str, run: Any, published: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("import", published("gpt2"), tmp_path / place), "cannot be a run directory")
    refused(run("export", published("gpt2"), tmp_path / place), "cannot be a directory")


def test_score_takes_lists(open_published: Callable[[str], LanguageModel]) -> None:
    with pytest.raises(InputError, match="score takes a list"):
        open_published("gpt2").score("ab", "cd")
    with pytest.raises(InputError, match="embed takes a list"):
        open_published("bert").embed("ab")


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns status, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return call


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert (status, out) == (2, ""), err
    (line,) = err.strip().splitlines()
    assert line.startswith("t5x-lite: ")
    assert [word for word in words if word not in line] == [], line


def same_tensors(one: Path, other: Path) -> None:
    first, second = open_tensors(one), open_tensors(other)
    assert (first.shapes, first.dtypes) == (second.shapes, second.dtypes)
    for name in first.shapes:
        assert first.read(name).tobytes() == second.read(name).tobytes(), name


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_import_generate_export(
    name: str, run: Any, published: Callable[[str], Path], open_published: Any, tmp_path: Path
) -> None:
    source, out, back = published(name), tmp_path / "run", tmp_path / "back"
    status, text, err = run("import", source, out, "--json")
    assert status == 0, err
    lm = open_published(name)
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    assert json.loads(text) == {
        "out": str(out),
        "family": lm.config.family,
        "parameters": size,
        "tokenizer": True,
    }

    # As often as it generates, the run says what the published model says.
    status, text, err = run("generate", out, "--max-new-tokens", 8, "--json", *TEXTS)
    assert status == 0, err
    said = [json.loads(line) for line in text.splitlines()]
    assert [line["input"] for line in said] == TEXTS
    assert [line["output"] for line in said] == lm.generate(TEXTS, max_new_tokens=8)

    status, _, err = run("export", out, back)
    assert status == 0, err
    same_tensors(source, back)
    again = t5x_lite.load(back)
    assert again.config == lm.config == t5x_lite.load(out).config
    tokenizer, ours = again.require_tokenizer(), lm.require_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == ours.encode(text)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == (ours.prefix_ids, ours.suffix_ids)

    refused(run("import", source, out), str(out), "holds a run already")
    refused(run("export", out, back), str(back), "holds a model already")


def test_import_refuses_a_directory_with_a_run(run: Any, published: Any, trained_run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    refused(run("import", published("t5"), trained_run), str(trained_run), "holds a run already")
    assert before == {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    refused(run("import", tmp_path / "nowhere", tmp_path / "out"), "nowhere")
    assert not (tmp_path / "out").exists()


def test_import_lists_what_does_not_fit(run: Any, published: Any, tmp_path: Path) -> None:
    source = shutil.copytree(published("llama"), tmp_path / "damaged")
    files = open_tensors(source)
    gone, extra, other = (
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
    )

    def tensors() -> Iterator[Any]:
        arrays = {name: files.read(name) for name in files.shapes if name != gone}
        arrays |= {extra: np.zeros(16, np.float32), other: arrays[other][:-1]}
        for name, array in arrays.items():
            yield name, array.shape, array.dtype, lambda array=array: array

    kept = list(tensors())
    write_safetensors(source / "model.safetensors", kept)
    status, out, err = run("import", source, tmp_path / "out")
    assert (status, out) == (1, "")
    for name in (gone, extra, other):
        assert name in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    lines = [f"The {a} waited for {b} ships in the {c} of winter." for a in "abcdef" for b in "ghijkl" for c in "mnop"]
    path.write_text("\n".join(lines) + "\n")
    return path


def train_settings(sentences: Path) -> list[str]:
    return [
        f"data.path={sentences}",
        "train.steps=2",
        "train.batch_size=8",
        "train.input_length=16",
        "train.eval_batches=1",
        "optimizer.schedule=constant",
    ]


def test_training_does_not_go_on_in_an_imported_directory(
    run: Any, published: Any, sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imported"
    assert run("import", published("t5"), out)[0] == 0
    before = sorted(path for path in out.rglob("*") if path.name != ".lock")
    refused(run("train", out, *train_settings(sentences)), str(out), "imported", "init_from")
    refused(run("train", f"out={out}", f"init_from={out}", *train_settings(sentences)), str(out), "imported")
    assert before == sorted(path for path in out.rglob("*") if path.name != ".lock")


def test_training_starts_from_a_huggingface_directory(
    run: Any, published: Any, open_published: Any, sentences: Path, tmp_path: Path
) -> None:
    source, out = published("t5"), tmp_path / "run"
    status, text, err = run(
        "train", f"init_from={source}", f"out={out}", *train_settings(sentences), "optimizer.learning_rate=0", "--json"
    )
    assert status == 0, err
    assert json.loads(text)["step"] == 2
    lm, before = t5x_lite.load(out), open_published("t5")
    assert lm.config == before.config
    assert lm.require_tokenizer().encode(TEXTS[0]) == before.require_tokenizer().encode(TEXTS[0])
    # At a learning rate of 0 the parameters are those that it started from.
    for one, other in zip(jax.tree.leaves(lm.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_array_equal(one, other)
