"""verify_block, argmax_logits and merge_vocab_shards against the torch oracle, on every device there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import on_device

from dflash_kernels import ops
from dflash_kernels.ops import Verified
from dflash_kernels.reference import verify as reference

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
INF, NAN = float("inf"), float("nan")


def poisoned(batch: int, block_size: int, device: str) -> Verified:
    out = Verified.empty(batch, block_size, device)
    for tensor in out:
        tensor.fill_(-77)
    return out


def assert_same(actual: Verified, expected: Verified) -> None:
    for name, a, e in zip(Verified._fields, actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert torch.equal(a.cpu(), e), f"{name}: {a.cpu()} instead of {e}"


def agreeing_candidates(top1: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Candidates that agree with `top1` [B, T] up to a random place: 0..T-1 accepted, all lengths likely."""
    batch, block_size = top1.shape
    candidates = torch.zeros(batch, block_size, dtype=torch.int64)
    candidates[:, 1:] = top1[:, :-1]
    places = torch.randint(0, block_size, (batch,), generator=rng)
    for b, place in enumerate(places.tolist()):
        if place < block_size - 1:
            candidates[b, place + 1] += 1
            noise = torch.randint(0, 2, (block_size - 2 - place,), generator=rng)
            candidates[b, place + 2 :] += noise
    return candidates


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch", [0, 1, 3, 64, 256])
@pytest.mark.parametrize("block_size", [1, 7, 8, 10, 16, 32])
def test_top1_matches_reference(
    device: str, rng: torch.Generator, block_size: int, batch: int, index: torch.dtype
) -> None:
    top1 = torch.randint(0, 1000, (batch, block_size), generator=rng)
    candidates = agreeing_candidates(top1, rng)
    prefix = torch.randint(0, 1 << 20, (batch,), generator=rng).to(index)
    out = poisoned(batch, block_size, device)
    ops.verify_block(
        candidates.to(index).to(device),
        top1.to(index).to(device),
        prefix.to(device),
        out=out,
        workspace=ops.verify_workspace(0, 0, device),
    )
    assert_same(out, reference.verify_block(candidates, top1, prefix))


def test_accept_all_and_accept_none(device: str) -> None:
    top1 = torch.arange(2 * 16).view(2, 16)
    candidates = torch.zeros(2, 16, dtype=torch.int64)
    candidates[0, 1:] = top1[0, :-1]
    candidates[1, 1:] = -1
    result = ops.verify_block(candidates.to(device), top1.to(device), torch.tensor([5, 0], device=device))
    assert result.accept_lens.tolist() == [15, 0]
    assert result.bonus_ids.tolist() == [15, 16]
    assert result.out_tokens[0].tolist() == top1[0].tolist()
    assert result.new_seq_lens.tolist() == [21, 1]


def test_strided_views(device: str, rng: torch.Generator) -> None:
    top1 = torch.randint(0, 9, (6, 16), generator=rng)
    candidates = agreeing_candidates(top1, rng)
    prefix = torch.arange(12)[::2]
    wide = torch.full((6, 40), -5).to(device)
    wide[:, 1:33:2] = candidates.to(device)
    expected = reference.verify_block(candidates, top1, prefix)
    transposed = top1.t().contiguous().to(device).t()
    assert_same(ops.verify_block(wide[:, 1:33:2], transposed, torch.arange(12, device=device)[::2]), expected)


def test_batch_order_does_not_matter(device: str, rng: torch.Generator) -> None:
    logits = torch.randn(9, 8, 300, generator=rng)
    candidates = agreeing_candidates(reference.argmax(logits), rng)
    prefix = torch.arange(9)
    order = torch.randperm(9, generator=rng)
    full = ops.verify_block(candidates.to(device), logits.to(device), prefix.to(device))
    mixed = ops.verify_block(candidates[order].to(device), logits[order].to(device), prefix[order].to(device))
    assert_same(mixed, Verified(*(tensor.cpu()[order] for tensor in full)))


