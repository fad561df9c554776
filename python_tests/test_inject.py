"""inject_kv against its oracle, and the properties that make it safe to call on half-committed blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import on_device

from dflash_kernels.ops import (
    InjectPlan,
    inject_kv,
    inject_kv_fuse,
    inject_kv_plan,
    inject_kv_project,
    inject_kv_sharded,
    inject_kv_workspace,
)
from dflash_kernels.reference.inject import context_kv, live_rows

POISON = -7.0


@dataclass
class Inputs:
    taps: list[torch.Tensor]
    fc_weight: torch.Tensor
    hidden_norm: torch.Tensor
    kv_weight: torch.Tensor
    kv_bias: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    commit_lens: torch.Tensor | None
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    workspace: torch.Tensor
    eps: float = 1e-6
    tap_norm: torch.Tensor | None = None
    value_scale: float = 1.0
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    plan: InjectPlan | None = None

    def with_plan(self, blocks: int | None = None) -> Inputs:
        """Few rows read the plan's copy of the weights: the tensors that it was made of may hold anything."""
        plan = inject_kv_plan(self.fc_weight, self.kv_weight, self.k_caches[0].shape[2], blocks)
        assert plan is not None
        return replace(self, plan=plan)

    def run(self) -> None:
        inject_kv(**vars(self))

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return context_kv(
            self.taps, self.fc_weight, self.hidden_norm, self.kv_weight, self.kv_bias, self.k_norm, self.cos_sin,
            self.positions, self.k_caches[0].shape[2], self.eps, dtype, self.tap_norm, self.value_scale,
        )  # fmt: skip

    @property
    def is_fp8(self) -> bool:
        return self.k_caches[0].dtype == torch.float8_e4m3fn

    def caches(self) -> torch.Tensor:
        """All caches, [2, L, S, Hkv, D]; e4m3 as uint8."""
        views = [c.view(torch.uint8) if self.is_fp8 else c for c in self.k_caches + self.v_caches]
        return torch.stack(views).unflatten(0, (2, -1))


def rope_table(positions: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make(
    rng: torch.Generator,
    device: str,
    batch: int = 3,
    block: int = 8,
    hidden: int = 64,
    num_taps: int = 3,
    layers: int = 2,
    heads: int = 2,
    dim: int = 32,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    index: torch.dtype = torch.int64,
    bias: bool = True,
    norm: bool = True,
    sliced: bool = True,
    commit: list[int] | None = None,
    tap_norm: bool = False,
    value_scale: float = 1.0,
    fp8: str = "",
) -> Inputs:
    """`fp8`: "" (caches of `dtype`), "codes" (e4m3 without scales) or "scales"."""
    rows = batch * block
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale + shift).to(dtype).to(device)

    together = draw(rows, num_taps * hidden)
    taps = [together[:, i * hidden : (i + 1) * hidden] for i in range(num_taps)]
    pool = 2 * rows + 3
    return Inputs(
        taps=taps if sliced else [tap.contiguous() for tap in taps],
        fc_weight=draw(hidden, num_taps * hidden, scale=(num_taps * hidden) ** -0.5),
        hidden_norm=draw(hidden, scale=0.1, shift=1.0),
        kv_weight=draw(layers, 2 * heads * dim, hidden, scale=hidden**-0.5),
        kv_bias=draw(layers, 2 * heads * dim, scale=0.2) if bias else None,
        k_norm=draw(layers, dim, scale=0.1, shift=1.0) if norm else None,
        cos_sin=rope_table(64, rotary_dim or dim).to(device),
        positions=torch.randint(0, 64, (rows,), generator=rng).to(index).to(device),
        slots=torch.randperm(pool, generator=rng)[:rows].to(index).to(device),
        commit_lens=None if commit is None else torch.tensor(commit, dtype=index, device=device),
        k_caches=[torch.full((pool, heads, dim), POISON, dtype=cache_dtype, device=device) for _ in range(layers)],
        v_caches=[torch.full((pool, heads, dim), POISON, dtype=cache_dtype, device=device) for _ in range(layers)],
        workspace=inject_kv_workspace(rows, hidden, layers, heads, dim, dtype, device, num_taps=num_taps),
        tap_norm=draw(num_taps, hidden, scale=0.1, shift=1.0) if tap_norm else None,
        value_scale=value_scale,
        k_scale=(torch.rand(layers, generator=rng) * 0.1 + 0.02).to(device) if fp8 == "scales" else None,
        v_scale=(torch.rand(layers, generator=rng) * 0.1 + 0.001).to(device) if fp8 == "scales" else None,
    )


