"""Packed layer weights and the schedule of `draft_forward_packed` (csrc/smxx/draft/stream.cuh)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat, stack
from dflash_kernels.stream import ONE_COUNTER, SLOT_FLOATS, TILE_ROWS, Schedule
from dflash_kernels.tiles import Weight, format_name, format_of, pack_weight, tile_columns, unpack_weight

__all__ = [
    "MAX_LAYERS",
    "MAX_RANKS",
    "MAX_TOKENS",
    "Exchange",
    "Kind",
    "PackedDraft",
    "draft_schedule",
    "pack_draft",
    "default_blocks",
    "has_fp8_chain",
    "has_nvfp4_chain",
    "streamed_tokens",
    "why_not_packed",
]

MAX_TOKENS, MAX_LAYERS, MAX_RANKS = 64, 64, 8
SMALL_LAYER_BYTES = 64 << 20  # default_blocks
DENSE_TOKENS = 32  # of bf16 weights; from there the chain's tensor-core GEMMs are as fast or faster (bench/NOTES.md)
FP8_TOKENS = 32  # of fp8 weights where the chain multiplies their codes: at 64 it is faster, between not measured
FP8_COLUMNS = 32768  # that quantize_rows takes (csrc/smxx/quantize/params.h)
GATE_ROWS = TILE_ROWS // 2  # gate rows of a row tile of gate_up; the up rows of the same features follow


class Kind(IntEnum):
    """Of a stage; a unit's stage is ``len(Kind) * layer + kind`` (csrc/smxx/draft/stream.h)."""

    QKV = 0
    OUT = 1
    GATE_UP = 2
    DOWN = 3
    ATTEND = 4
    EMBED = 5
    FINAL = 6


