"""select_path and grouped_conv: DFlash2's candidate walk and two-tap grouped convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch
from conftest import on_device

from dflash_kernels import ops
from dflash_kernels.reference import dflash2 as reference

# ---------------------------------------------------------------------------------------------------- select_path


@dataclass
class Walk:
    """Arguments of select_path, in its order."""

    candidate_ids: torch.Tensor
    base_logits: torch.Tensor
    hidden: torch.Tensor
    anchor_ids: torch.Tensor
    predecessor_codebook: torch.Tensor
    successor_codebook: torch.Tensor
    temperature: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None

    def args(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Walk:
        return Walk(*(None if tensor is None else change(tensor) for tensor in self.args()))

    def to(self, device: str) -> Walk:
        return self.map(lambda tensor: tensor.to(device))

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisoned output tensors."""
        ids = self.candidate_ids
        path = torch.full(ids.shape[:2], -7, dtype=torch.int64, device=ids.device)
        return path, torch.full(ids.shape, float("nan"), dtype=torch.float32, device=ids.device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.select_path(*self.args(), out=self.outputs())

    def scores(self, path: torch.Tensor) -> torch.Tensor:
        """Reference scores of all slots along the path that was taken."""
        previous = torch.cat([self.anchor_ids[:, None].to(path.dtype), path[:, :-1]], dim=1)
        ids, logits, hidden = self.candidate_ids, self.base_logits, self.hidden
        return reference.transition_scores(
            ids, logits, hidden, previous, self.predecessor_codebook, self.successor_codebook
        )


def make_walk(
    rng: torch.Generator,
    batch: int,
    slots: int,
    top_k: int = 16,
    rank: int = 256,
    vocab: int = 997,
    *,
    dtype: torch.dtype = torch.bfloat16,
    index: torch.dtype = torch.int64,
    exact: bool = False,
    temperature: bool = False,
) -> Walk:
    """Random arguments on the CPU. exact: small integers, so that sums are exact in any order and ties abound."""

    def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if exact:
            return torch.randint(-1, 2, shape, generator=rng).to(dtype)
        return (torch.randn(shape, generator=rng) * scale).to(dtype)

    ids = torch.rand(batch, slots, vocab, generator=rng).argsort(-1)[..., :top_k].to(index)
    logits = torch.randint(-9, 9, (batch, slots, top_k), generator=rng).float()
    if not exact:
        logits = logits + torch.rand(logits.shape, generator=rng)
    return Walk(
        ids,
        logits,
        values(batch, slots, rank),
        torch.randint(0, vocab, (batch,), generator=rng).to(index),
        values(vocab, rank, scale=0.5),
        values(vocab, rank, scale=0.5),
        torch.rand(batch, generator=rng) * 8 * (torch.arange(batch) % 3 > 0) if temperature else None,
        torch.rand(batch, slots, generator=rng) if temperature else None,
    )


WALKS = [
    pytest.param(0, 7, 16, 256, id="B0"),
    pytest.param(1, 7, 16, 256, id="B1-T8"),
    pytest.param(3, 6, 16, 256, id="B3-T7"),
    pytest.param(3, 15, 16, 256, id="B3-T16"),
    pytest.param(64, 9, 16, 256, id="B64-T10"),
    pytest.param(256, 7, 16, 256, id="B256-T8"),
    pytest.param(2, 32, 32, 256, id="widest"),
    pytest.param(5, 1, 1, 8, id="narrowest"),
    pytest.param(4, 5, 7, 72, id="odd"),
    pytest.param(2, 0, 16, 256, id="T1"),
]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("temperature", [False, True], ids=["greedy", "mixed"])
@pytest.mark.parametrize(("batch", "slots", "top_k", "rank"), WALKS)
def test_walk_equals_reference_on_exact_sums(
    batch: int,
    slots: int,
    top_k: int,
    rank: int,
    temperature: bool,
    index: torch.dtype,
    device: str,
    rng: torch.Generator,
) -> None:
    """Integer scores: ties resolve to the first index, the path is the reference's token for token."""
    walk = make_walk(rng, batch, slots, top_k, rank, exact=True, temperature=temperature, index=index).to(device)
    path, probs = walk.run()
    want_path, want_probs = reference.select_path(*walk.args())
    assert torch.equal(path, want_path)
    torch.testing.assert_close(probs, want_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "slots", "top_k", "rank"), WALKS)
