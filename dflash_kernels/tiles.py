"""Weights of any format in the order in which the streaming kernels read them (csrc/smxx/stream/quantized_format.cuh).

A tile is 16 KB of 128 rows: 64 columns of bf16 (:mod:`dflash_kernels.stream`), or the codes of 128 columns in fp8 or of
256 in 4 bits, with their scales behind them. Rows and columns are in the order of
:func:`dflash_kernels.stream.pack_tiles`; within a lane's codes it is the one that takes the fewest instructions to undo
(csrc/common/dequant.cuh).
"""

from __future__ import annotations

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat, join_nibbles, split_nibbles
from dflash_kernels.stream import TILE_K, TILE_ROWS, pack_tiles, unpack_tiles

__all__ = [
    "Weight",
    "format_name",
    "format_of",
    "pack_quantized_tiles",
    "pack_weight",
    "tile_columns",
    "tile_nbytes",
    "unpack_quantized_tiles",
    "unpack_weight",
]

Weight = torch.Tensor | QuantizedWeight  # bf16, or codes and scales

CODE_BYTES = 16384


def format_of(weight: Weight) -> WeightFormat | None:
    """None: bf16."""
    return weight.format if isinstance(weight, QuantizedWeight) else None


def format_name(weight_format: WeightFormat | None) -> str:
    """As the ops take it: "bf16" or the format's name."""
    return "bf16" if weight_format is None else str(weight_format)


def pack_weight(weight: Weight) -> torch.Tensor:
    """``[row tiles, K tiles, elements of a tile]`` of a weight ``[N, K]``: bf16, or bytes of codes and scales."""
    return pack_quantized_tiles(weight) if isinstance(weight, QuantizedWeight) else pack_tiles(weight)


def unpack_weight(tiles: torch.Tensor, rows: int, columns: int, weight_format: WeightFormat | None) -> Weight:
    """The inverse of :func:`pack_weight`."""
    if weight_format is None:
        return unpack_tiles(tiles, rows, columns)
    return unpack_quantized_tiles(tiles, rows, columns, weight_format)


def tile_columns(weight_format: WeightFormat | None) -> int:
    """Columns of K in a tile."""
    return TILE_K if weight_format is None else CODE_BYTES * 8 // weight_format.bits // TILE_ROWS


def tile_nbytes(weight_format: WeightFormat) -> int:
    """Bytes of a tile, scales included."""
    scales = weight_format.scale_columns(tile_columns(weight_format))
    return CODE_BYTES + TILE_ROWS * scales * weight_format.scale_dtype.itemsize