@dataclass(frozen=True)
class PackedDraft:
    """The four matrices of every layer as `draft_forward_packed` streams them, and its schedule.

    One launch at a time may use it: the counters are its state.

    Attributes:
        weights: [tiles, elements of a tile], layer by layer qkv, o, gate_up, down
            (:func:`dflash_kernels.tiles.pack_weight`).
        units: [blocks, most units of a block + 1, 16] int32; counters: [n] int32, see
            :meth:`dflash_kernels.stream.Schedule.state`; slots: of the partial sums behind the counters.
        hidden_size, intermediate_size, num_q_heads, num_kv_heads, head_dim, num_layers: what it was made for.
        weight_format: of the weights; None: bf16.
    """

    weights: torch.Tensor
    units: torch.Tensor
    counters: torch.Tensor
    slots: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    weight_format: WeightFormat | None = None

    @property
    def blocks(self) -> int:
        """Blocks of threads of a launch, all resident at once."""
        return self.units.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.weights.nbytes + self.units.nbytes + self.counters.nbytes

    def shapes(self) -> list[tuple[int, int]]:
        """(rows, K) of a layer's four packed matrices; of gate_up with both halves filled up to whole row tiles."""
        q_width = self.num_q_heads * self.head_dim
        return [
            (q_width + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            (self.hidden_size, q_width),
            (-(-self.intermediate_size // GATE_ROWS) * TILE_ROWS, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        ]

    def unpack(self) -> tuple[Weight, Weight, Weight, Weight]:
        """``qkv_weight, o_weight, gate_up_weight, down_weight``, stacked as :func:`pack_draft` takes them."""
        stacks: list[list[Weight]] = [[], [], [], []]
        at = 0
        for _ in range(self.num_layers):
            for layers, (rows, k) in zip(stacks, self.shapes(), strict=True):
                row_tiles, k_tiles = _tiles(rows, k, self.weight_format)
                tiles = self.weights[at : at + row_tiles * k_tiles].view(row_tiles, k_tiles, -1)
                layers.append(unpack_weight(tiles, rows, k, self.weight_format))
                at += row_tiles * k_tiles
        inter = self.intermediate_size

        def gate_up(rows: torch.Tensor) -> torch.Tensor:
            halves = rows.view(-1, 2, GATE_ROWS, rows.shape[-1]).transpose(0, 1).reshape(2, -1, rows.shape[-1])
            return halves[:, :inter].reshape(2 * inter, -1)

        stacks[2] = [_reordered(weight, gate_up) for weight in stacks[2]]
        qkv, o, both, down = map(_stack, stacks)
        return qkv, o, both, down


@dataclass(frozen=True)
class Exchange:
    """Memory through which the kernels of several ranks hand each other words, as one rank sees it.

    Every rank's is filled with -1, and the ranks have met, before any of them launches a kernel that takes it; launches
    leave it so. The ranks launch the same passes in the same order, one at a time.

    Attributes:
        words: [n] int32 of this rank, :func:`dflash_kernels.ops.draft_exchange_words` or more.
        addresses: of the ranks' words, in their order, as this rank's device writes to them.
        rank: this one.
        one_device: the ranks are simulated: their kernels run on one device, each on a stream of its own, with packs of
            so few blocks that all are resident.
        keep: what has to live as long, because it maps the others' memory.
    """

    words: torch.Tensor
    addresses: tuple[int, ...]
    rank: int
    one_device: bool = False
    keep: object = None

    @property
    def world(self) -> int:
        """The number of ranks."""
        return len(self.addresses)

    @staticmethod
    def simulated(world: int, words: int, device: torch.device | str) -> list[Exchange]:
        """Of the ranks of one process on one device."""
        own = [torch.full((words,), -1, dtype=torch.int32, device=device) for _ in range(world)]
        addresses = tuple(tensor.data_ptr() for tensor in own)
        return [Exchange(tensor, addresses, rank, one_device=True) for rank, tensor in enumerate(own)]


def _tiles(rows: int, k: int, weight_format: WeightFormat | None) -> tuple[int, int]:
    return -(-rows // TILE_ROWS), -(-k // tile_columns(weight_format))


def _reordered(weight: Weight, rows: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    if isinstance(weight, QuantizedWeight):
        return replace(weight, codes=rows(weight.codes), scale=rows(weight.scale))
    return rows(weight)


def _stack(layers: list[Weight]) -> Weight:
    quantized = [weight for weight in layers if isinstance(weight, QuantizedWeight)]
    if quantized:
        return stack(quantized)
    return torch.stack([weight for weight in layers if isinstance(weight, torch.Tensor)])


def has_fp8_chain(matrices: Sequence[Weight]) -> bool:
    """Whether `draft_forward_fp8` is the chain of kernels of a drafter's stacked `matrices`: fp8 of sizes that fit, on
    CUDA.

    The CPU's chain takes the dequantised weights, which are more exact.
    """
    from dflash_kernels.ops.draft import draft_forward_fp8_supported

    coded = [weight for weight in matrices if isinstance(weight, QuantizedWeight) and weight.format.kind == "fp8"]
    if len(coded) < len(matrices) or any(w.shape[-1] % 16 or w.shape[-1] > FP8_COLUMNS for w in coded):
        return False
    device = coded[0].codes.device
    return device.type == "cuda" and draft_forward_fp8_supported(device)


def has_nvfp4_chain(matrices: Sequence[Weight]) -> bool:
    """Whether `draft_forward_nvfp4` is the chain of kernels of a drafter's stacked `matrices`: nvfp4 of sizes that fit,
    on CUDA devices whose tensor cores multiply it."""
    from dflash_kernels.ops.gemm import gemm_nvfp4_supported

    coded = [weight for weight in matrices if isinstance(weight, QuantizedWeight) and weight.format.kind == "nvfp4"]
    if len(coded) < len(matrices) or any(w.shape[-1] % 32 or w.shape[-1] > FP8_COLUMNS for w in coded):
        return False
    device = coded[0].codes.device
    return device.type == "cuda" and gemm_nvfp4_supported(device)


def streamed_tokens(weight_format: WeightFormat | None, fp8_chain: bool = False) -> int:
    """B * T up to which one streaming kernel is to be taken rather than the chain of kernels.

    With `fp8_chain` (:func:`has_fp8_chain`) the chain reads codes as well, and multiplies them faster.
    """
    if weight_format is None:
        return DENSE_TOKENS
    return FP8_TOKENS if fp8_chain else MAX_TOKENS


def default_blocks(matrices: Sequence[Weight], device: torch.device) -> int:
    """Blocks to pack a drafter's stacked `matrices` for, where nothing was measured on the machine (1 without a GPU).

    One a multiprocessor. Half as many for layers of less than 64 MB on 9.x: their time is waiting for all blocks rather
    than bytes (bench/NOTES.md).
    """
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    layer_bytes = sum(matrix.nbytes // matrix.shape[0] for matrix in matrices)
    few = properties.major == 9 and layer_bytes < SMALL_LAYER_BYTES
    return properties.multi_processor_count // (2 if few else 1)


def why_not_packed(
    *,
    tokens: int,
    num_layers: int,
    head_dim: int,
    dtype: torch.dtype,
    weight_format: WeightFormat | None = None,
    fp8_chain: bool = False,
) -> str | None:
    """Why a pass is not to run as one streaming kernel, or None. `tokens` is B * T, `dtype` that of dense weights."""
    if tokens > streamed_tokens(weight_format, fp8_chain):
        return f"{tokens} rows are more than {streamed_tokens(weight_format, fp8_chain)}"
    if weight_format is not None and not weight_format.streams:
        return f"weights are {weight_format}, which no kernel streams"
    if num_layers > MAX_LAYERS:
        return f"{num_layers} layers are more than {MAX_LAYERS}"
    if head_dim not in (64, 128):
        return f"head size {head_dim} is neither 64 nor 128"
    if dtype != torch.bfloat16:
        return f"weights are {str(dtype).removeprefix('torch.')}, not bfloat16"
    return None


def attention_slots(num_q_heads: int, head_dim: int, blocks: int) -> int:
    """Slots of partial sums that hold the attention's parts (csrc/smxx/draft/stream.h)."""
    rows = max(blocks, num_q_heads) * MAX_TOKENS
    return -(-rows * (head_dim + 4) // SLOT_FLOATS)


def draft_schedule(
    shapes: list[tuple[int, int]], num_layers: int, blocks: int, weight_format: WeightFormat | None = None
) -> Schedule:
    """Units of all blocks for `num_layers` layers with the four products `shapes` (rows, K).

    Partial sums of all stages share their slots: a stage starts only when the one before has been added up.
    """
    schedule = Schedule(blocks)
    tokens = min(blocks, MAX_TOKENS)  # blocks that gather the embedding and take the final norm
    done = schedule.new_counters()
    for block in range(tokens):
        schedule.add_job(len(Kind) * 0 + Kind.EMBED, block, (block, tokens, 0), signal=done)
    target, tile = tokens, 0

    def product(stage: int, rows: int, k: int) -> None:
        nonlocal done, target, tile
        row_tiles, k_tiles = _tiles(rows, k, weight_format)
        signal = schedule.new_counters()
        schedule.add_product(stage, row_tiles, k_tiles, tile, wait=(done, ONE_COUNTER, target), signal=signal, slot=0)
        done, target, tile = signal, row_tiles, tile + row_tiles * k_tiles

    def jobs(stage: int) -> None:
        nonlocal done, target
        signal = schedule.new_counters()
        for block in range(blocks):
            schedule.add_job(stage, block, (block, 0, 0), wait=(done, target), signal=signal)
        done, target = signal, blocks

    for layer in range(num_layers):
        first = len(Kind) * layer
        product(first + Kind.QKV, *shapes[0])
        jobs(first + Kind.ATTEND)
        product(first + Kind.OUT, *shapes[1])
        product(first + Kind.GATE_UP, *shapes[2])
        product(first + Kind.DOWN, *shapes[3])
    for block in range(tokens):
        schedule.add_job(len(Kind) * (num_layers - 1) + Kind.FINAL, block, (block, tokens, 0), wait=(done, target))
    return schedule


def pack_draft(
    qkv_weight: Weight,
    o_weight: Weight,
    gate_up_weight: Weight,
    down_weight: Weight,
    *,
    num_kv_heads: int,
    head_dim: int,
    blocks: int,
) -> PackedDraft:
    """Pack a drafter's layers, stacked as `draft_forward` takes them, for `blocks` blocks of threads.

    `blocks` is the number of multiprocessors of the device that will run it: all must be resident at once. The weights
    are all bf16, or all quantised in one format.

    Raises:
        ValueError: a number of layers, a head size or a dtype that :func:`why_not_packed` names, or mixed formats.
    """
    layers, qkv_width, hidden = qkv_weight.shape
    inter, matrices = down_weight.shape[2], (qkv_weight, o_weight, gate_up_weight, down_weight)
    formats = {format_name(format_of(weight)) for weight in matrices}
    if len(formats) > 1:
        raise ValueError(f"pack_draft: weights must have one format, got {', '.join(sorted(formats))}")
    dtype = qkv_weight.dtype if isinstance(qkv_weight, torch.Tensor) else torch.bfloat16
    if reason := why_not_packed(
        tokens=0, num_layers=layers, head_dim=head_dim, dtype=dtype, weight_format=format_of(qkv_weight)
    ):
        raise ValueError(f"pack_draft: {reason}")

    def gate_up(rows: torch.Tensor) -> torch.Tensor:
        both = rows.view(2, inter, -1)
        if pad := -inter % GATE_ROWS:
            both = torch.cat((both, both.new_zeros(2, pad, both.shape[-1])), dim=1)
        return both.view(2, -1, GATE_ROWS, both.shape[-1]).transpose(0, 1).reshape(-1, both.shape[-1])

    packed = []
    for layer in range(layers):
        for weight in matrices:
            one = weight[layer]
            packed.append(pack_weight(_reordered(one, gate_up) if weight is gate_up_weight else one).flatten(0, 1))
    weights, weight_format = torch.cat(packed), format_of(qkv_weight)
    sizes = (hidden, inter, qkv_width // head_dim - 2 * num_kv_heads, num_kv_heads, head_dim, layers, weight_format)
    plain = PackedDraft(weights, weights.new_empty(0), weights.new_empty(0), 0, *sizes)
    schedule = draft_schedule(plain.shapes(), layers, blocks, weight_format)
    slots = schedule.slots + attention_slots(plain.num_q_heads, head_dim, blocks)
    state = schedule.state(weights.device, slots)
    return PackedDraft(weights, schedule.units().to(weights.device), state, slots, *sizes)