def check_against_reference(inputs: Inputs) -> None:
    """Live rows within the rounding of the weights' dtype, every other slot bit-identical."""
    before = inputs.caches()
    inputs.run()
    after = inputs.caches()
    rows = live_rows(len(inputs.slots), inputs.commit_lens)
    slots = inputs.slots[rows].long()
    for out, exact, rounded, scale in zip(
        after,
        inputs.reference(torch.float32),
        inputs.reference(inputs.fc_weight.dtype),
        (inputs.k_scale, inputs.v_scale),
        strict=True,
    ):
        written, exact, rounded = out[:, slots], exact[:, rows], rounded[:, rows].float()
        if rows and inputs.is_fp8:
            check_codes(written, exact, (rounded - exact).abs().max(), scale)
        elif rows:
            written = written.float()
            one_rounding = exact.abs().max() * 2.0**-8 if out.dtype == torch.bfloat16 else 1e-5
            # Of a few elements the greatest error is chance: another of the chain's roundings may fall badly.
            roundings = 1 if exact.numel() > 64 else 2
            allowed = 2 * (rounded - exact).abs().max() + roundings * one_rounding
            assert (written - exact).abs().max() <= allowed
    untouched = torch.ones(after.shape[2], dtype=torch.bool, device=slots.device)
    untouched[slots] = False
    assert torch.equal(after[:, :, untouched], before[:, :, untouched])


def check_codes(codes: torch.Tensor, exact: torch.Tensor, error: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Codes [L, N, Hkv, D] stand for exact / scale within e4m3's rounding, saturated, and for no NaN."""
    factor = 1.0 if scale is None else 1.0 / scale[:, None, None, None]
    wanted = exact * factor
    values = codes.view(torch.float8_e4m3fn).float()
    allowed = wanted.abs() * 2.0**-4 + 2.0**-10 + (2 * error + exact.abs() * 2.0**-8) * factor * 1.07
    assert ((values - wanted.clamp(-448, 448)).abs() <= allowed).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rotary_dim": 16},
        {"bias": False, "norm": False, "sliced": False},
        {"batch": 1, "block": 1, "num_taps": 1, "layers": 1, "heads": 1, "dim": 2, "hidden": 8},
        {"batch": 5, "block": 7, "hidden": 72, "num_taps": 5, "heads": 3, "dim": 18, "rotary_dim": 6, "layers": 3},
        {"batch": 5, "block": 16, "hidden": 576, "num_taps": 5, "layers": 5, "heads": 3, "dim": 64},
        {"batch": 1, "block": 16, "hidden": 256, "heads": 1, "dim": 256, "num_taps": 8},
        {"batch": 3, "block": 10, "hidden": 2880, "num_taps": 2, "layers": 1, "heads": 1, "dim": 64},
        {"batch": 1, "block": 7, "hidden": 4096, "num_taps": 1, "layers": 1, "heads": 2, "dim": 128},
        {"batch": 9, "block": 8, "dim": 64, "heads": 3},  # gathered with commit lengths, as all of more than 64 rows
        {"batch": 14, "block": 7, "dim": 128, "heads": 1, "norm": False, "sliced": False},
        {"batch": 70, "block": 1, "dim": 256, "heads": 1, "bias": False, "num_taps": 1},
        {"batch": 5, "block": 16, "dim": 128, "rotary_dim": 64, "hidden": 40, "num_taps": 2},
    ],
)
def test_matches_reference(device: str, rng: torch.Generator, shape: dict[str, int], index: torch.dtype) -> None:
    inputs = make(rng, device, index=index, **shape)
    check_against_reference(inputs)
    batch, block = shape.get("batch", 3), shape.get("block", 8)
    commit = torch.randint(0, block + 1, (batch,), generator=rng).tolist()
    check_against_reference(make(rng, device, index=index, commit=commit, **shape))


OPTIONS = [
    {"tap_norm": True},
    {"value_scale": 0.625},
    {"fp8": "codes"},
    {"fp8": "scales", "value_scale": -3.0},
    {"fp8": "scales", "tap_norm": True, "bias": False, "norm": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch": 11, "dim": 64},
        {"batch": 11, "block": 7, "dim": 128, "heads": 1, "hidden": 136},
        {"batch": 9, "block": 8, "dim": 18, "rotary_dim": 6, "hidden": 72, "heads": 3},
        {"batch": 2, "block": 3, "dim": 256, "heads": 1, "num_taps": 1},
    ],
    ids=str,
)
def test_options_match_reference(
    device: str, rng: torch.Generator, shape: dict[str, int], options: dict[str, object]
) -> None:
    batch, block = shape.get("batch", 3), shape.get("block", 8)
    for commit in (None, torch.randint(0, block + 1, (batch,), generator=rng).tolist()):
        check_against_reference(make(rng, device, commit=commit, **shape, **options))


def test_options_pass_a_plan_by(device: str, rng: torch.Generator) -> None:
    """The packed weights are not read: they may hold anything."""
    for options in OPTIONS:
        inputs = make(rng, device, commit=[3, 8, 0], **options).with_plan(2)
        inputs.plan.tiles.fill_(float("nan"))
        check_against_reference(inputs)


