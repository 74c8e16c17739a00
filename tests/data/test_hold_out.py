import numpy as np
import pytest

from t5x_lite.data.hold_out import held_out, held_out_blocks
from t5x_lite.data.tokens import text_hashes as keys
from t5x_lite.errors import InputError


def test_it_follows_content_alone() -> None:
    records = [f"record {i % 400}" for i in range(1000)]
    held = held_out(keys(records), 0.1)
    # 400 different ones: three standard deviations of the binomial are 4.5 %.
    assert 0.05 < held.mean() < 0.15
    sides = dict(zip(records, held.tolist(), strict=True))
    assert [sides[record] for record in records] == held.tolist()  # repeats are on one side
    assert held_out(keys(records[::-1]), 0.1).tolist() == held.tolist()[::-1]
    assert held_out(keys([*records, "new"]), 0.1)[:-1].tolist() == held.tolist()


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_empty(fraction: float) -> None:
    for records in (["a", "b"], ["a", "a", "b"], list(map(str, range(20)))):
        held = held_out(keys(records), fraction)
        assert held.any()
        assert not held.all()


def test_errors() -> None:
    for records in ([], ["a"], ["a", "a"]):
        with pytest.raises(InputError, match=f"{len(records)} records, fewer than 2 different"):
            held_out(keys(records), 0.1)
    for fraction in (0, 1, -0.5, 2):
        with pytest.raises(InputError, match=f"validation fraction {fraction}: must be above 0 and below 1"):
            held_out(keys(["a", "b"]), fraction)


def test_blocks_are_neighbours_of_ten_thousand_characters() -> None:
    texts = [f"line {n} of the text, which is neither long nor short" for n in range(40_000)]
    sizes = np.array(list(map(len, texts)))
    held = held_out_blocks(keys(texts), sizes, 0.05)
    # About one in twenty of two hundred blocks: three standard deviations of the binomial are 4.6 %.
    assert 0.01 < held.mean() < 0.1
    runs = np.diff(np.flatnonzero(np.diff(held, prepend=False, append=False)).reshape(-1, 2), axis=1)
    assert (runs * sizes.mean() > 9_000).all()
    assert held_out_blocks(keys(texts), sizes, 0.05).tolist() == held.tolist()


def test_a_small_text_is_divided_too() -> None:
    texts = [f"line {n}" for n in range(40)]
    held = held_out_blocks(keys(texts), np.array(list(map(len, texts))), 0.1)
    assert 0 < held.sum() < 20