def test_walk_takes_the_best_candidate_at_every_slot(
    batch: int, slots: int, top_k: int, rank: int, device: str, rng: torch.Generator
) -> None:
    walk = make_walk(rng, batch, slots, top_k, rank).to(device)
    path, probs = walk.run()
    chosen = walk.candidate_ids == path[..., None]
    assert (chosen.sum(-1) == 1).all(), "every token is one of its slot's candidates"
    assert torch.equal(probs, chosen.float())
    scores = walk.scores(path)
    taken = (scores * chosen).sum(-1)
    # the sum's order may move the rounded transition score by one step of bfloat16
    slack = 2 * 2**-7 * (scores - walk.base_logits).abs().amax(-1)
    assert (taken >= scores.amax(-1) - slack).all()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [False, True], ids=["greedy", "mixed"])
def test_devices_agree_bit_for_bit(temperature: bool, rng: torch.Generator) -> None:
    walk = make_walk(rng, 64, 15, temperature=temperature)
    path, probs = walk.run()
    cuda_path, cuda_probs = walk.to("cuda").run()
    assert torch.equal(cuda_path.cpu(), path)
    torch.testing.assert_close(cuda_probs.cpu(), probs, rtol=1e-5, atol=1e-7)


def test_float32_on_cpu(rng: torch.Generator) -> None:
    walk = make_walk(rng, 3, 7, dtype=torch.float32, temperature=True)
    path, probs = walk.run()
    want_path, want_probs = reference.select_path(*walk.args())
    assert torch.equal(path, want_path)
    torch.testing.assert_close(probs, want_probs, rtol=1e-4, atol=1e-5)


def test_draws_follow_the_softmax(device: str, rng: torch.Generator) -> None:
    """Over an even grid of uniforms each candidate is drawn as often as its probability says, to one draw."""
    count = 4096
    one = make_walk(rng, 1, 1, temperature=True)
    walk = Walk(*(t if t is None or t.shape[0] != 1 else t.expand(count, *t.shape[1:]) for t in one.args()))
    walk.temperature = torch.full((count,), 3.0)
    walk.uniforms = ((torch.arange(count) + 0.5) / count)[:, None]
    walk = walk.to(device)
    path, probs = walk.run()
    assert torch.equal(probs[0].expand_as(probs), probs)
    torch.testing.assert_close(probs[0, 0], torch.softmax(walk.scores(path)[0, 0] / 3.0, -1), rtol=5e-3, atol=1e-6)
    drawn = (walk.candidate_ids == path[..., None]).float().sum((0, 1))
    assert (drawn - probs[0, 0] * count).abs().max() <= 1.01


def test_uniform_near_one_takes_a_token_with_mass(device: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 8, 7, temperature=True).to(device)
    walk.temperature = torch.full((8,), 1e-9, device=device)  # counts as 1e-5: all mass on the best
    walk.uniforms = torch.full((8, 7), 1 - 2**-24, device=device)
    path, probs = walk.run()
    greedy = Walk(*walk.args()[:6]).run()
    assert torch.equal(path, greedy[0])
    assert torch.equal(probs, greedy[1])