def test_codes_of_every_bf16_value(device: str, rng: torch.Generator) -> None:
    """V is copied here, so that its code is known: to the nearest, ties to even, saturating; as uint8 too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    values = values[values.abs() <= 1000.0]
    values = values[: len(values) // 64 * 64].view(-1, 64)
    inputs = make(
        rng, device, batch=len(values), block=1, num_taps=1, layers=1, heads=1, dim=64, hidden=64, bias=False,
        norm=False, fp8="codes",
    )  # fmt: skip
    inputs.v_scale = torch.tensor([2.0], device=device)
    eye = torch.eye(64, dtype=torch.bfloat16, device=device)
    inputs.fc_weight, inputs.kv_weight = eye, torch.cat([eye, eye])[None]
    inputs.taps = [values.bfloat16().to(device)]
    # x = w(f * scale * hidden_norm): with an eps that outweighs the squares, scale is 2^-20 exactly.
    inputs.eps, inputs.hidden_norm = 2.0**40, torch.full((64,), 2.0**20, dtype=torch.bfloat16, device=device)
    caches = inputs.v_caches
    inputs.k_caches = [c.view(torch.uint8) for c in inputs.k_caches]
    inputs.v_caches = [c.view(torch.uint8) for c in inputs.v_caches]
    inputs.run()
    expected = (values / 2).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    written = caches[0][inputs.slots.long().to(device), 0].float().cpu()
    assert torch.equal(written, expected)


# ---- fc sharded by output rows --------------------------------------------------------------------------------------


def run_sharded(inputs: Inputs, ranks: int, kv_ranks: int) -> list[torch.Tensor]:
    """Every rank's call after the other: R = `ranks` shards of fc, `kv_ranks` of the KV heads. Their `fused`."""
    rows, hidden = len(inputs.slots), inputs.fc_weight.shape[0]
    layers, heads, dim = len(inputs.k_caches), inputs.k_caches[0].shape[1], inputs.k_caches[0].shape[2]
    width, per_rank = hidden // ranks, heads // kv_ranks
    parts = [inputs.fc_weight.new_full((rows, width), float("nan")) for _ in range(ranks)]
    for rank in range(ranks):
        inject_kv_fuse(
            inputs.taps, inputs.fc_weight[rank * width : (rank + 1) * width].contiguous(), inputs.commit_lens,
            parts[rank], inputs.workspace, inputs.eps, inputs.tap_norm,
        )  # fmt: skip
    whole = torch.stack(parts)
    weight = inputs.kv_weight.view(layers, 2, heads, dim, hidden)
    bias = None if inputs.kv_bias is None else inputs.kv_bias.view(layers, 2, heads, dim)
    for rank in range(kv_ranks):
        mine = slice(rank * per_rank, (rank + 1) * per_rank)

        def gather(fused: torch.Tensor, rank: int = rank) -> torch.Tensor:
            assert torch.equal(fused.isnan(), parts[rank % ranks].isnan())
            return whole

        share = weight[:, :, mine].reshape(layers, 2 * per_rank * dim, hidden).contiguous()
        inject_kv_sharded(
            inputs.taps, inputs.fc_weight[rank % ranks * width :][:width].contiguous(), inputs.hidden_norm, share,
            None if bias is None else bias[:, :, mine].reshape(layers, -1).contiguous(), inputs.k_norm,
            inputs.cos_sin, inputs.positions, inputs.slots, inputs.commit_lens,
            [c[:, mine] for c in inputs.k_caches], [c[:, mine] for c in inputs.v_caches], inputs.workspace, inputs.eps,
            torch.full_like(parts[0], float("nan")), gather, inputs.tap_norm, inputs.value_scale, inputs.k_scale,
            inputs.v_scale,
        )  # fmt: skip
    return parts


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden": 128, "heads": 4},
        {"batch": 11, "hidden": 64, "heads": 8, "dim": 64, "layers": 1},
        {"batch": 12, "hidden": 192, "heads": 2, "dim": 64, "tap_norm": True, "fp8": "scales", "value_scale": 2.0},
    ],
    ids=str,
)
def test_shards_equal_the_whole(device: str, rng: torch.Generator, ranks: int, shape: dict[str, int]) -> None:
    batch = shape.get("batch", 3)
    for commit in (None, torch.randint(0, 9, (batch,), generator=rng).tolist(), [0] * batch):
        inputs = make(rng, device, commit=commit, **shape)
        dead = torch.ones(batch * 8, dtype=torch.bool, device=device)
        dead[live_rows(batch * 8, inputs.commit_lens)] = False
        fused: list[torch.Tensor] = []
        sharded = ShardedInputs(**vars(inputs), ranks=ranks, kv_ranks=min(ranks, shape["heads"]), fused=fused)
        check_against_reference(sharded)
        for part in fused:
            assert part[dead].isnan().all() and not part[~dead].isnan().any()


@dataclass
class ShardedInputs(Inputs):
    ranks: int = 1
    kv_ranks: int = 1
    fused: list[torch.Tensor] | None = None

    def run(self) -> None:
        self.workspace.fill_(float("nan"))
        self.fused += run_sharded(self, self.ranks, self.kv_ranks)