def pack_quantized_tiles(weight: QuantizedWeight) -> torch.Tensor:
    """uint8 ``[row tiles, K tiles, tile_nbytes]`` of a weight ``[N, K]``; edges are zeros with scale 0.

    Raises:
        ValueError: a weight that is not two-dimensional, or in a format that no kernel streams.
    """
    if weight.codes.dim() != 2:
        raise ValueError(f"pack_quantized_tiles: weight must have 2 dimensions, got {list(weight.shape)}")
    if not weight.format.streams:
        raise ValueError(f"pack_quantized_tiles: weight must have a format that streams, got {weight.format}")
    f, (rows, columns) = weight.format, weight.shape
    width, row_tiles = tile_columns(f), -(-rows // TILE_ROWS)
    k_tiles, steps = -(-columns // width), width // TILE_K
    codes = weight.codes if f.bits == 8 else split_nibbles(weight.codes)
    zero = 8 if f.kind == "int4" else 0
    padded = codes.new_full((row_tiles * TILE_ROWS, k_tiles * width), zero)
    padded[:rows, :columns] = codes
    #                                         tile                 step   m16 half s lane register element
    parts = pack_tiles(padded).reshape(row_tiles, k_tiles, steps, 8, 2, 2, 32, 4, 2)
    if f.kind == "fp8":
        parts = parts.unflatten(7, (2, 2)).permute(0, 1, 2, 3, 4, 6, 5, 7, 9, 8)  # ... lane s pair element register
        packed = parts.reshape(row_tiles, k_tiles, CODE_BYTES)
    else:
        parts = parts.unflatten(3, (4, 2)).permute(0, 1, 2, 3, 5, 7, 4, 6, 9, 8)  # part half lane i s element register
        words = _join_e2m1(parts) if f.kind == "e2m1" else join_nibbles(parts.flatten(-2))
        packed = words.reshape(row_tiles, k_tiles, CODE_BYTES)
    scales = _pack_scales(weight.scale, row_tiles, k_tiles, f.scale_columns(width), f)
    return torch.cat([packed, scales], dim=-1)


def unpack_quantized_tiles(
    tiles: torch.Tensor, rows: int, columns: int, weight_format: WeightFormat
) -> QuantizedWeight:
    """The inverse of :func:`pack_quantized_tiles`."""
    f, (row_tiles, k_tiles, _) = weight_format, tiles.shape
    width = tile_columns(f)
    steps, packed = width // TILE_K, tiles[..., :CODE_BYTES]
    if f.kind == "fp8":
        parts = packed.reshape(row_tiles, k_tiles, steps, 8, 2, 32, 2, 2, 2, 2)
        parts = parts.permute(0, 1, 2, 3, 4, 6, 5, 7, 9, 8)
    else:
        lanes = packed.reshape(row_tiles, k_tiles, steps, 4, 2, 32, 2, 2, 4)
        codes = _split_e2m1(lanes) if f.kind == "e2m1" else split_nibbles(lanes).unflatten(-1, (2, 4))
        parts = codes.permute(0, 1, 2, 3, 6, 4, 7, 5, 9, 8)
    whole = unpack_tiles(parts.reshape(row_tiles, k_tiles * steps, TILE_ROWS * TILE_K), rows, columns)
    groups = f.scale_columns(width)
    scale = tiles[..., CODE_BYTES:].contiguous().view(f.scale_dtype).reshape(row_tiles, k_tiles, groups, 4, 8, 2, 2)
    scale = scale.permute(0, 3, 5, 6, 4, 1, 2).reshape(row_tiles * TILE_ROWS, k_tiles * groups)
    scale = scale[:rows, : f.scale_columns(columns)].contiguous()
    return QuantizedWeight(f, whole if f.bits == 8 else join_nibbles(whole), scale)


def _pack_scales(
    scale: torch.Tensor, row_tiles: int, k_tiles: int, groups: int, weight_format: WeightFormat
) -> torch.Tensor:
    """Bytes ``[row tiles, K tiles, group, part 4, row of 8, i 2, e 2]``, row = 32 part + 16 i + 8 e + row of 8."""
    if weight_format.kind == "fp8":
        scale = scale.expand(-1, k_tiles)  # each tile has those of its rows
    padded = scale.new_zeros(row_tiles * TILE_ROWS, k_tiles * groups)
    padded[: scale.shape[0], : scale.shape[1]] = scale
    parts = padded.reshape(row_tiles, 4, 2, 2, 8, k_tiles, groups).permute(0, 5, 6, 1, 4, 2, 3)
    return parts.reshape(row_tiles, k_tiles, -1).contiguous().view(torch.uint8)


# Where sign, exponent and mantissa of the four codes of a half word lie: shifts to the left.
_E2M1_BITS = ((15, 7, 6), (12, 4, 3), (9, 1, 0), (11, 13, 10))


def _join_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., element 2, register 4]`` to bytes ``[..., 4]`` of a little-endian word."""
    wide = codes.int()
    halves = torch.zeros_like(wide[..., 0])
    for register, (sign, exponent, mantissa) in enumerate(_E2M1_BITS):
        code = wide[..., register]
        halves |= (code >> 3) << sign | (code >> 1 & 3) << exponent | (code & 1) << mantissa
    return torch.stack((halves & 255, halves >> 8), dim=-1).flatten(-2).to(torch.uint8)


def _split_e2m1(words: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_join_e2m1`."""
    pairs = words.int().unflatten(-1, (2, 2))
    halves = pairs[..., 0] | pairs[..., 1] << 8
    codes = [
        (halves >> sign & 1) << 3 | (halves >> exponent & 3) << 1 | (halves >> mantissa & 1)
        for sign, exponent, mantissa in _E2M1_BITS
    ]
    return torch.stack(codes, dim=-1).to(torch.uint8)
