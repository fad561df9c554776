"""Context KV injection: the target's hidden states of committed tokens, written into the drafter's paged KV caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dflash_kernels import tuning
from dflash_kernels.ops._errors import dflash_errors
from dflash_kernels.stream import TILE_ELEMENTS, TILE_K, TILE_ROWS, Schedule, pack_tiles, unpack_tiles

__all__ = [
    "InjectPlan",
    "inject_kv",
    "inject_kv_fuse",
    "inject_kv_plan",
    "inject_kv_project",
    "inject_kv_sharded",
    "inject_kv_workspace",
]

_CHUNK_ROWS = 4096  # rows that a workspace is made for at most: a long prefill goes through in chunks


def inject_kv_workspace(
    num_rows: int,
    hidden_size: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    max_rows: int = _CHUNK_ROWS,
    num_taps: int = 0,
) -> torch.Tensor:
    """Scratch memory of :func:`inject_kv` for up to ``num_rows`` rows at once; its content never matters.

    More rows than that go through in chunks, so ``max_rows`` bounds the memory, not the call. With ``commit_lens``
    CUDA gathers the taps of the live rows of more than 64, and a row takes K * H elements more: ``num_taps`` = K where
    such calls shall not go through in chunks, and where taps are normed.

    Returns:
        A vector of ``8 + min(num_rows, max_rows) * (H + L * 2 * Hkv * D [+ K * H + 2])`` elements, at least one row's,
        of the weights' dtype.
    """
    rows = max(1, min(num_rows, max_rows))
    row_elements = hidden_size + num_layers * 2 * num_kv_heads * head_dim
    if num_taps > 0:
        row_elements += num_taps * hidden_size + 2
    return torch.empty(8 + rows * row_elements, dtype=dtype, device=device)


MAX_PLAN_ROWS = 64  # of a call that reads a plan's weights
MAX_PLAN_HEAD_DIM = 128


@dataclass(frozen=True)
class InjectPlan:
    """The weights of :func:`inject_kv` in the order in which few rows read them, and how that is split.

    Attributes:
        tiles: ``[tiles, 8192]`` bf16, fc's row tiles of 128, then those of the KV projection, whole heads each.
        units: ``[blocks, units, 16]`` int32, see :mod:`dflash_kernels.stream`.
        counters: int32, see :meth:`dflash_kernels.stream.Schedule.state`, written by every call; workspace: uint8
            scratch. One call at a time may use a plan.
    """

    tiles: torch.Tensor
    units: torch.Tensor
    counters: torch.Tensor
    workspace: torch.Tensor


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _pack_heads(kv_weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``[L, 2 * Hkv * D, H]`` in tiles of whole heads, each filled up to 128 rows."""
    heads = kv_weight.reshape(-1, head_dim, kv_weight.shape[-1])
    per_tile = TILE_ROWS // head_dim
    row_tiles = _ceil_div(len(heads), per_tile)
    rows = heads.new_zeros(row_tiles, TILE_ROWS, heads.shape[-1])
    for i in range(per_tile):
        part = heads[i::per_tile]
        rows[: len(part), i * head_dim : (i + 1) * head_dim] = part
    return pack_tiles(rows.view(row_tiles * TILE_ROWS, -1))