@pytest.mark.parametrize(("batch", "commit"), [(3, [2, 8, 5]), (9, [8] * 9)])
def test_sharded_opcheck(device: str, rng: torch.Generator, batch: int, commit: list[int]) -> None:
    i = make(rng, device, batch=batch, commit=commit)
    fused = torch.zeros(len(i.slots), 32, dtype=torch.bfloat16, device=device)
    halves = torch.zeros(2, len(i.slots), 32, dtype=torch.bfloat16, device=device)
    ops = torch.ops.dflash
    torch.library.opcheck(
        ops.inject_kv_fuse.default,
        (i.taps, i.fc_weight[:32].contiguous(), i.commit_lens, fused, i.workspace, i.eps),
    )
    torch.library.opcheck(
        ops.inject_kv_project.default,
        (halves, i.hidden_norm, i.kv_weight, i.kv_bias, i.k_norm, i.cos_sin, i.positions, i.slots, i.commit_lens,
         i.k_caches, i.v_caches, i.workspace, i.eps),
    )  # fmt: skip


def test_sharded_no_rows(device: str, rng: torch.Generator) -> None:
    for commit in (None, []):
        inputs = make(rng, device, batch=0, commit=commit)
        run_sharded(inputs, 2, 2)
        assert (inputs.caches() == POISON).all()


def test_sharded_errors(device: str, rng: torch.Generator) -> None:
    i = make(rng, device, commit=[8, 8, 8])
    fused = torch.zeros(24, 32, dtype=torch.bfloat16, device=device)
    half = i.fc_weight[:32].contiguous()

    def fuse(message: str, **changes: object) -> None:
        given = {"taps": i.taps, "fc_weight": half, "commit_lens": i.commit_lens, "fused": fused,
                 "workspace": i.workspace, "eps": 1e-6, **changes}  # fmt: skip
        with pytest.raises(ValueError, match=r"^dflash::inject_kv: " + message):
            inject_kv_fuse(**given)

    fuse(r"fused must have shape \[24, 32\], got \[23, 32\]", fused=fused[1:])
    fuse(r"fc_weight must have shape \[\*, 192\], got \[32, 191\]", fc_weight=half[:, 1:])
    fuse(r"fused must have dtype bfloat16, got float32", fused=fused.float())
    fuse(r"tap_norm must have shape \[3, 64\], got \[2, 64\]", tap_norm=fused.new_zeros(2, 64))
    fuse(
        r"workspace must hold at least \d+ elements, got 8",
        workspace=i.workspace[:8],
        tap_norm=fused.new_zeros(3, 64),
    )

    def project(message: str, given: torch.Tensor, **changes: object) -> None:
        with pytest.raises(ValueError, match=r"^dflash::inject_kv: " + message):
            inject_kv_project(
                given, i.hidden_norm, i.kv_weight, i.kv_bias, i.k_norm, i.cos_sin, i.positions, i.slots, i.commit_lens,
                i.k_caches, i.v_caches, i.workspace, i.eps, **changes,
            )  # fmt: skip

    project(r"fused must have shape \[\*, \*, \*\], got \[24, 64\]", fused.new_zeros(24, 64))
    project(r"fused.size\(0\) must be in 1..8, got 16", fused.new_zeros(16, 24, 4))
    project(r"hidden_norm must have shape \[96\], got \[64\]", fused.new_zeros(3, 24, 32))
    project(r"fused must be contiguous", fused.new_zeros(24, 2, 32).transpose(0, 1))
    project(
        r"k_scale must be None with caches of the weights' dtype", fused.new_zeros(2, 24, 32), k_scale=torch.ones(2)
    )
    assert (i.caches() == POISON).all()


def test_float32_on_the_cpu(rng: torch.Generator) -> None:
    inputs = make(rng, "cpu", dtype=torch.float32, commit=[8, 0, 3])
    inputs.run()
    rows = live_rows(24, inputs.commit_lens)
    for out, exact in zip(inputs.caches(), inputs.reference(torch.float64), strict=True):
        assert torch.allclose(out[:, inputs.slots[rows]].double(), exact[:, rows], rtol=1e-4, atol=1e-5)


def test_rounding_is_exact_where_every_product_is(device: str, rng: torch.Generator) -> None:
    """fc and the projection are selections here, so the only rounding left is the documented one."""
    inputs = make(rng, device, num_taps=1, layers=1, heads=1, dim=64, hidden=64, bias=False, batch=1, block=16)
    eye = torch.eye(64, dtype=torch.bfloat16, device=device)
    inputs.fc_weight, inputs.kv_weight = eye, torch.cat([eye, eye])[None]
    inputs.run()
    x = inputs.taps[0].float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + inputs.eps) * inputs.hidden_norm.float()).bfloat16()
    slots = inputs.slots.long()
    # The order of the sum of squares is free: neighbouring bf16 values may differ, by one step.
    assert_one_step(inputs.v_caches[0][slots, 0], x)
    stored = inputs.v_caches[0][slots, 0].float()
    k = stored * torch.rsqrt(stored.square().mean(-1, keepdim=True) + inputs.eps) * inputs.k_norm[0].float()
    cos, sin = inputs.cos_sin[inputs.positions.long()].chunk(2, dim=-1)
    a, b = k.chunk(2, dim=-1)
    assert_one_step(inputs.k_caches[0][slots, 0], torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16())