def test_no_temperature_is_temperature_zero(device: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 5, 7).to(device)
    cold = Walk(*walk.args()[:6], torch.zeros(5, device=device), torch.rand(5, 7, device=device))
    for got, want in zip(cold.run(), walk.run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_without_a_softmax_take_the_argmax(temperature: float, device: str, rng: torch.Generator) -> None:
    """NaN: the first one wins, as in torch.argmax; q is the point mass, never NaN."""
    walk = make_walk(rng, 4, 7, exact=True).to(device)
    nan, inf = float("nan"), float("inf")
    walk.base_logits[0, 2, 9] = nan
    walk.base_logits[0, 2, 4] = nan
    walk.base_logits[1, 3, 11] = inf
    walk.base_logits[2, 1, :] = -inf
    walk.base_logits[3, 5, 3] = -inf  # an ordinary probability of 0
    walk.temperature = torch.full((4,), temperature, device=device)
    walk.uniforms = torch.rand(4, 7, generator=rng).to(device)
    path, probs = walk.run()
    want_path, want_probs = reference.select_path(*walk.args())
    assert torch.equal(path, want_path)
    torch.testing.assert_close(probs, want_probs, rtol=1e-5, atol=1e-6)
    for request, slot, candidate in ((0, 2, 4), (1, 3, 11), (2, 1, 0)):
        assert path[request, slot] == walk.candidate_ids[request, slot, candidate]
        assert probs[request, slot].sum() == probs[request, slot, candidate] == 1
    assert probs[3, 5, 3] == 0


def test_requests_do_not_see_each_other(device: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 33, 7, temperature=True).to(device)
    order = torch.randperm(33, generator=rng).to(device)
    path, probs = walk.run()
    moved = walk.map(lambda tensor: tensor[order] if tensor.shape[0] == 33 else tensor)
    for got, want in zip(moved.run(), (path[order], probs[order]), strict=True):
        assert torch.equal(got, want)


def test_slices_of_a_block(device: str, rng: torch.Generator) -> None:
    """Candidates and hidden rows as they come from a head over all T rows: slots are rows 1..T-1."""
    walk = make_walk(rng, 3, 8).to(device)
    sliced = Walk(
        walk.candidate_ids[:, 1:],
        walk.base_logits[:, 1:],
        walk.hidden[:, 1:],
        walk.candidate_ids[:, 0, 0],
        *walk.args()[4:6],
    )
    packed = sliced.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    assert not sliced.hidden.is_contiguous()
    for got, want in zip(sliced.run(), packed.run(), strict=True):
        assert torch.equal(got, want)


def test_probs_are_the_draft_distribution_of_the_path(device: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 9, 7, temperature=True).to(device)
    path, probs = walk.run()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]), rtol=1e-5, atol=0)
    assert (probs[walk.candidate_ids == path[..., None]] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("debug", ["0", "1"])
def test_walk_in_a_graph(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, debug: str) -> None:
    """A replay on new values equals the eager call on them; under DFLASH_DEBUG=1 a capture goes without the checks."""
    monkeypatch.setenv("DFLASH_DEBUG", debug)
    walk = make_walk(rng, 4, 7, temperature=True).to("cuda")
    out = walk.outputs()
    ops.select_path(*walk.args(), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.select_path(*walk.args(), out=out)
    fresh = make_walk(rng, 4, 7, temperature=True).to("cuda")
    for captured, new in zip(walk.args(), fresh.args(), strict=True):
        captured.copy_(new)
    graph.replay()
    for got, want in zip(out, fresh.run(), strict=True):
        assert torch.equal(got, want)


def test_walk_opcheck(device: str, rng: torch.Generator) -> None:
    for temperature in (False, True):
        walk = make_walk(rng, 2, 3, 4, 16, 50, temperature=temperature).to(device)
        torch.library.opcheck(torch.ops.dflash.select_path.default, walk.args())
        path, probs = walk.outputs()
        torch.library.opcheck(
            torch.ops.dflash.select_path.out, walk.args(), {"path_ids": path, "draft_probs": torch.zeros_like(probs)}
        )


BAD_WALKS = [
    ("candidate_ids", lambda t: t[0], r"candidate_ids must have shape \[\*, \*, \*\], got \[3, 4\]"),
    ("candidate_ids", lambda t: t.float(), "candidate_ids must have dtype int32 or int64, got float32"),
    ("candidate_ids", lambda t: t[..., :3], r"base_logits must have shape \[2, 3, 3\], got \[2, 3, 4\]"),
    ("candidate_ids", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2].repeat(1, 1, 2)[..., :3],
     r"base_logits must have shape"),
    ("base_logits", lambda t: t.double(), "base_logits must have dtype float32, got float64"),
    ("hidden", lambda t: t[..., :8], r"hidden must have shape \[2, 3, 16\], got \[2, 3, 8\]"),
    ("hidden", lambda t: t.half(), "hidden must have dtype bfloat16"),
    ("anchor_ids", lambda t: t[:1], r"anchor_ids must have shape \[2\], got \[1\]"),
    ("predecessor_codebook", lambda t: t[:, :12].contiguous(), "predecessor_codebook must have a rank .* got 12"),
    ("predecessor_codebook", lambda t: t.half(), "predecessor_codebook must have dtype bfloat16, got float16"),
    ("successor_codebook", lambda t: t[:-1], r"successor_codebook must have shape \[50, 16\], got \[49, 16\]"),
    ("successor_codebook", lambda t: t.t().contiguous().t(), "successor_codebook must be contiguous"),
    ("temperature", lambda t: None, "uniforms must be given iff temperature is, got uniforms only"),
    ("uniforms", lambda t: None, "uniforms must be given iff temperature is, got temperature only"),
    ("uniforms", lambda t: t[:, :2], r"uniforms must have shape \[2, 3\], got \[2, 2\]"),
    ("temperature", lambda t: t.double(), "temperature must have dtype float32, got float64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_WALKS, ids=[f"{i}-{c[0]}" for i, c in enumerate(BAD_WALKS)])
def test_walk_names_the_wrong_argument(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    device: str,
    rng: torch.Generator,
) -> None:
    walk = make_walk(rng, 2, 3, 4, 16, 50, temperature=True).to(device)
    out = walk.outputs()
    setattr(walk, name, change(getattr(walk, name)))
    with pytest.raises(ValueError, match="^dflash::select_path: " + message):
        ops.select_path(*walk.args(), out=out)
    assert (out[0] == -7).all() and out[1].isnan().all()


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: t.int(), "path_ids must have dtype int64, got int32"),
        (0, lambda t: t[:, :2], r"path_ids must have shape \[2, 3\], got \[2, 2\]"),
        (1, lambda t: t.double(), "draft_probs must have dtype float32, got float64"),
        (1, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "draft_probs must be contiguous"),
    ],
)
def test_walk_names_the_wrong_output(
    which: int, change: Callable[[torch.Tensor], torch.Tensor], message: str, device: str, rng: torch.Generator
) -> None:
    walk = make_walk(rng, 2, 3, 4, 16, 50).to(device)
    out = list(walk.outputs())
    out[which] = change(out[which])
    with pytest.raises(ValueError, match="^dflash::select_path: " + message):
        ops.select_path(*walk.args(), out=(out[0], out[1]))


