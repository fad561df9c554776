"""`inject_kv` and `draft_forward` with more than 32 rows, where Hopper and Blackwell have a GEMM of their own
(csrc/smxx/many_rows).

Held to the same rules as their own tests. Between them the shapes cover every tile width, pairs of row tiles and single
ones, K whole and cut in two and four, one to eight sources, gathered rows, and every epilogue: heads of 64 and 128 are
finished from the accumulators, others by a kernel of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_draft
import test_inject
import torch
from test_draft import Case

from dflash_kernels.reference.inject import live_rows

pytestmark = pytest.mark.gpu

INJECTIONS = [  # rows are batch * block
    {"batch": 13, "block": 5, "hidden": 64, "num_taps": 1, "heads": 1, "dim": 32},
    {"batch": 127, "block": 1, "hidden": 72, "num_taps": 3, "heads": 3, "dim": 24, "layers": 3},  # sources end early
    {"batch": 16, "block": 8, "hidden": 1024, "num_taps": 8, "heads": 1, "dim": 128, "layers": 1},
    {"batch": 43, "block": 3, "hidden": 200, "num_taps": 5, "heads": 1, "dim": 56},
    {"batch": 17, "block": 15, "hidden": 576, "num_taps": 5, "heads": 3, "dim": 64, "layers": 5},
    {"batch": 16, "block": 16, "hidden": 4096, "num_taps": 2, "heads": 8, "dim": 128, "layers": 5},
    {"batch": 32, "block": 16, "hidden": 2048, "num_taps": 5, "heads": 2, "dim": 256, "layers": 2, "rotary_dim": 64},
    {"batch": 57, "block": 9, "hidden": 1000, "num_taps": 2, "heads": 5, "dim": 8, "layers": 3, "bias": False},
    {"batch": 64, "block": 16, "hidden": 320, "num_taps": 4, "heads": 4, "dim": 40, "layers": 4, "sliced": False},
    {"batch": 257, "block": 4, "hidden": 1536, "num_taps": 1, "heads": 4, "dim": 128, "layers": 2},
    {"batch": 32, "block": 16, "hidden": 4096, "num_taps": 5, "heads": 8, "dim": 128, "layers": 5},
    {"batch": 20, "block": 8, "hidden": 4096, "num_taps": 1, "heads": 1, "dim": 128, "layers": 6},  # heads in parts
    {"batch": 64, "block": 16, "hidden": 2880, "num_taps": 3, "heads": 8, "dim": 64, "layers": 4, "norm": False},
    {"batch": 9, "block": 16, "hidden": 576, "num_taps": 5, "heads": 3, "dim": 64, "layers": 1, "bias": False},
    {"batch": 300, "block": 16, "hidden": 512, "num_taps": 2, "heads": 9, "dim": 64, "layers": 3},
    {
        "batch": 30,
        "block": 10,
        "hidden": 72,
        "num_taps": 2,
        "heads": 3,
        "dim": 18,
        "layers": 3,
    },  # width no multiple of 8
]


@pytest.mark.parametrize("commit", ["all rows", "some", "full blocks", "one token"])
@pytest.mark.parametrize("shape", INJECTIONS, ids=str)
def test_inject_matches_reference(rng: torch.Generator, shape: dict[str, int], commit: str) -> None:
    batch, block = shape["batch"], shape["block"]
    lens = {
        "all rows": None,
        "some": torch.randint(0, block + 1, (batch,), generator=rng).tolist(),
        "full blocks": [block] * batch,
        "one token": [0] * (batch - 1) + [1],
    }[commit]
    test_inject.check_against_reference(test_inject.make(rng, "cuda", commit=lens, **shape))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("commit", [True, False])
def test_epilogue_equals_the_kernel_after_it(rng: torch.Generator, dim: int, commit: bool) -> None:
    """Caches that begin at an odd element are written by a kernel after the projection. V is the same bit for bit.

    The sum over H is whole in both, because there are columns enough for all SMs; K-norms add up in another order.
    """
    lens = torch.randint(0, 17, (60,), generator=rng).tolist() if commit else None
    inputs = test_inject.make(
        rng, "cuda", batch=60, block=16, hidden=1024, heads=16 * 128 // dim, dim=dim, layers=6, commit=lens
    )

    def odd(cache: torch.Tensor) -> torch.Tensor:
        room = cache.new_full((cache.numel() + 1,), test_inject.POISON)
        return room[1:].view(cache.shape)

    other = replace(inputs, k_caches=[odd(c) for c in inputs.k_caches], v_caches=[odd(c) for c in inputs.v_caches])
    inputs.run()
    other.run()
    (k, v), (other_k, other_v) = inputs.caches(), other.caches()
    assert torch.equal(v, other_v)
    assert ((k.float() - other_k.float()).abs() <= k.float().abs() * 2.0**-7 + 1e-6).all()


@pytest.mark.parametrize("options", test_inject.OPTIONS, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("commit", [True, False])
def test_inject_options(rng: torch.Generator, options: dict[str, object], dim: int, commit: bool) -> None:
    lens = torch.randint(0, 9, (50,), generator=rng).tolist() if commit else None
    shape = {"batch": 50, "block": 8, "hidden": 576, "heads": 3, "dim": dim}
    test_inject.check_against_reference(test_inject.make(rng, "cuda", commit=lens, **shape, **options))


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("batch", [4, 70])
def test_inject_shards(rng: torch.Generator, ranks: int, commit: bool, batch: int) -> None:
    """Parts of fc that are no whole tile; f of dead rows is neither written nor read."""
    lens = torch.randint(0, 17, (batch,), generator=rng).tolist() if commit else None
    inputs = test_inject.make(rng, "cuda", batch=batch, block=16, hidden=2880, num_taps=2, heads=8, dim=64, commit=lens)
    sharded = test_inject.ShardedInputs(**vars(inputs), ranks=ranks, kv_ranks=ranks, fused=[])
    test_inject.check_against_reference(sharded)
    dead = torch.ones(batch * 16, dtype=torch.bool, device="cuda")
    dead[live_rows(batch * 16, inputs.commit_lens)] = False
    for part in sharded.fused:
        assert part[dead].isnan().all() and not part[~dead].isnan().any()


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("block", [8, 100])
def test_dead_rows_are_not_used(rng: torch.Generator, block: int, dim: int) -> None:
    """NaN in their taps and in the workspace change nothing, nor do slots and positions out of range."""
    batch = 3200 // block
    commit = torch.randint(0, block + 1, (batch,), generator=rng).tolist()
    inputs = test_inject.make(rng, "cuda", batch=batch, block=block, hidden=320, dim=dim, commit=commit)
    inputs.run()
    clean = inputs.caches()
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(test_inject.POISON)
    dead = torch.ones(batch * block, dtype=torch.bool, device="cuda")
    dead[live_rows(batch * block, inputs.commit_lens)] = False
    for tap in inputs.taps:
        tap[dead] = float("nan")
    inputs.slots[dead], inputs.positions[dead] = 2**31 - 1, -(2**31)
    inputs.workspace.fill_(float("nan"))
    inputs.run()
    assert torch.equal(inputs.caches(), clean)


@pytest.mark.parametrize("commit", [True, False])
def test_bad_rows_are_skipped(rng: torch.Generator, commit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live rows whose slot or position is out of range change nothing, their neighbours are written."""
    monkeypatch.delenv("DFLASH_DEBUG", raising=False)
    lens = [8] * 40 if commit else None
    inputs = test_inject.make(rng, "cuda", batch=40, block=8, hidden=256, dim=128, heads=3, commit=lens)
    inputs.run()
    clean = inputs.caches()
    bad = {3: ("slots", -1), 130: ("slots", 2 * 320 + 3), 131: ("positions", -1), 319: ("positions", 64)}
    untouched = inputs.slots[list(bad)].clone().long()
    for row, (name, value) in bad.items():
        getattr(inputs, name)[row] = value
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(test_inject.POISON)
    clean[:, :, untouched] = test_inject.POISON
    inputs.run()
    assert torch.equal(inputs.caches(), clean)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_order_of_requests_does_not_matter(rng: torch.Generator, dim: int) -> None:
    """A row's sums do not depend on the tile or the place in it: caches are equal bit for bit."""
    commit = torch.randint(1, 9, (100,), generator=rng)
    inputs = test_inject.make(rng, "cuda", batch=100, block=8, hidden=512, dim=dim, commit=commit.tolist())
    order = torch.randperm(100, generator=rng).cuda()
    rows = (order[:, None] * 8 + torch.arange(8, device="cuda")).flatten()
    permuted = replace(
        inputs,
        taps=[tap[rows] for tap in inputs.taps],
        positions=inputs.positions[rows],
        slots=inputs.slots[rows],
        commit_lens=commit.cuda()[order],
        k_caches=[c.clone() for c in inputs.k_caches],
        v_caches=[c.clone() for c in inputs.v_caches],
    )
    inputs.run()
    permuted.run()
    assert torch.equal(inputs.caches(), permuted.caches())