def assert_one_step(out: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (out.float() - expected.float()).abs()
    assert (difference <= expected.float().abs() * 2.0**-7 + 1e-6).all()
    assert (difference > 0).float().mean() < 0.02


def test_inject_then_gather_is_the_projection(device: str, rng: torch.Generator) -> None:
    """What was written is found again through the slots, wherever those point."""
    inputs = make(rng, device)
    other = replace(
        inputs,
        slots=inputs.slots.flip(0).contiguous(),
        k_caches=[torch.zeros_like(c) for c in inputs.k_caches],
        v_caches=[torch.zeros_like(c) for c in inputs.v_caches],
    )
    inputs.run()
    other.run()
    assert torch.equal(inputs.caches()[:, :, inputs.slots.long()], other.caches()[:, :, other.slots.long()])


def test_permuting_requests_permutes_nothing_in_the_cache(device: str, rng: torch.Generator) -> None:
    """A row's K and V go to its own slot and do not depend on its neighbours."""
    inputs = make(rng, device, batch=4, commit=[3, 8, 0, 5])
    order = torch.tensor([2, 0, 3, 1], device=device)
    rows = (order[:, None] * 8 + torch.arange(8, device=device)).flatten()
    permuted = replace(
        inputs,
        taps=[tap[rows] for tap in inputs.taps],
        positions=inputs.positions[rows],
        slots=inputs.slots[rows],
        commit_lens=inputs.commit_lens[order],
        k_caches=[c.clone() for c in inputs.k_caches],
        v_caches=[c.clone() for c in inputs.v_caches],
    )
    inputs.run()
    permuted.run()
    if device == "cpu":  # torch's CPU matmul may split rows over kernels of different summation order
        assert torch.allclose(inputs.caches().float(), permuted.caches().float(), rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(inputs.caches(), permuted.caches())


def test_dead_rows_are_not_read(device: str, rng: torch.Generator) -> None:
    """NaN in their taps, and slots and positions out of every range, change nothing."""
    inputs = make(rng, device, batch=4, commit=[3, 8, 0, 1])
    clean = replace(
        inputs, k_caches=[c.clone() for c in inputs.k_caches], v_caches=[c.clone() for c in inputs.v_caches]
    )
    clean.run()
    rows = live_rows(32, inputs.commit_lens)
    dead = torch.tensor([n for n in range(32) if n not in rows], device=device)
    for tap in inputs.taps:
        tap[dead] = float("nan")
    inputs.slots[dead] = 2**31 - 1
    inputs.positions[dead] = -(2**31)
    inputs.workspace.fill_(float("nan"))
    inputs.run()
    assert torch.equal(inputs.caches(), clean.caches())


def test_no_commit_writes_nothing(device: str, rng: torch.Generator) -> None:
    inputs = make(rng, device, commit=[0, 0, 0])
    inputs.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.parametrize("commit", [None, []])
def test_no_rows(device: str, rng: torch.Generator, commit: list[int] | None) -> None:
    inputs = make(rng, device, batch=0, commit=commit)
    inputs.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("workspace_taps", [0, 3])
def test_a_small_workspace_means_chunks_not_other_results(
    device: str, rng: torch.Generator, times: int, workspace_taps: int
) -> None:
    inputs = make(rng, device, batch=9 * times, block=5, commit=[5, 0, 3, 1, 5, 5, 2, 0, 4] * times)
    chunked = replace(
        inputs,
        k_caches=[c.clone() for c in inputs.k_caches],
        v_caches=[c.clone() for c in inputs.v_caches],
        workspace=inject_kv_workspace(11, 64, 2, 2, 32, device=device, num_taps=workspace_taps),
    )
    inputs.run()
    chunked.run()
    assert torch.equal(inputs.caches(), chunked.caches())


def test_long_prefill(device: str, rng: torch.Generator) -> None:
    rows = 40000 if device == "cuda" else 3000
    inputs = make(rng, device, batch=rows, block=1, hidden=32, num_taps=2, layers=2, heads=1, dim=16)
    inputs.workspace = inject_kv_workspace(rows, 32, 2, 1, 16, device=device, max_rows=1500)
    check_against_reference(inputs)


@pytest.mark.parametrize(("batch", "block"), [(40, 16), (64, 7), (256, 10), (1100, 2), (2, 100), (2500, 3)])
def test_many_requests(device: str, rng: torch.Generator, batch: int, block: int) -> None:
    """Rows enough that CUDA gathers the live ones; more requests than one launch gathers; long blocks."""
    commit = torch.randint(0, block + 1, (batch,), generator=rng).tolist()
    inputs = make(rng, device, batch=batch, block=block, commit=commit, num_taps=2, heads=1, dim=16)
    dead = torch.ones(batch * block, dtype=torch.bool, device=device)
    dead[live_rows(batch * block, inputs.commit_lens)] = False
    clean = [tap.clone() for tap in inputs.taps]
    for tap in inputs.taps:
        tap[dead] = float("nan")
    inputs.run()
    inputs.taps = clean
    written = inputs.caches()
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(POISON)
    check_against_reference(inputs)
    assert torch.equal(inputs.caches(), written)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_caches(device: str, rng: torch.Generator, dim: int, offset: int) -> None:
    """Layers of one pool, K and V interleaved, at any element: only the last dimension has to be contiguous."""
    inputs = make(rng, device, batch=9, dim=dim, commit=[2, 8, 5, 0, 8, 8, 1, 3, 7])
    size = (inputs.k_caches[0].shape[0], 2, 2, 2, dim)
    pool = torch.full((math.prod(size) + offset,), POISON, dtype=torch.bfloat16, device=device)[offset:].view(size)
    inputs.k_caches = [pool[:, layer, 0] for layer in range(2)]
    inputs.v_caches = [pool[:, layer, 1] for layer in range(2)]
    check_against_reference(inputs)


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    inputs = make(rng, "cuda", commit=[2, 8, 5])
    inputs.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.run()
    fresh = make(rng, "cuda", commit=[8, 0, 4])
    for name in ("positions", "slots", "commit_lens"):
        getattr(inputs, name).copy_(getattr(fresh, name))
    for tap, new in zip(inputs.taps, fresh.taps, strict=True):
        tap.copy_(new)
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(POISON)
    graph.replay()
    replayed = inputs.caches()
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(POISON)
    inputs.run()
    assert torch.equal(inputs.caches(), replayed)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make(rng, device, commit=[2, 8, 5])
    for _ in range(2):
        torch.library.opcheck(torch.ops.dflash.inject_kv.default, tuple(vars(inputs).values())[:-1])
        inputs.kv_bias = inputs.k_norm = inputs.commit_lens = None


def b16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": []}, r"taps must hold 1 to 8 tensors, got 0"),
        ({"taps": [b16(24, 64)] * 9}, r"taps must hold 1 to 8 tensors, got 9"),
        ({"taps": [b16(24, 64), b16(24, 64), b16(23, 64)]}, r"taps\[2\] must have shape \[24, 64\], got \[23, 64\]"),
        ({"taps": [b16(24, 64)] * 2}, r"fc_weight must have shape \[64, 128\], got \[64, 192\]"),
        ({"taps": [torch.zeros(24, 64)] * 3}, r"taps\[0\] must have dtype bfloat16, got float32"),
        ({"taps": [b16(64, 24).T] * 3}, r"taps\[0\] must have a contiguous last dimension, got stride 24"),
        ({"fc_weight": b16(64, 192).half()}, r"fc_weight must have dtype bfloat16( or float32)?, got float16"),
        ({"hidden_norm": b16(63)}, r"hidden_norm must have shape \[64\], got \[63\]"),
        ({"kv_weight": b16(2, 127, 64)}, r"kv_weight must have shape \[2, 128, 64\], got \[2, 127, 64\]"),
        ({"kv_weight": b16(2, 64, 128).mT}, r"kv_weight must be contiguous"),
        ({"kv_bias": b16(2, 64)}, r"kv_bias must have shape \[2, 128\], got \[2, 64\]"),
        ({"k_norm": b16(2, 16)}, r"k_norm must have shape \[2, 32\], got \[2, 16\]"),
        ({"cos_sin": torch.zeros(9, 34)}, r"cos_sin.size\(1\) must be even and in 2..32, got 34"),
        ({"cos_sin": b16(9, 32)}, r"cos_sin must have dtype float32, got bfloat16"),
        ({"positions": torch.zeros(23, dtype=torch.int64)}, r"positions must have shape \[24\], got \[23\]"),
        ({"slots": torch.zeros(24)}, r"slots must have dtype int32 or int64, got float32"),
        ({"commit_lens": torch.zeros(5, dtype=torch.int32)}, r"commit_lens must have a size that divides the 24 rows"),
        ({"k_caches": []}, r"k_caches must hold 1 to 16 layers, got 0"),
        ({"k_caches": [b16(51, 2, 32)] * 17}, r"k_caches must hold 1 to 16 layers, got 17"),
        ({"v_caches": [b16(51, 2, 32)]}, r"v_caches must hold as many layers as k_caches \(2\), got 1"),
        ({"v_caches": [b16(51, 2, 32), b16(50, 2, 32)]}, r"v_caches\[1\] must have shape \[51, 2, 32\]"),
        ({"k_caches": [b16(51, 2, 31)] * 2}, r"k_caches\[0\].size\(2\) must be even and in 2..256, got 31"),
        ({"tap_norm": b16(3, 63)}, r"tap_norm must have shape \[3, 64\], got \[3, 63\]"),
        ({"v_scale": torch.ones(2)}, r"v_scale must be None with caches of the weights' dtype, got a tensor"),
        (
            {"k_caches": [torch.zeros(51, 2, 32, dtype=torch.uint8)] * 2},
            r"v_caches\[0\] must have dtype uint8, got bfloat16",
        ),
        ({"workspace": b16(100)}, r"workspace must hold at least 2568 elements, got 100"),
    ],
)
def test_errors_name_the_argument(device: str, rng: torch.Generator, changes: dict[str, object], message: str) -> None:
    def move(value: object) -> object:
        return [on_device(tensor, device) for tensor in value] if isinstance(value, list) else on_device(value, device)

    inputs = make(rng, device, commit=[8, 8, 8])
    bad = replace(inputs, **{name: move(value) for name, value in changes.items()})
    with pytest.raises(ValueError, match=r"^dflash::inject_kv: " + message):
        bad.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fc_weight", "kv_bias", "cos_sin", "positions", "slots", "commit_lens", "workspace"])