@pytest.mark.parametrize(("slots", "top_k", "message"), [(33, 4, "at most 32 slots, got 33"), (2, 33, "got 33")])
def test_walk_limits(slots: int, top_k: int, message: str, device: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 1, slots, top_k, 8, 50).to(device)
    with pytest.raises(ValueError, match="^dflash::select_path: candidate_ids must have .*" + message):
        ops.select_path(*walk.args())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [field.name for field in fields(Walk) if field.name != "candidate_ids"])
def test_walk_on_mixed_devices(name: str, rng: torch.Generator) -> None:
    walk = make_walk(rng, 2, 3, 4, 16, 50, temperature=True).to("cuda")
    setattr(walk, name, getattr(walk, name).cpu())
    with pytest.raises(ValueError, match=f"^dflash::select_path: {name} must be on cuda:0, got cpu"):
        walk.run()


@pytest.mark.gpu
def test_walk_refuses_unaligned_hidden(rng: torch.Generator) -> None:
    walk = make_walk(rng, 2, 3, 4, 16, 50).to("cuda")
    storage = torch.zeros(2 * 3 * 16 + 1, dtype=torch.bfloat16, device="cuda")
    walk.hidden = storage[1:].view(2, 3, 16)
    with pytest.raises(ValueError, match="hidden must start at a multiple of 16 bytes, got 2"):
        ops.select_path(*walk.args())


