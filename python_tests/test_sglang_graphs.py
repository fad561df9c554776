"""What the SGLang plugin asks of CUDA graphs: batch sizes share one packed copy, and metadata kernels are replayed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_draft import Case, make_inputs
from test_draft_packed import MATRICES, arguments, multiprocessors, outputs, pack
from test_inject import POISON, make

from dflash_kernels.integrations.sglang.metadata import capture
from dflash_kernels.ops import draft_forward_packed, draft_forward_packed_workspace

pytestmark = pytest.mark.gpu


def test_drafter_graphs_of_several_batch_sizes_share_counters_and_workspace(rng: torch.Generator) -> None:
    """Replayed in any order, with eager launches between them, each gives what it gives alone."""
    contexts = [(300,), (64, 1), (5, 70, 129, 2)]
    cases = [make_inputs(Case(contexts=c, T=16, D=128), rng, "cuda", torch.bfloat16) for c in contexts]
    for inputs in cases[1:]:
        inputs.update({name: cases[0][name] for name in MATRICES})
    packed = pack(cases[0], multiprocessors("cuda"))
    expected = [draft_forward_packed(**arguments(inputs, packed), **outputs(inputs, packed)) for inputs in cases]
    size = max(draft_forward_packed_workspace(len(c), 16, packed) for c in contexts)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    out = torch.empty(64, packed.hidden_size, dtype=torch.bfloat16, device="cuda")
    graphs = []
    for inputs, alone in zip(cases, expected, strict=True):
        held = {"out": out[: len(alone)], "workspace": workspace}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            draft_forward_packed(**arguments(inputs, packed), **held)
        graphs.append(graph)
    for turn in (0, 2, 1, 1, 0, 2, 2, 0):
        out.fill_(float("nan"))
        graphs[turn].replay()
        assert torch.equal(out[: len(expected[turn])], expected[turn])
        other = (turn + 1) % 3
        again = draft_forward_packed(**arguments(cases[other], packed), **outputs(cases[other], packed))
        assert torch.equal(again, expected[other])


def test_injections_of_several_batch_sizes_share_a_plan(rng: torch.Generator) -> None:
    """One request, all of them, and a short prompt, captured and not, by turns."""
    whole = make(rng, "cuda", hidden=1024, batch=4, block=16, dim=128, commit=[16, 3, 1, 9]).with_plan()
    rows = (16, 64, 48)
    parts = [
        replace(
            whole,
            taps=[tap[:n] for tap in whole.taps],
            positions=whole.positions[:n],
            slots=whole.slots[:n],
            commit_lens=None if n == 48 else whole.commit_lens[: n // 16],
        )
        for n in rows
    ]

    def written(run: object) -> torch.Tensor:
        for cache in whole.k_caches + whole.v_caches:
            cache.fill_(POISON)
        run()  # type: ignore[operator]
        return whole.caches()

    expected = [written(part.run) for part in parts]
    assert not any(torch.equal(expected[i], expected[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    graphs = []
    for part in parts:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            part.run()
        graphs.append(graph)
    for turn in (0, 1, 2, 2, 0, 1, 0):
        assert torch.equal(written(graphs[turn].replay), expected[turn])
        assert torch.equal(written(parts[(turn + 2) % 3].run), expected[(turn + 2) % 3])


def test_metadata_kernels_are_captured_beside_other_work() -> None:
    """As the plugin does it: temporaries in shared memory, another stream busy, replays that see new inputs."""
    memory = torch.cuda.graph_pool_handle()
    lengths = torch.tensor([3, 9, 4], device="cuda")
    other, ones = torch.cuda.Stream(), torch.ones(1 << 24, device="cuda")
    graphs, results = [], []
    for batch in (3, 2):
        sums = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")

        def fill(batch: int = batch, sums: torch.Tensor = sums) -> None:
            short = (lengths[:batch] + 16).to(torch.int32)
            sums[1:].copy_(torch.cumsum(short, dim=0, dtype=torch.int32))

        fill()
        with torch.cuda.stream(other):
            for _ in range(20):
                ones.mul_(1.0)
        graphs.append(capture(fill, lengths.device, memory))
        results.append(sums)
    for values in ([1, 2, 3], [700, 0, 5]):
        lengths.copy_(torch.tensor(values))
        for graph, sums in zip(graphs, results, strict=True):
            sums.fill_(-1)
            sums[0] = 0
            graph.replay()
            expected = [sum(values[:i]) + 16 * i for i in range(len(sums))]
            assert sums.tolist() == expected