def test_mixed_devices(rng: torch.Generator, name: str) -> None:
    inputs = make(rng, "cuda", commit=[8, 8, 8])
    setattr(inputs, name, getattr(inputs, name).cpu())
    with pytest.raises(ValueError, match=r"^dflash::inject_kv: .* must be on (cuda:0, got cpu|cpu, got cuda:0)"):
        inputs.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.gpu
def test_alignment_errors(rng: torch.Generator) -> None:
    inputs = make(rng, "cuda")
    shifted = torch.zeros(24, 68, dtype=torch.bfloat16, device="cuda")
    inputs.taps[1] = shifted[:, 4:]
    with pytest.raises(ValueError, match=r"taps\[1\] must be aligned to 16 bytes, got an address 8 bytes off"):
        inputs.run()
    inputs.taps[1] = shifted[:, :64]
    with pytest.raises(ValueError, match=r"taps\[1\] must have a row stride that is a multiple of 8 elements, got 68"):
        inputs.run()


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("slots", 9, 51, r"slots must be in \[0, 51\), got another value at row 9"),
        ("slots", 8, -1, r"slots must be in \[0, 51\), got another value at row 8"),
        ("positions", 23, 64, r"positions must be in \[0, 64\), the rows of cos_sin, got another value at row 23"),
        ("positions", 0, -1, r"positions must be in \[0, 64\)"),
        ("commit_lens", 1, 9, r"commit_lens must be in 0..8, got another value at request 1"),
        ("commit_lens", 2, -1, r"commit_lens must be in 0..8, got another value at request 2"),
    ],
)
def test_values_out_of_range(
    device: str,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    row: int,
    value: int,
    message: str,
    debug: str,
) -> None:
    """The CPU always looks at the values; CUDA under DFLASH_DEBUG=1."""
    inputs = make(rng, device, commit=[8, 8, 8])
    getattr(inputs, name)[row] = value
    monkeypatch.setenv("DFLASH_DEBUG", debug)
    if device == "cuda" and debug == "0":
        pytest.skip("see the next test")
    with pytest.raises(ValueError, match=r"^dflash::inject_kv: " + message):
        inputs.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.gpu