BAD_VALUES = [
    ("candidate_ids", 50, r"candidate_ids must hold ids in \[0, 50\), got another value in request 1"),
    ("candidate_ids", -1, r"candidate_ids must hold ids in \[0, 50\)"),
    ("anchor_ids", 50, r"anchor_ids must hold ids in \[0, 50\)"),
    ("temperature", -1.0, "temperature must be at least 0"),
    ("temperature", float("nan"), "temperature must be at least 0"),
    ("uniforms", 1.0, r"uniforms must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_walk_checks_values(
    name: str, value: float, message: str, device: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU always, on CUDA under DFLASH_DEBUG=1; without it a CUDA call runs through."""
    walk = make_walk(rng, 3, 3, 4, 16, 50, temperature=True).to(device)
    getattr(walk, name)[1].fill_(value)
    if device == "cuda":
        monkeypatch.delenv("DFLASH_DEBUG", raising=False)
        path, probs = walk.run()
        assert (path[1] != -7).all() and not probs.isnan().any()
        monkeypatch.setenv("DFLASH_DEBUG", "1")
    out = walk.outputs()
    with pytest.raises(ValueError, match="^dflash::select_path: " + message):
        ops.select_path(*walk.args(), out=out)
    assert (out[0] == -7).all() and out[1].isnan().all()


def test_debug_passes_good_values(device: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = make_walk(rng, 3, 3, 4, 16, 50, temperature=True).to(device)
    want = walk.run()
    monkeypatch.setenv("DFLASH_DEBUG", "1")
    for got, expected in zip(walk.run(), want, strict=True):
        assert torch.equal(got, expected)


def test_walk_equals_the_published_selector(rng: torch.Generator) -> None:
    """Greedy and in float32, against the method's published code."""
    published = pytest.importorskip("dflash.model", reason="the published model code is not installed")
    sizes = {"selector_rank": 16, "selector_top_k": 4}
    selector = published.CandidateSelector(SimpleNamespace(vocab_size=50, hidden_size=24, dflash_config=sizes))
    hidden, logits = torch.randn(5, 7, 24, generator=rng), torch.randn(5, 7, 50, generator=rng)
    anchors = torch.randint(0, 50, (5,), generator=rng)
    with torch.no_grad():
        want, _, _ = selector.select(hidden, logits, anchors, temperature=0.0)
        base_logits, ids = logits.topk(4)
        tables = selector.predecessor_codebook.weight, selector.successor_codebook.weight
        path, _ = ops.select_path(ids, base_logits, selector.hidden_projection(hidden), anchors, *tables)
    assert torch.equal(path, want)


# --------------------------------------------------------------------------------------------------- grouped_conv


def make_conv(
    rng: torch.Generator,
    batch: int,
    block_size: int,
    hidden_size: int,
    *,
    taps: int = 2,
    group_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """x, delta, base, block_size on the CPU; delta is one side of a projection's output, so it is strided."""
    rows = batch * block_size
    x = torch.randn(rows, hidden_size, generator=rng).to(dtype)
    coefficients = torch.randn(rows, 2, taps, hidden_size // group_size, generator=rng).to(dtype)
    base = torch.randn(2, taps, hidden_size, generator=rng).to(dtype)
    return x, coefficients[:, 1], base[1], block_size


def run_conv(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int) -> torch.Tensor:
    out = torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)
    return ops.grouped_conv(x, delta, base, block_size, out=out)


def on(device: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> tuple:
    return tuple(on_device(value, device) if isinstance(value, torch.Tensor) else value for value in case)


@pytest.mark.parametrize(
    ("batch", "block_size", "hidden_size"),
    [(0, 8, 576), (1, 8, 5120), (1, 7, 2880), (3, 16, 4096), (3, 10, 576), (64, 8, 576), (64, 7, 2880), (256, 8, 576)],
)
def test_conv_equals_reference(
    batch: int, block_size: int, hidden_size: int, device: str, rng: torch.Generator
) -> None:
    """Bit for bit: the order of the operations and the one rounding are part of the contract."""
    case = on(device, make_conv(rng, batch, block_size, hidden_size))
    assert torch.equal(run_conv(*case), reference.grouped_conv(*case))


@pytest.mark.parametrize("taps", [1, 2, 3, 9])
@pytest.mark.parametrize("group_size", [1, 4, 8, 16, 24])
def test_conv_other_taps_and_groups(taps: int, group_size: int, device: str, rng: torch.Generator) -> None:
    case = on(device, make_conv(rng, 5, 7, 240, taps=taps, group_size=group_size))
    assert torch.equal(run_conv(*case), reference.grouped_conv(*case))


@pytest.mark.parametrize("taps", [2, 3])
def test_conv_in_float32_on_cpu(taps: int, rng: torch.Generator) -> None:
    case = make_conv(rng, 3, 7, 96, taps=taps, dtype=torch.float32)
    assert torch.equal(run_conv(*case), reference.grouped_conv(*case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conv_numerics(dtype: torch.dtype, device: str, rng: torch.Generator) -> None:
    """Against float64, no further than twice what the float32 formula in this dtype is."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("bfloat16 only on CUDA")
    x, delta, base, block_size = on(device, make_conv(rng, 3, 8, 576, dtype=dtype))
    exact = reference.grouped_conv(x.double(), delta.double(), base.double(), block_size)
    rounded = reference.grouped_conv(x, delta, base, block_size)
    error = (run_conv(x, delta, base, block_size).double() - exact).abs().max()
    assert error <= 2 * (rounded.double() - exact).abs().max()


def test_conv_with_the_initial_kernel_is_the_identity(device: str, rng: torch.Generator) -> None:
    """base 1 at tap 0, 0 elsewhere, delta 0: what a drafter starts training from."""
    x, delta, base, block_size = on(device, make_conv(rng, 4, 8, 576))
    base = torch.zeros_like(base)
    base[0] = 1
    assert torch.equal(run_conv(x, torch.zeros_like(delta), base, block_size), x)


def test_conv_looks_back_inside_its_block_only(device: str, rng: torch.Generator) -> None:
    x, delta, base, block_size = on(device, make_conv(rng, 4, 8, 576))
    before = run_conv(x, delta, base, block_size)
    for row in (8, 12, 15):
        changed = x.clone()
        changed[row] += 1
        moved = (run_conv(changed, delta, base, block_size) != before).any(-1).nonzero().flatten().tolist()
        assert moved == ([row, row + 1] if row % block_size < block_size - 1 else [row])


def test_conv_spreads_nan_and_inf_like_the_formula(device: str, rng: torch.Generator) -> None:
    """An infinite coefficient times the 0 before a block is NaN, as in the formula."""
    x, delta, base, block_size = on(device, make_conv(rng, 2, 8, 64))
    x[3, 5] = float("nan")
    x[9, 0] = float("inf")
    delta[0, 1, 0] = float("inf")
    got, want = run_conv(x, delta, base, block_size), reference.grouped_conv(x, delta, base, block_size)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_conv_strided_and_unaligned(device: str, rng: torch.Generator) -> None:
    """x as a slice of a wider buffer: rows 16-byte aligned, and not."""
    x, delta, base, block_size = on(device, make_conv(rng, 3, 7, 96))
    want = run_conv(x, delta, base, block_size)
    for width, first in ((160, 64), (101, 3)):
        wide = torch.zeros(x.shape[0], width, dtype=x.dtype, device=device)
        wide[:, first : first + 96] = x
        assert torch.equal(run_conv(wide[:, first : first + 96], delta, base, block_size), want)


def test_conv_functional_equals_out(device: str, rng: torch.Generator) -> None:
    case = on(device, make_conv(rng, 3, 8, 96))
    assert torch.equal(ops.grouped_conv(*case), run_conv(*case))


def test_conv_equals_the_published_layer(rng: torch.Generator) -> None:
    """Both sides of a layer, in float32, against the method's published code."""
    published = pytest.importorskip("dflash.model", reason="the published model code is not installed")
    layer = published.GroupedDynamicCausalConv(96, 2, 16)
    torch.nn.init.normal_(layer.base_kernel, generator=rng)
    x = torch.randn(3, 8, 96, generator=rng)
    with torch.no_grad():
        want, kernel = layer.prepare(x)
        want = layer.finish(want, kernel)
        rows = x.flatten(0, 1)
        coefficients = layer.kernel_projection(rows).view(24, 2, 2, 6)
        got = ops.grouped_conv(rows, coefficients[:, 0], layer.base_kernel[0], 8)
        got = ops.grouped_conv(got, coefficients[:, 1], layer.base_kernel[1], 8)
    torch.testing.assert_close(got.view(3, 8, 96), want)


@pytest.mark.gpu
def test_conv_in_a_graph(rng: torch.Generator) -> None:
    case = on("cuda", make_conv(rng, 3, 8, 576))
    out = torch.empty_like(case[0])
    ops.grouped_conv(*case, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.grouped_conv(*case, out=out)
    fresh = on("cuda", make_conv(rng, 3, 8, 576))
    for captured, new in zip(case[:3], fresh[:3], strict=True):
        captured.copy_(new)
    graph.replay()
    assert torch.equal(out, run_conv(*fresh))


def test_conv_opcheck(device: str, rng: torch.Generator) -> None:
    case = on(device, make_conv(rng, 2, 3, 32))
    torch.library.opcheck(torch.ops.dflash.grouped_conv.default, case)
    torch.library.opcheck(torch.ops.dflash.grouped_conv.out, case, {"out": torch.zeros_like(case[0])})


BAD_CONVS = [
    (0, lambda t: t[0], r"x must have shape \[\*, \*\], got \[32\]"),
    (0, lambda t: t.half(), "x must have dtype bfloat16"),
    (0, lambda t: t.t().contiguous().t(), "x must have a contiguous last dimension, got stride 6"),
    (1, lambda t: t[:5], r"delta must have shape \[6, \*, \*\], got \[5, 2, 2\]"),
    (1, lambda t: t[:, :0], "delta must have at least 1 tap, got 0"),
    (1, lambda t: t.repeat(1, 1, 3)[..., :5], r"delta must have a number of groups that divides H \(32\), got 5"),
    (1, lambda t: t.float(), "delta must have dtype bfloat16, got float32"),
    (2, lambda t: t[:1], r"base must have shape \[2, 32\], got \[1, 32\]"),
    (2, lambda t: t.t().contiguous().t(), "base must be contiguous"),
    (3, lambda t: 0, "block_size must be at least 1, got 0"),
    (3, lambda t: 4, "x must have a multiple of 4 rows, got 6"),
]


@pytest.mark.parametrize(("which", "change", "message"), BAD_CONVS, ids=range(len(BAD_CONVS)))
def test_conv_names_the_wrong_argument(
    which: int, change: Callable, message: str, device: str, rng: torch.Generator
) -> None:
    case = list(on(device, make_conv(rng, 2, 3, 32)))
    out = torch.full_like(case[0], -7)
    case[which] = change(case[which])
    with pytest.raises(ValueError, match="^dflash::grouped_conv: " + message):
        ops.grouped_conv(*case, out=out)
    assert (out == -7).all()


def test_conv_refuses_to_write_over_its_input(device: str, rng: torch.Generator) -> None:
    x, delta, base, block_size = on(device, make_conv(rng, 2, 3, 32))
    with pytest.raises(ValueError, match="^dflash::grouped_conv: out must not share memory .* got memory of x"):
        ops.grouped_conv(x, delta, base, block_size, out=x)


@pytest.mark.gpu
def test_conv_float32_on_cuda_is_named(rng: torch.Generator) -> None:
    case = on("cuda", make_conv(rng, 2, 3, 32, dtype=torch.float32))
    with pytest.raises(ValueError, match="^dflash::grouped_conv: x must have dtype bfloat16, got float32"):
        ops.grouped_conv(*case)
    with pytest.raises(ValueError, match="^dflash::grouped_conv: delta must be on "):
        ops.grouped_conv(*on("cuda", (case[0].bfloat16(),)), case[1].bfloat16().cpu(), case[2].bfloat16(), 3)