@pytest.mark.parametrize("dim", [32, 128])
def test_a_captured_injection_follows_its_lengths(rng: torch.Generator, dim: int) -> None:
    """One graph, replayed with other taps and other numbers of live rows, none and all of them included."""
    inputs = test_inject.make(rng, "cuda", batch=32, block=16, hidden=1024, num_taps=5, dim=dim, commit=[7] * 32)
    inputs.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.run()
    for lengths in ([0] * 32, [16] * 32, torch.randint(0, 17, (32,), generator=rng).tolist(), [1] + [0] * 31):
        inputs.commit_lens.copy_(torch.tensor(lengths))
        for tap in inputs.taps:
            tap.copy_(torch.randn(tap.shape, generator=rng))
        for cache in inputs.k_caches + inputs.v_caches:
            cache.fill_(test_inject.POISON)
        graph.replay()
        replayed = inputs.caches()
        for cache in inputs.k_caches + inputs.v_caches:
            cache.fill_(test_inject.POISON)
        test_inject.check_against_reference(inputs)
        assert torch.equal(inputs.caches(), replayed)


def drafts(batch: int, block: int, **more: object) -> Case:
    values = {"H": 256, "I": 344, "heads": (2, 1), "windows": (0,), "causal": (0,), **more}
    return Case(contexts=tuple(b % 5 for b in range(batch)), T=block, **values)