def test_without_debug_a_bad_row_is_skipped(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_DEBUG", raising=False)
    inputs = make(rng, "cuda", commit=[8, 8, 8])
    clean = replace(
        inputs, k_caches=[c.clone() for c in inputs.k_caches], v_caches=[c.clone() for c in inputs.v_caches]
    )
    clean.commit_lens = torch.tensor([8, 8, 5], device="cuda")
    clean.run()
    inputs.slots[21], inputs.slots[22], inputs.positions[23] = 51, -1, 64
    inputs.run()
    assert torch.equal(inputs.caches(), clean.caches())


# ---- packed weights, up to 64 rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "block": 16, "hidden": 256, "dim": 128},
        {"batch": 2, "block": 16, "hidden": 136, "num_taps": 2, "dim": 64, "heads": 3, "rotary_dim": 16},
        {"batch": 4, "block": 16, "hidden": 64, "num_taps": 2, "dim": 128, "heads": 1},
        {"batch": 5, "block": 7, "hidden": 72, "num_taps": 5, "heads": 3, "dim": 18, "rotary_dim": 6, "layers": 3},
        {"batch": 1, "block": 1, "num_taps": 1, "layers": 1, "heads": 1, "dim": 2, "hidden": 8},
        {"bias": False, "norm": False, "sliced": False, "dim": 96},
    ],
)
def test_plan_matches_reference(
    device: str, rng: torch.Generator, shape: dict[str, int], blocks: int, index: torch.dtype
) -> None:
    batch, block = shape.get("batch", 3), shape.get("block", 8)
    commits = [None, *(torch.randint(0, block + 1, (batch,), generator=rng).tolist() for _ in range(2)), [0] * batch]
    for commit in commits:
        inputs = make(rng, device, index=index, commit=commit, **shape).with_plan(blocks)
        raw = inputs.fc_weight, inputs.kv_weight
        inputs.workspace.fill_(float("nan"))
        inputs.plan.workspace.fill_(255)
        for _ in range(2):  # the counters of the first call serve the second
            check_against_reference(inputs)
            for cache in inputs.k_caches + inputs.v_caches:
                cache.fill_(POISON)
        inputs.fc_weight, inputs.kv_weight = (torch.zeros_like(tensor) for tensor in raw)
        inputs.run()
        written = inputs.caches()
        inputs.fc_weight, inputs.kv_weight = raw
        for cache in inputs.k_caches + inputs.v_caches:
            cache.fill_(POISON)
        inputs.run()
        assert torch.equal(inputs.caches(), written)