@pytest.mark.parametrize("lazy", [-1, 0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "block_size", "vocab"),
    [
        *((1, 16, 4099), (3, 7, 5), (2, 8, 1), (5, 10, 1027), (64, 16, 83), (2, 32, 2049), (1, 1, 769), (40, 16, 5125)),
        *((257, 1, 301), (257, 3, 1031), (1, 32, 20001)),
    ],
)
def test_logits_match_reference(
    device: str, rng: torch.Generator, batch: int, block_size: int, vocab: int, dtype: torch.dtype, lazy: int
) -> None:
    # Few distinct values: ties in every row.
    logits = (torch.randn(batch, block_size, vocab, generator=rng) * 4).round().to(dtype)
    candidates = agreeing_candidates(reference.argmax(logits), rng)
    prefix = torch.randint(0, 5000, (batch,), generator=rng)
    out, workspace = poisoned(batch, block_size, device), ops.verify_workspace(batch, block_size, device)
    arguments = (candidates.to(device), logits.to(device), prefix.to(device))
    for _ in range(2):  # the first call must leave the workspace as it was
        ops.verify_block(*arguments, lazy=lazy, out=out, workspace=workspace)
        assert_same(out, reference.verify_block(candidates, logits, prefix))
        assert not workspace.any()


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_units_match_reference(device: str, rng: torch.Generator, dtype: torch.dtype, lazy: int) -> None:
    """Rows in several pieces, and what each of them may hold: the peak, its equal, a NaN, nothing but -inf."""
    batch, block_size, vocab = 9, 16, 17003
    logits = torch.full((batch, block_size, vocab), -INF)
    places = torch.randint(0, vocab, (batch, block_size, 3), generator=rng)
    values = torch.randint(0, 2, (batch, block_size, 3), generator=rng).float()  # ties, far apart
    values[torch.rand(values.shape, generator=rng) < 0.1] = NAN
    logits.scatter_(2, places, values)
    logits[::3, ::5] = -INF
    logits = logits.to(dtype)
    candidates = agreeing_candidates(reference.argmax(logits), rng)
    prefix = torch.randint(0, 5000, (batch,), generator=rng)
    out, workspace = poisoned(batch, block_size, device), ops.verify_workspace(batch + 1, block_size, device)
    arguments = (candidates.to(device), logits.to(device), prefix.to(device))
    for _ in range(2):
        ops.verify_block(*arguments, lazy=lazy, out=out, workspace=workspace)
        assert_same(out, reference.verify_block(candidates, logits, prefix))
        assert not workspace.any()


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_across_the_parts_of_a_row(device: str, rng: torch.Generator, dtype: torch.dtype, lazy: int) -> None:
    """From `first` on all elements are equal, so every later part of the row ties; `first` stands at any border."""
    batch, block_size, vocab = 6, 32, 24001
    first = torch.randint(0, vocab // 64, (batch, block_size), generator=rng) * 64
    first += torch.randint(-1, 2, first.shape, generator=rng)
    first = first.clamp(0, vocab - 1)
    first[0, :4] = torch.tensor([0, vocab - 1, vocab - 2, 1])
    logits = (torch.arange(vocab) >= first[..., None]).to(dtype)
    candidates = agreeing_candidates(first, rng)
    candidates[:2, 1:] = first[:2, :-1]  # all accepted
    prefix = torch.arange(batch)
    result = ops.verify_block(candidates.to(device), logits.to(device), prefix.to(device), lazy=lazy)
    assert_same(result, reference.verify_block(candidates, first, prefix))


@pytest.mark.parametrize("lazy", [0, 1])
def test_rows_of_millions(device: str, lazy: int) -> None:
    """So many slices a row that their number and an index do not fit in 32 bits."""
    vocab = (1 << 22) + 3
    logits = torch.zeros(1, 2, vocab, dtype=torch.float16, device=device)
    logits[0, 0, vocab - 1] = logits[0, 1, 3 << 20] = logits[0, 1, 1 << 22] = 1.0
    candidates = torch.tensor([[0, vocab - 1]], device=device)
    workspace, out = ops.verify_workspace(1, 2, device), poisoned(1, 2, device)
    for _ in range(2):
        ops.verify_block(candidates, logits, candidates[:, 0], lazy=lazy, out=out, workspace=workspace)
        assert out.out_tokens.tolist() == [[vocab - 1, 3 << 20]]
        assert out.accept_lens.tolist() == [1]
        assert not workspace.any()


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("block_size", [1, 2, 16, 32])
def test_every_place_to_stop(device: str, rng: torch.Generator, block_size: int, lazy: int) -> None:
    """One request for each length of the accepted prefix, in any order; what lies behind the mismatch agrees or not."""
    vocab = 9001
    top1 = torch.randint(0, vocab, (block_size, block_size), generator=rng)
    logits = torch.zeros(block_size, block_size, vocab, dtype=torch.bfloat16).scatter_(2, top1[..., None], 1.0)
    candidates = torch.zeros(block_size, block_size, dtype=torch.int64)
    candidates[:, 1:] = top1[:, :-1]
    lengths = torch.randperm(block_size, generator=rng)
    for b, length in enumerate(lengths.tolist()):
        if length < block_size - 1:
            candidates[b, length + 1] = (candidates[b, length + 1] + 1) % vocab
        if b % 2:
            candidates[b, length + 2 :] = 0
            logits[b, length + 1 :] = NAN
    prefix = torch.arange(block_size)
    out, workspace = poisoned(block_size, block_size, device), ops.verify_workspace(block_size, block_size, device)
    for _ in range(2):
        arguments = (candidates.to(device), logits.to(device), prefix.to(device))
        ops.verify_block(*arguments, lazy=lazy, out=out, workspace=workspace)
        assert torch.equal(out.accept_lens.cpu().long(), lengths)
        assert_same(out, reference.verify_block(candidates, top1, prefix))
        assert not workspace.any()


@pytest.mark.parametrize("batch", [8192, 8193])
def test_as_many_requests_as_a_lazy_block_hears_of_and_more(device: str, rng: torch.Generator, batch: int) -> None:
    logits = torch.randn(batch, 2, 16, generator=rng).to(torch.bfloat16)
    candidates = agreeing_candidates(reference.argmax(logits), rng)
    prefix = torch.arange(batch)
    out, workspace = poisoned(batch, 2, device), ops.verify_workspace(batch, 2, device)
    arguments = (candidates.to(device), logits.to(device), prefix.to(device))
    ops.verify_block(*arguments, lazy=1, out=out, workspace=workspace)
    assert_same(out, reference.verify_block(candidates, logits, prefix))
    assert not workspace.any()


@pytest.mark.gpu
@pytest.mark.parametrize("lazy", [0, 1])
def test_workspace_serves_any_order_of_calls(rng: torch.Generator, lazy: int) -> None:
    """Launches of all sizes in a row on one workspace, unsynchronised: each finds it as it was made."""
    workspace, pending = ops.verify_workspace(300, 32, "cuda"), []
    for batch, block_size, vocab in ((1, 16, 151936), (300, 4, 2000), (7, 32, 30001), (1, 1, 9), (64, 16, 9000)) * 3:
        logits = torch.randn(batch, block_size, vocab, generator=rng).to(torch.bfloat16)
        candidates = agreeing_candidates(reference.argmax(logits), rng)
        prefix = torch.arange(batch)
        out = poisoned(batch, block_size, "cuda")
        arguments = (candidates.cuda(), logits.cuda(), prefix.cuda())
        ops.verify_block(*arguments, lazy=lazy, out=out, workspace=workspace)
        pending.append((out, reference.verify_block(candidates, logits, prefix)))
    for out, expected in pending:
        assert_same(out, expected)
    assert not workspace.any()


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_row_strides_and_alignment(device: str, rng: torch.Generator, dtype: torch.dtype, lazy: int) -> None:
    """Rows of any start address: the vector loop has a head and a tail."""
    for start in range(9):
        storage = torch.randn(3, 9, 2100, generator=rng).to(dtype)
        view = storage[:, :8, start : 2090 - start]
        candidates = agreeing_candidates(reference.argmax(view), rng)
        prefix = torch.arange(3)
        on_device = storage.to(device)[:, :8, start : 2090 - start]
        result = ops.verify_block(candidates.to(device), on_device, prefix.to(device), lazy=lazy)
        assert_same(result, reference.verify_block(candidates, view, prefix))


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_long_rows_of_any_alignment(device: str, rng: torch.Generator, dtype: torch.dtype, lazy: int) -> None:
    """An odd stride: every row of a block starts elsewhere. The peak is in the head, the tail or at any border."""
    batch, block_size, vocab = 3, 17, 16391
    storage = (torch.randn(batch, block_size, vocab + 2, generator=rng) * 2).round().to(dtype)
    view = storage[..., 1 : vocab + 1]
    places = torch.randint(0, vocab, (batch, block_size), generator=rng)
    places[0] = torch.arange(block_size)
    places[1] = vocab - 1 - torch.arange(block_size)
    view.scatter_(2, places[..., None], 99.0)
    candidates = agreeing_candidates(places, rng)
    candidates[:2, 1:] = places[:2, :-1]
    prefix = torch.arange(batch)
    on_device = storage.to(device)[..., 1 : vocab + 1]
    result = ops.verify_block(candidates.to(device), on_device, prefix.to(device), lazy=lazy)
    assert_same(result, reference.verify_block(candidates, places, prefix))


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_infinities_and_zeros(device: str, rng: torch.Generator, dtype: torch.dtype, lazy: int) -> None:
    """torch.argmax's order: NaN above +inf, the first of several; -inf everywhere gives index 0; -0.0 equals 0.0."""
    vocab = 1500
    logits = torch.randn(1, 9, vocab, generator=rng)
    logits[0, 0, 700] = logits[0, 0, 1400] = NAN
    logits[0, 1, 9] = INF
    logits[0, 1, 8] = -NAN
    logits[0, 2, 31] = logits[0, 2, 1031] = INF
    logits[0, 3] = -INF
    logits[0, 4] = -INF
    logits[0, 4, 1499] = -3e4
    logits[0, 5] = -0.0
    logits[0, 5, 3] = 0.0
    logits[0, 6] = NAN
    logits[0, 7] = torch.arange(vocab) // 512  # ties at the top
    expected = [700, 8, 31, 0, 1499, 0, 0, 1024, int(logits[0, 8].argmax())]
    logits = logits.to(dtype)
    expected[8] = int(logits[0, 8].argmax())
    assert reference.argmax(logits)[0].tolist() == expected
    candidates = torch.tensor([[0, *expected[:8]]])
    result = ops.verify_block(candidates.to(device), logits.to(device), torch.tensor([3], device=device), lazy=lazy)
    assert result.accept_lens.item() == 8
    assert result.out_tokens[0].tolist() == expected


def test_poison_past_the_mismatch_is_harmless(device: str, rng: torch.Generator) -> None:
    logits = torch.randn(4, 16, 3000, generator=rng)
    candidates = agreeing_candidates(reference.argmax(logits), rng)
    prefix = torch.arange(4)
    expected = reference.verify_block(candidates, logits, prefix)
    for b, length in enumerate(expected.accept_lens.tolist()):
        logits[b, length + 1 :] = NAN
    for lazy in (0, 1):
        assert_same(ops.verify_block(candidates.to(device), logits.to(device), prefix.to(device), lazy=lazy), expected)


@pytest.mark.parametrize("lazy", [0, 1])
def test_guesses_outside_the_vocabulary(device: str, rng: torch.Generator, lazy: int) -> None:
    """They match nothing, also where their lower half is the target's token."""
    logits = torch.randn(6, 7, 3000, generator=rng)
    top1 = reference.argmax(logits)
    candidates = torch.zeros(6, 7, dtype=torch.int64)
    candidates[:, 1:] = top1[:, :-1]
    candidates[0, 1], candidates[1, 3], candidates[2, 6] = -1, 3000, 1 << 40
    candidates[3, 2] += 1 << 32
    candidates[4, 4] -= 1 << 32
    candidates[4, 6] = -1
    prefix = torch.arange(6)
    expected = reference.verify_block(candidates, logits, prefix)
    assert expected.accept_lens.tolist() == [0, 2, 5, 1, 3, 6]
    assert_same(ops.verify_block(candidates.to(device), logits.to(device), prefix.to(device), lazy=lazy), expected)


@pytest.mark.parametrize("vocab", [151936, 248320])
def test_large_vocabulary(device: str, rng: torch.Generator, vocab: int) -> None:
    batch = 2 if device == "cpu" else 40  # 40 x 8 rows: several waves of CTAs, the lazy path worth its while
    logits = torch.randn(batch, 8, 1, generator=rng).expand(batch, 8, vocab).to(torch.bfloat16).to(device).contiguous()
    peak = torch.randint(0, vocab, (batch, 8), generator=rng)
    logits.scatter_(2, peak.to(device)[..., None], 9.0)
    candidates = agreeing_candidates(peak, rng)
    prefix = torch.zeros(batch, dtype=torch.int64)
    expected = reference.verify_block(candidates, peak, prefix)
    for lazy in (-1, 0, 1):
        assert_same(ops.verify_block(candidates.to(device), logits, prefix.to(device), lazy=lazy), expected)


# ---- vocabulary shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sharded_equals_unsharded(device: str, rng: torch.Generator, dtype: torch.dtype, shards: int) -> None:
    batch, block_size, width = 6, 16, 211
    vocab = shards * width
    logits = (torch.randn(batch, block_size, vocab, generator=rng) * 3).round().to(dtype)  # ties across shards
    logits[0, 3, vocab // 2 :] = NAN
    logits[1, 2] = -INF
    logits[2, 1] = 0.0
    candidates = agreeing_candidates(reference.argmax(logits), rng).to(device)
    prefix = torch.arange(batch, device=device)
    rows = logits.to(device).view(-1, vocab)
    best = [ops.argmax_logits(rows[:, s * width : (s + 1) * width], s * width) for s in range(shards)]
    ids, values = torch.stack([b[0] for b in best]), torch.stack([b[1] for b in best])
    merged_ids, merged_values = ops.merge_vocab_shards(ids, values)
    whole_ids, whole_values = ops.argmax_logits(rows)
    assert torch.equal(whole_ids.cpu(), reference.argmax(logits).view(-1))
    assert torch.equal(merged_ids, whole_ids)
    assert torch.equal(merged_values.nan_to_num(7.5, 8.5, 9.5), whole_values.nan_to_num(7.5, 8.5, 9.5))
    flipped = ops.merge_vocab_shards(ids.flip(0).contiguous(), values.flip(0).contiguous())
    assert torch.equal(flipped[0], whole_ids)
    sharded = ops.verify_block(candidates, merged_ids.view(batch, block_size), prefix)
    for a, e in zip(sharded, ops.verify_block(candidates, logits.to(device), prefix), strict=True):
        assert torch.equal(a, e)


def test_shard_values_are_the_logits(device: str, rng: torch.Generator) -> None:
    logits = torch.randn(33, 1001, generator=rng).to(torch.bfloat16)
    ids, values = ops.argmax_logits(logits.to(device), 5000)
    assert torch.equal(ids.cpu() - 5000, logits.argmax(1))
    assert torch.equal(values.cpu(), logits.float().amax(1))


_RANK = """
import sys, torch, torch.distributed as dist
from dflash_kernels import ops
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(5)
logits = (torch.randn(3, 8, 400) * 2).round()
candidates = torch.zeros(3, 8, dtype=torch.int64)
candidates[:, 1:] = logits.argmax(-1)[:, :-1]
candidates[1, 4] += 1
prefix = torch.arange(3)
ids, values = ops.argmax_logits(logits.view(-1, 400)[:, rank * 200 : rank * 200 + 200], rank * 200)
all_ids, all_values = torch.empty(2, 24, dtype=torch.int64), torch.empty(2, 24)
dist.all_gather(list(all_ids.unbind()), ids)
dist.all_gather(list(all_values.unbind()), values)
merged, _ = ops.merge_vocab_shards(all_ids, all_values)
ours = ops.verify_block(candidates, merged.view(3, 8), prefix)
whole = ops.verify_block(candidates, logits, prefix)
assert all(torch.equal(a, b) for a, b in zip(ours, whole)), (ours, whole)
assert whole.accept_lens.tolist() == [7, 3, 7]
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: object) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    command = [sys.executable, "-c", _RANK]
    ranks = [subprocess.Popen([*command, str(rank), f"{tmp_path}/rendezvous"]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


# ---- contract ---------------------------------------------------------------------------------------------------


def test_opcheck(device: str, rng: torch.Generator) -> None:
    logits = torch.randn(3, 8, 50, generator=rng).to(device)
    candidates = torch.randint(0, 50, (3, 8), generator=rng).to(device)
    prefix = torch.arange(3, device=device)
    ops_ = torch.ops.dflash
    torch.library.opcheck(ops_.verify_block.default, (candidates, candidates, prefix))
    torch.library.opcheck(ops_.verify_block.default, (candidates, logits, prefix, 1))
    outs = {**Verified.empty(3, 8, device)._asdict(), "workspace": ops.verify_workspace(3, 8, device)}
    torch.library.opcheck(ops_.verify_block.out, (candidates, logits, prefix), outs)
    torch.library.opcheck(ops_.argmax_logits.default, (logits[0], 7))
    ids, values = torch.arange(6, device=device).view(2, 3), torch.randn(2, 3, device=device)
    torch.library.opcheck(ops_.merge_vocab_shards.default, (ids, values))
    best = {"out_ids": ids[0].clone(), "out_values": values[0].clone()}
    torch.library.opcheck(ops_.merge_vocab_shards.out, (ids, values), best)
    workspace = ops.verify_workspace(3, 1, device)
    torch.library.opcheck(ops_.argmax_logits.out, (logits[:, 0],), {**best, "workspace": workspace})


def test_empty_batch(device: str) -> None:
    candidates, prefix = torch.empty(0, 16, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64)
    logits = torch.empty(0, 16, 100, device=device)
    assert ops.verify_block(candidates, logits, prefix.to(device)).out_tokens.shape == (0, 16)
    assert ops.verify_block(candidates, candidates, prefix.to(device)).accept_lens.shape == (0,)
    ids, values = ops.argmax_logits(logits[:, 0])
    assert ops.merge_vocab_shards(ids[None], values[None])[0].shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("lazy", [0, 1])
def test_graph_replay_equals_eager(rng: torch.Generator, lazy: int) -> None:
    batch, block_size, vocab = 12, 16, 30001
    logits = torch.zeros(batch, block_size, vocab, dtype=torch.bfloat16, device="cuda")
    candidates = torch.zeros(batch, block_size, dtype=torch.int64, device="cuda")
    prefix = torch.arange(batch, device="cuda")
    out, workspace = poisoned(batch, block_size, "cuda"), ops.verify_workspace(batch, block_size, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.verify_block(candidates, logits, prefix, lazy=lazy, out=out, workspace=workspace)
    for _ in range(4):
        fresh = torch.randn(batch, block_size, vocab, generator=rng).to(torch.bfloat16)
        guesses = agreeing_candidates(reference.argmax(fresh), rng)
        logits.copy_(fresh)
        candidates.copy_(guesses)
        graph.replay()
        assert_same(out, reference.verify_block(guesses, fresh, prefix.cpu()))


GOOD = {
    "candidates": torch.zeros(2, 4, dtype=torch.int64),
    "target": torch.zeros(2, 4, 9),
    "prefix_lens": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("candidates", torch.zeros(2, 33, dtype=torch.int64), r"candidates must have 1 to 32 columns, got 33"),
        ("candidates", torch.zeros(2, dtype=torch.int64), r"candidates must have shape \[\*, \*\], got \[2\]"),
        ("candidates", torch.zeros(2, 4), r"candidates must have dtype int32 or int64, got float32"),
        ("target", torch.zeros(2, 5, 9), r"target must have shape \[2, 4, \*\], got \[2, 5, 9\]"),
        ("target", torch.zeros(2, 3, dtype=torch.int64), r"target must have shape \[2, 4\], got \[2, 3\]"),
        (
            "target",
            torch.zeros(2, 4, 9).double(),
            r"target must have dtype bfloat16 or float16 or float32, got float64",
        ),
        ("target", torch.zeros(2, 9, 4).transpose(1, 2), r"target must have a contiguous last dimension, got stride 4"),
        ("target", torch.zeros(2, 4, 0), r"target must have 1 to 2\^31 - 1 columns, got 0"),
        ("prefix_lens", torch.zeros(3, dtype=torch.int64), r"prefix_lens must have shape \[2\], got \[3\]"),
        ("prefix_lens", torch.zeros(2), r"prefix_lens must have dtype int32 or int64, got float32"),
        ("lazy", 2, r"lazy must be -1, 0 or 1, got 2"),
    ],
)
def test_bad_arguments(device: str, name: str, value: object, message: str) -> None:
    arguments = {k: v.to(device) for k, v in GOOD.items()}
    arguments[name] = on_device(value, device) if isinstance(value, torch.Tensor) else value
    out = poisoned(2, 4, device)
    with pytest.raises(ValueError, match="dflash::verify_block: " + message):
        ops.verify_block(**arguments, out=out, workspace=ops.verify_workspace(2, 32, device))
    assert all((tensor == -77).all() for tensor in out)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("accept_lens", torch.zeros(2, dtype=torch.int64), r"accept_lens must have dtype int32, got int64"),
        ("out_tokens", torch.zeros(2, 3, dtype=torch.int64), r"out_tokens must have shape \[2, 4\], got \[2, 3\]"),
        ("bonus_ids", torch.zeros(4, dtype=torch.int64)[::2], r"bonus_ids must be contiguous, got strided \[2\]"),
    ],
)
def test_bad_outputs(device: str, field: str, value: torch.Tensor, message: str) -> None:
    out = poisoned(2, 4, device)._replace(**{field: on_device(value, device)})
    with pytest.raises(ValueError, match="dflash::verify_block: " + message):
        ops.verify_block(*(v.to(device) for v in GOOD.values()), out=out, workspace=ops.verify_workspace(2, 4, device))


def test_bad_workspace(device: str) -> None:
    inputs, out = [v.to(device) for v in GOOD.values()], poisoned(2, 4, device)
    with pytest.raises(ValueError, match="workspace must have at least 20 elements, got 12"):
        ops.verify_block(*inputs, out=out, workspace=ops.verify_workspace(2, 2, device))
    with pytest.raises(ValueError, match="workspace must have dtype int64, got int32"):
        ops.verify_block(*inputs, out=out, workspace=ops.verify_workspace(2, 4, device).int())
    with pytest.raises(ValueError, match="workspace must be given with out, got None"):
        ops.verify_block(*inputs, out=out)


@pytest.mark.gpu
def test_mixed_devices() -> None:
    arguments = {k: v.cuda() for k, v in GOOD.items()}
    arguments["prefix_lens"] = GOOD["prefix_lens"]
    with pytest.raises(ValueError, match=r"prefix_lens must be on cuda:0, got cpu"):
        ops.verify_block(**arguments)


def test_bad_shards(device: str) -> None:
    ids, values = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"merge_vocab_shards: values must have shape \[2, 3\], got \[2, 2\]"):
        ops.merge_vocab_shards(ids, values[:, :2])
    with pytest.raises(ValueError, match=r"merge_vocab_shards: ids must have dtype int64, got int32"):
        ops.merge_vocab_shards(ids.int(), values)
    with pytest.raises(ValueError, match=r"merge_vocab_shards: ids must have at least 1 shard, got 0"):
        ops.merge_vocab_shards(ids[:0], values[:0])
    with pytest.raises(ValueError, match=r"argmax_logits: vocab_start must be at least 0, got -1"):
        ops.argmax_logits(values, -1)
    with pytest.raises(ValueError, match=r"argmax_logits: logits must have shape \[\*, \*\], got \[3\]"):
        ops.argmax_logits(values[0])
    best = (ids[0].clone(), values[0].clone())
    with pytest.raises(ValueError, match=r"logits must have at most 2147483647 rows of its size, got 2147483648"):
        ops.argmax_logits(values[:1, :1].expand(2**31, 1), out=best, workspace=ops.verify_workspace(3, 1, device))
