"""The properties of test_head.py beyond 128 rows, where Hopper has a kernel of its own."""

from __future__ import annotations

import pytest
import test_head as few
import torch

BF16 = torch.bfloat16
SHAPES = [  # N, H, V
    (129, 8, 1),
    (240, 576, 257),
    (256, 64, 512),
    (300, 96, 20000),
    (513, 640, 3000),
    (1000, 72, 515),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_exact_where_sums_are(
    device: str, rng: torch.Generator, rows: int, hidden_size: int, vocab: int, with_bias: bool
) -> None:
    few.test_exact_where_sums_are(device, rng, rows, hidden_size, vocab, with_bias)


@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_random_floats(device: str, rng: torch.Generator, rows: int, hidden_size: int, vocab: int) -> None:
    few.test_random_floats(device, rng, rows, hidden_size, vocab)


def test_order_of_special_values(device: str, rng: torch.Generator) -> None:
    few.test_order_of_special_values(device, rng, 200)


@pytest.mark.parametrize("shards", [2, 8])
def test_shards_merge_to_the_whole(device: str, rng: torch.Generator, shards: int) -> None:
    few.test_shards_merge_to_the_whole(device, rng, shards, 150)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("batch", "block"), [(33, 8), (20, 16), (260, 2)])
def test_verify(device: str, rng: torch.Generator, batch: int, block: int, index: torch.dtype) -> None:
    few.test_verify(device, rng, batch, block, index)


def test_few_and_many_rows_agree(device: str, rng: torch.Generator) -> None:
    """A row's answer does not depend on which kernel the number of rows selects."""
    hidden, weight = few.integers(rng, 400, 256).to(device), few.integers(rng, 5000, 256).to(device)
    ids, values = few.run_argmax(hidden, weight)
    for start in range(0, 400, 100):
        part = slice(start, start + 100)
        few.assert_same(few.run_argmax(hidden[part], weight), (ids[part], values[part]))


def test_strided_and_overlapping_hidden(device: str, rng: torch.Generator) -> None:
    """One row for all (stride 0) and every other row of a wider buffer."""
    wide, weight = few.integers(rng, 2 * 200, 3 * 64).to(device), few.integers(rng, 700, 64).to(device)
    for hidden in (wide[::2, 64:128], wide[:1, :64].expand(200, 64)):
        few.assert_same(few.run_argmax(hidden, weight), few.run_argmax(hidden.contiguous(), weight))


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    few.test_graph_replay_equals_eager(rng, 256)