@pytest.mark.parametrize("blocks", [5])
def test_plan_rows_do_not_depend_on_their_company(device: str, rng: torch.Generator, blocks: int) -> None:
    """The order of all sums is the schedule's: a request alone gives the bits that it gives among others."""
    inputs = make(rng, device, batch=4, block=16, hidden=256, commit=[7, 16, 2, 5]).with_plan(blocks)
    inputs.run()
    alone = replace(
        inputs,
        taps=[tap[:16] for tap in inputs.taps],
        positions=inputs.positions[:16],
        slots=inputs.slots[:16],
        commit_lens=inputs.commit_lens[:1],
        k_caches=[torch.full_like(cache, POISON) for cache in inputs.k_caches],
        v_caches=[torch.full_like(cache, POISON) for cache in inputs.v_caches],
    )
    alone.run()
    slots = inputs.slots[:7].long()
    if (
        torch.ops.dflash.name == "dflash" and device == "cpu"
    ):  # torch's CPU matmul may split rows over kernels of different summation order
        assert torch.allclose(inputs.caches()[:, :, slots].float(), alone.caches()[:, :, slots].float(), 2e-2, 2e-2)
    else:
        assert torch.equal(inputs.caches()[:, :, slots], alone.caches()[:, :, slots])


def test_plan_dead_rows_are_not_read(device: str, rng: torch.Generator) -> None:
    inputs = make(rng, device, batch=4, commit=[3, 8, 0, 1]).with_plan(2)
    inputs.run()
    clean = inputs.caches()
    dead = torch.ones(32, dtype=torch.bool, device=device)
    dead[live_rows(32, inputs.commit_lens)] = False
    for tap in inputs.taps:
        tap[dead] = float("nan")
    inputs.slots[dead] = 2**31 - 1
    inputs.positions[dead] = -(2**31)
    for cache in inputs.k_caches + inputs.v_caches:
        cache.fill_(POISON)
    inputs.run()
    assert torch.equal(inputs.caches(), clean)


def test_plan_takes_no_part_beyond_64_rows(device: str, rng: torch.Generator) -> None:
    inputs = make(rng, device, batch=9, block=8)
    planned = inputs.with_plan(2)
    planned.plan.tiles.fill_(float("nan"))
    check_against_reference(planned)


def test_no_plan_for_large_heads_and_other_dtypes(rng: torch.Generator) -> None:
    inputs = make(rng, "cpu", dim=256)
    assert inject_kv_plan(inputs.fc_weight, inputs.kv_weight, 256) is None
    assert inject_kv_plan(inputs.fc_weight.float(), inputs.kv_weight.float(), 128) is None


def test_plan_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make(rng, device, commit=[2, 8, 5]).with_plan(3)
    i, plan = inputs, inputs.plan
    arguments = (
        i.taps, plan.tiles, plan.units, i.hidden_norm, i.kv_bias, i.k_norm, i.cos_sin, i.positions, i.slots,
        i.commit_lens, i.k_caches, i.v_caches, plan.counters, plan.workspace, i.eps,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dflash._inject_kv_stream.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tiles", b16(3, 8192), r"tiles must have shape \[7, 8192\], got \[3, 8192\]"),
        ("units", torch.zeros(2, 3, 15, dtype=torch.int32), r"units must have shape \[\*, \*, 16\], got \[2, 3, 15\]"),
        (
            "counters",
            torch.zeros(4, dtype=torch.int32),
            r"counters must hold a multiple of 4 elements, at least \d+, got 4",
        ),
        ("workspace", torch.zeros(99, dtype=torch.uint8), r"workspace must hold at least \d+ bytes, got 99"),
    ],
)
def test_plan_errors(rng: torch.Generator, field: str, value: torch.Tensor, message: str) -> None:
    inputs = make(rng, "cuda", commit=[8, 8, 8], dim=64).with_plan(2)
    inputs.plan = replace(inputs.plan, **{field: value.cuda()})
    with pytest.raises(ValueError, match=r"^dflash::inject_kv: " + message):
        inputs.run()
    assert (inputs.caches() == POISON).all()


@pytest.mark.gpu
def test_plan_graph_replay_equals_eager(rng: torch.Generator) -> None:
    inputs = make(rng, "cuda", hidden=1024, batch=2, block=16, dim=128, commit=[16, 3]).with_plan()
    inputs.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.run()
    for commit in ([2, 9], [0, 0], [16, 16], [1, 0]):
        inputs.commit_lens.copy_(torch.tensor(commit))
        results = []
        for run in (graph.replay, inputs.run, graph.replay):
            for cache in inputs.k_caches + inputs.v_caches:
                cache.fill_(POISON)
            run()
            results.append(inputs.caches())
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
