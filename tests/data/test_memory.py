"""The memory that a run's data takes grows with the number of its examples, not with their tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Builds a token cache, and reads 200 batches of it, each example in a row of its own and then packed.
PROGRAM = """
import dataclasses, json, sys
from t5x_lite.config import resolve
from t5x_lite.data import recipe
from t5x_lite.data.token_cache import build_cache
from t5x_lite.data.tokenizers import ByteTokenizer

config, tokenizer = resolve(None, sys.argv[1:]).config, ByteTokenizer()
data = recipe.open_data(config.data)
(task,) = data.tasks

def bytes_of(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) * 1024

told = {}
cache = build_cache(task.source, task.encoder(tokenizer), recipe.cache_root(config.data), workers=1)
told["building"] = bytes_of("VmHWM")  # the peak so far
trains = []
for packing in (False, True):
    run = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
    trains.append(recipe.datasets(data, run, tokenizer).train)
told["examples"] = sum(train.num_examples for train in trains)
told["rows"] = sum(train.num_rows for train in trains)
told["opening"] = bytes_of("VmHWM")
# Pages of files that were read count as resident until others need them: what was allocated does not have them.
told["reading"] = 0
for step in range(200):
    for train in trains:
        train.batch(step)
    told["reading"] = max(told["reading"], bytes_of("RssAnon"))
told["tokens"] = cache.features["tokens"].flat.nbytes
print(json.dumps(told))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_ten_times_the_corpus_takes_an_index_more_and_no_tokens(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes()

    def measure(documents: int) -> dict[str, int]:
        path = tmp_path / f"{documents}.txt"
        path.write_bytes(b"\n".join(letters[n % 1000 : n % 1000 + 1000 + 7 * n % 2000] for n in range(documents)))
        settings = ["train.input_length=256", "train.batch_size=8", "data.mean_span_length=10"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"data.path={path}", f"data.cache_dir={tmp_path / 'caches'}", *settings],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    small, large = measure(1000), measure(10_000)
    more = {name: large[name] - small[name] for name in small}
    assert more["tokens"] > 30_000_000
    # Some numbers for each example: its document, where it begins, its row. Of two bytes a token they would have 512.
    # 24, 45 and 53 were seen.
    for name in ("building", "opening", "reading"):
        assert more[name] < 80 * more["examples"] < more["tokens"] / 3, (name, more)