DRAFTS = [
    drafts(13, 5),
    drafts(18, 7, H=72, I=88),
    drafts(16, 8, H=1024, I=4096, heads=(8, 2), D=128),
    drafts(129, 1, H=576, I=1536, heads=(9, 3)),
    drafts(17, 15, H=2048, I=1000, biases=True, heads=(16, 8)),
    drafts(20, 16, H=1000, I=2552, biases=True, heads=(6, 2)),
    drafts(32, 16, H=4096, I=2048, heads=(32, 8), D=128),
    drafts(32, 16, H=4096, I=12288, heads=(4, 1), D=128),
    drafts(64, 16, H=2048, I=6144, heads=(16, 2), D=128, windows=(0, 3), causal=(0, 1)),
    drafts(101, 10, H=320, I=120, heads=(3, 3), D=96),
]


@pytest.mark.parametrize("case", DRAFTS, ids=str)
def test_draft_matches_reference(rng: torch.Generator, case: Case) -> None:
    test_draft.check(test_draft.make_inputs(case, rng, "cuda", torch.bfloat16))


def test_captured_draft_equals_eager(rng: torch.Generator) -> None:
    inputs = test_draft.make_inputs(drafts(32, 16, H=1024, I=3072, heads=(8, 2), D=128), rng, "cuda", torch.bfloat16)
    eager = test_draft.run(inputs)
    places = test_draft.outputs(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        test_draft.draft_forward(**inputs, **places)
    for _ in range(3):
        places["out"].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(places["out"], eager)