def inject_schedule(num_taps: int, hidden_size: int, num_heads: int, head_dim: int, blocks: int) -> Schedule:
    """fc, then the projection to ``num_heads = L * 2 * Hkv`` heads, which waits for all of fc's row tiles."""
    fc_tiles, fc_k = _ceil_div(hidden_size, TILE_ROWS), _ceil_div(num_taps * hidden_size, TILE_K)
    kv_tiles, kv_k = _ceil_div(num_heads, TILE_ROWS // head_dim), _ceil_div(hidden_size, TILE_K)
    schedule = Schedule(blocks)
    fused = schedule.new_counters()
    schedule.add_product(0, fc_tiles, fc_k, 0, signal=fused)
    schedule.add_product(1, kv_tiles, kv_k, fc_tiles * fc_k, wait=(fused, 31, fc_tiles))
    return schedule


def inject_kv_plan(
    fc_weight: torch.Tensor, kv_weight: torch.Tensor, head_dim: int, blocks: int | None = None
) -> InjectPlan | None:
    """What :func:`inject_kv` needs to stream its weights for up to 64 rows in one launch.

    A second copy of the weights, on their device, which the plan owns.

    Args:
        fc_weight: ``[H, K * H]``; kv_weight: ``[L, 2 * Hkv * D, H]``; both as for :func:`inject_kv`.
        head_dim: D.
        blocks: persistent blocks; default: as tuned (`dflash_kernels.tuning`), else the device's multiprocessors.

    Returns:
        None where few rows take the same path as many: weights that are not bf16, D over 128, H not a multiple of 8.
    """
    hidden = fc_weight.shape[0]
    if fc_weight.dtype != torch.bfloat16 or head_dim > MAX_PLAN_HEAD_DIM or hidden % 8 != 0:
        return None
    device = fc_weight.device
    taps, num_heads = fc_weight.shape[1] // hidden, kv_weight.shape[0] * kv_weight.shape[1] // head_dim
    if blocks is None:
        shape = tuning.inject_shape(taps, hidden, num_heads, head_dim)
        blocks = tuning.stream_blocks("inject", shape, device)
    schedule = inject_schedule(taps, hidden, num_heads, head_dim, blocks)
    fc_tiles = _ceil_div(hidden, TILE_ROWS)
    tiles = [pack_tiles(fc_weight).view(-1, TILE_ELEMENTS), _pack_heads(kv_weight, head_dim).view(-1, TILE_ELEMENTS)]
    scratch = MAX_PLAN_ROWS * (4 * fc_tiles + 2 * hidden)
    return InjectPlan(
        torch.cat(tiles),
        schedule.units().to(device),
        schedule.state(device, 4 * blocks),
        torch.empty(scratch, dtype=torch.uint8, device=device),
    )


@dflash_errors
def inject_kv(
    taps: Sequence[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
    plan: InjectPlan | None = None,
    tap_norm: torch.Tensor | None = None,
    value_scale: float = 1.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Fuse the tapped hidden states, project them to K and V of every drafter layer, and write the paged caches.

    For each live row n, in the weights' dtype w (bf16; fp32 too on the CPU), fp32 inside each ``w( )``::

        t_k = taps[k][n], or with tap_norm w(taps[k][n] * rsqrt(mean(taps[k][n]^2) + eps) * tap_norm[k])
        f   = w([t_0 | .. | t_{K-1}] @ fc_weight.T)
        x   = w(f * rsqrt(mean(f^2) + eps) * hidden_norm)
        k|v = w(x @ kv_weight[l].T + kv_bias[l])                          each of the L layers
        k   = k * rsqrt(mean(k^2) + eps) * k_norm[l]                      per head, in fp32, not rounded
        k_caches[l][slots[n]] = w(rope(k, positions[n]));  v_caches[l][slots[n]] = w(v * value_scale)

    or, in caches of e4m3, ``e4m3(rope(k, positions[n]) / k_scale[l])`` and ``e4m3(w(v * value_scale) / v_scale[l])``,
    saturating at 448,

    so context K rounds once after norm and rotation. ``rope`` turns the pairs (i, i + rotary_dim / 2) for
    i < rotary_dim / 2 and leaves elements from rotary_dim on as they are. Row n is live iff
    ``n % T < commit_lens[n // T]``, T = N / B; the taps of other rows are not read and their slots not looked at.
    Without ``commit_lens`` (prefill) every row is live.

    Args:
        taps: 1 to 8 tensors ``[N, H]``, row stride free (column slices of one ``[N, K * H]`` will do). On CUDA:
            aligned to 16 bytes, H and the row stride multiples of 8.
        fc_weight: ``[H, K * H]``; hidden_norm: ``[H]``; kv_weight: ``[L, 2 * Hkv * D, H]``, K's rows first, then V's;
            kv_bias: ``[L, 2 * Hkv * D]`` or None; k_norm: ``[L, D]``, or None for no norm. Contiguous.
        cos_sin: ``[P, rotary_dim]`` float32, cosines in the first half of a row, sines in the second.
        positions, slots: ``[N]`` int32 or int64. Slots of live rows are distinct; of equal ones, either may win.
        commit_lens: ``[B]`` int32 or int64, 0..T, or None.
        k_caches, v_caches: L <= 16 tensors each ``[S, Hkv, D]``, D contiguous, D <= 256; written. Of the weights'
            dtype, or all float8_e4m3fn or uint8 that holds its codes.
        workspace: scratch, see :func:`inject_kv_workspace`; at least T rows of it.
        eps: of both norms.
        plan: see :func:`inject_kv_plan`; with one, calls of up to 64 rows read its copy of the weights, unless they ask
            for one of what follows.
        tap_norm: ``[K, H]``, contiguous: RMSNorm of each tap before fc; None: none.
        value_scale: factor of V.
        k_scale, v_scale: ``[L]`` float32, of caches of e4m3 only; None: 1.

    Raises:
        ValueError: wrong count, shape, dtype, device, stride or alignment; on the CPU (on CUDA only under
            DFLASH_DEBUG=1, outside of capture) also a live row whose slot lies outside the pool or whose position lies
            outside cos_sin, or a commit length outside 0..T. The caches are untouched then. Unchecked, such a row is
            skipped.

    Source: SGLang's materialisation of DFLASH context KV (fused_kv_materialize.py), rounding included.
    """
    k_caches, v_caches = _codes(k_caches), _codes(v_caches)
    plain = tap_norm is None and value_scale == 1.0 and (not k_caches or k_caches[0].dtype != torch.uint8)
    if plan is not None and positions.numel() <= MAX_PLAN_ROWS and plain and k_scale is None and v_scale is None:
        torch.ops.dflash._inject_kv_stream(
            taps, plan.tiles, plan.units, hidden_norm, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
            k_caches, v_caches, plan.counters, plan.workspace, eps,
        )  # fmt: skip
        return
    torch.ops.dflash.inject_kv(
        taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps, tap_norm, value_scale, k_scale, v_scale,
    )  # fmt: skip


def _codes(caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Caches of e4m3 as uint8, which is what the ops take."""
    return [cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache for cache in caches]


@dflash_errors
def inject_kv_fuse(
    taps: Sequence[torch.Tensor],
    fc_weight: torch.Tensor,
    commit_lens: torch.Tensor | None,
    fused: torch.Tensor,
    workspace: torch.Tensor,
    eps: float,
    tap_norm: torch.Tensor | None = None,
) -> None:
    """The first half of :func:`inject_kv` for an fc that is sharded by output rows: ``fused[n] = f`` of live rows n.

    Args:
        taps, commit_lens, tap_norm: as of :func:`inject_kv`.
        fc_weight: ``[F, K * H]``, this rank's F rows of fc; on CUDA F a multiple of 8.
        fused: ``[N, F]``, written; other rows are left as they are.
        workspace: see :func:`inject_kv_workspace`; its ``num_taps`` count for this half, the rest need not.
        eps: of the tap norms.

    Raises:
        ValueError: as of :func:`inject_kv`.
    """
    torch.ops.dflash.inject_kv_fuse(taps, fc_weight, commit_lens, fused, workspace, eps, tap_norm)


@dflash_errors
def inject_kv_project(
    fused: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
    value_scale: float = 1.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The second half of :func:`inject_kv`: from f, in the shards that the ranks made, to the caches.

    Args:
        fused: ``[R, N, H / R]``, contiguous, R in 1..8: what an all-gather of every rank's ``fused`` leaves. Rows that
            are not live are not read. On CUDA H / R is a multiple of 8.
        others: as of :func:`inject_kv`.

    Raises:
        ValueError: as of :func:`inject_kv`.
    """
    torch.ops.dflash.inject_kv_project(
        fused, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        _codes(k_caches), _codes(v_caches), workspace, eps, value_scale, k_scale, v_scale,
    )  # fmt: skip


def inject_kv_sharded(
    taps: Sequence[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
    fused: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
    tap_norm: torch.Tensor | None = None,
    value_scale: float = 1.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """:func:`inject_kv` on one of R ranks that hold H / R output rows of fc each, and their own KV heads.

    A replicated fc costs every rank and step all of its bytes; sharded, 1 / R of them and an all-gather of N * H
    elements. The norm is over all of H, so it comes after the gather.

    Args:
        fc_weight: ``[H / R, K * H]``.
        fused: ``[N, H / R]`` scratch.
        gather: called with ``fused``, on the current stream; returns ``[R, N, H / R]``, the ranks' in order, as
            ``torch.distributed.all_gather_into_tensor`` fills it. Its result may be one tensor each time.
        others: as of :func:`inject_kv`.

    Raises:
        ValueError: as of :func:`inject_kv`.
    """
    inject_kv_fuse(taps, fc_weight, commit_lens, fused, workspace, eps, tap_norm)
    inject_kv_project(
        gather(fused), hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps, value_scale, k_scale, v_scale,
    )  # fmt: skip


def _live_rows(rows: int, commit_lens: torch.Tensor | None) -> torch.Tensor | slice:
    """What selects the live rows of a tensor."""
    if commit_lens is None or commit_lens.numel() == 0:
        return slice(None)
    block = rows // commit_lens.numel()
    return (torch.arange(block) < commit_lens[:, None]).flatten().nonzero().flatten()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32, rounded once, to the weight's dtype."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale * weight.float()).to(weight.dtype)


def _fuse(taps: list[torch.Tensor], fc_weight: torch.Tensor, eps: float, tap_norm: torch.Tensor | None) -> torch.Tensor:
    if tap_norm is not None:
        taps = [_rms_norm(tap, weight, eps) for tap, weight in zip(taps, tap_norm, strict=True)]
    return F.linear(taps[0] if len(taps) == 1 else torch.cat(taps, dim=-1), fc_weight)


def _project(
    fused: torch.Tensor, hidden_norm: torch.Tensor, kv_weight: torch.Tensor, kv_bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    bias = None if kv_bias is None else kv_bias.flatten()
    return F.linear(_rms_norm(fused, hidden_norm, eps), kv_weight.flatten(0, 1), bias)


@torch.library.impl("dflash::inject_kv", "CPU")
def _inject_kv_cpu(
    taps: list[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
    tap_norm: torch.Tensor | None = None,
    value_scale: float = 1.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    torch.ops.dflash._inject_kv_check(
        taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps, tap_norm, value_scale, k_scale, v_scale,
    )  # fmt: skip
    live = _live_rows(positions.numel(), commit_lens)
    positions, slots = positions[live], slots[live]
    if positions.numel() == 0:
        return
    fused = _fuse([tap[live] for tap in taps], fc_weight, eps, tap_norm)
    kv = _project(fused, hidden_norm, kv_weight, kv_bias, eps)
    torch.ops.dflash._inject_kv_write(
        kv, k_norm, cos_sin, positions, slots, None, k_caches, v_caches, eps, value_scale, k_scale, v_scale
    )


@torch.library.impl("dflash::inject_kv_fuse", "CPU")
def _inject_kv_fuse_cpu(
    taps: list[torch.Tensor],
    fc_weight: torch.Tensor,
    commit_lens: torch.Tensor | None,
    fused: torch.Tensor,
    workspace: torch.Tensor,
    eps: float,
    tap_norm: torch.Tensor | None = None,
) -> None:
    torch.ops.dflash._inject_kv_fuse_check(taps, fc_weight, commit_lens, fused, workspace, eps, tap_norm)
    live = _live_rows(fused.shape[0], commit_lens)
    taps = [tap[live] for tap in taps]
    if taps[0].shape[0] > 0:
        fused[live] = _fuse(taps, fc_weight, eps, tap_norm)


@torch.library.impl("dflash::inject_kv_project", "CPU")
def _inject_kv_project_cpu(
    fused: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
    value_scale: float = 1.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    torch.ops.dflash._inject_kv_project_check(
        fused, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps, value_scale, k_scale, v_scale,
    )  # fmt: skip
    live = _live_rows(positions.numel(), commit_lens)
    positions, slots = positions[live], slots[live]
    if positions.numel() == 0:
        return
    whole = fused[:, live].transpose(0, 1).flatten(1)
    kv = _project(whole, hidden_norm, kv_weight, kv_bias, eps)
    torch.ops.dflash._inject_kv_write(
        kv, k_norm, cos_sin, positions, slots, None, k_caches, v_caches, eps, value_scale, k_scale, v_scale
    )


@torch.library.register_fake("dflash::inject_kv_project")
@torch.library.register_fake("dflash::inject_kv_fuse")
@torch.library.register_fake("dflash::inject_kv")
def _inject_kv_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl("dflash::_inject_kv_stream", "CPU")
def _inject_kv_stream_cpu(
    taps: list[torch.Tensor],
    tiles: torch.Tensor,
    units: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    counters: torch.Tensor,
    workspace: torch.Tensor,
    eps: float,
) -> None:
    hidden, (_, heads, dim) = hidden_norm.numel(), k_caches[0].shape
    fc_k, kv_k = _ceil_div(len(taps) * hidden, TILE_K), _ceil_div(hidden, TILE_K)
    fc_count = _ceil_div(hidden, TILE_ROWS) * fc_k
    fc_weight = unpack_tiles(tiles[:fc_count].view(-1, fc_k, TILE_ELEMENTS), hidden, len(taps) * hidden)
    kv_tiles = tiles[fc_count:].view(-1, kv_k, TILE_ELEMENTS)
    rows = unpack_tiles(kv_tiles, len(kv_tiles) * TILE_ROWS, hidden).view(len(kv_tiles), TILE_ROWS, hidden)
    per_tile = TILE_ROWS // dim
    kv_weight = rows[:, : per_tile * dim].reshape(-1, hidden)[: len(k_caches) * 2 * heads * dim]
    kv_weight = kv_weight.view(len(k_caches), 2 * heads * dim, hidden)
    scratch = inject_kv_workspace(positions.numel(), hidden, len(k_caches), heads, dim, hidden_norm.dtype)
    torch.ops.dflash.inject_kv(
        taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, scratch, eps,
    )  # fmt: skip


@torch.library.register_fake("dflash::_inject_kv_stream")
def _inject_kv_stream_fake(*args: object, **kwargs: object) -> None:
    return None
