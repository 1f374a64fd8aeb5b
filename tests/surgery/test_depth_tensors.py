"""Embeddings and projections whose columns or rows follow depth, against slicing by hand. The families' logits are compared elsewhere."""

import random
from pathlib import Path

import pytest

from downcycle import DowncycleError
from downcycle.surgery import depth_tensors
from downcycle.surgery.checkpoint import Span, Tensor
from downcycle.surgery.depth_tensors import take_blocks
from downcycle.surgery.sources import LocalFolder

ROWS, LAYERS, SIZE = 11, 4, 3
BYTES = random.Random(0).randbytes(ROWS * LAYERS * SIZE * 2)


@pytest.fixture
def span(tmp_path: Path) -> Span:
    (tmp_path / "file").write_bytes(b"head" + BYTES + b"tail")
    return Span(LocalFolder(tmp_path), "file", 4, len(BYTES))


@pytest.mark.parametrize("chunk", [1, 50, 8 << 20], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize("kept", [[0, 1], [3], [2, 0, 0], [0, 1, 2, 3]])
def test_columns_of_kept_layers(span, kept, chunk, monkeypatch):
    monkeypatch.setattr(depth_tensors, "CHUNK", chunk)
    taken = take_blocks(Tensor("BF16", (ROWS, LAYERS * SIZE), span), kept, LAYERS, axis=1, name="x")
    numbers = [BYTES[at : at + 2] for at in range(0, len(BYTES), 2)]
    rows = [numbers[at : at + LAYERS * SIZE] for at in range(0, len(numbers), LAYERS * SIZE)]
    expected = b"".join(b"".join(row[layer * SIZE : (layer + 1) * SIZE]) for row in rows for layer in kept)
    assert taken.shape == (ROWS, len(kept) * SIZE)
    assert b"".join(taken.chunks()) == expected
    assert taken.nbytes == len(expected)


@pytest.mark.parametrize("kept", [[0, 1], [3], [2, 0, 0]])
def test_rows_of_kept_layers(span, kept):
    taken = take_blocks(Tensor("BF16", (LAYERS * SIZE, ROWS), span), kept, LAYERS, axis=0, name="x")
    block = SIZE * ROWS * 2
    assert taken.shape == (len(kept) * SIZE, ROWS)
    assert b"".join(taken.chunks()) == b"".join(BYTES[layer * block : (layer + 1) * block] for layer in kept)


def test_a_matrix_that_is_not_one_block_a_layer_is_refused(span):
    with pytest.raises(DowncycleError, match="x: BF16 .* is not 5 blocks"):
        take_blocks(Tensor("BF16", (ROWS, LAYERS * SIZE), span), [0], 5, axis=1, name="x")
