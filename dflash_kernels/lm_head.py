"""An LM head for any number of rows: which op takes the best tokens, and the copies of the weights that it reads."""

from __future__ import annotations

import torch

from dflash_kernels import tuning
from dflash_kernels.draft_stream import FP8_COLUMNS
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.head_stream import MAX_ROWS, PackedHead, pack_head
from dflash_kernels.tiles import Weight, format_of

__all__ = ["LMHead", "has_fp8_head", "streamed_rows"]

# Rows up to which a packed fp8 head is streamed where its codes could be multiplied with fp8 rows instead, which are
# rounded: all that stream, until it is measured from where the codes are faster.
FP8_ROWS = MAX_ROWS


def has_fp8_head(weight_format: WeightFormat | None, hidden_size: int, device: torch.device) -> bool:
    """Whether many rows take `lm_head_argmax_fp8` for weights of that format: fp8 of a size that fits, on CUDA.

    The CPU takes the dense weights, which are more exact.
    """
    from dflash_kernels.ops.draft import draft_forward_fp8_supported  # of the same products

    if weight_format != WeightFormat("fp8") or hidden_size % 16 or hidden_size > FP8_COLUMNS:
        return False
    return device.type == "cuda" and draft_forward_fp8_supported(device)


def streamed_rows(has_codes: bool = False) -> int:
    """Rows up to which a packed head is to be streamed; with `has_codes` more rows multiply fp8 codes."""
    return FP8_ROWS if has_codes else MAX_ROWS


class LMHead:
    """The best tokens of hidden rows over one LM head, or one shard of it, without logits in memory.

    =====================================  =====================================================================
    packed, up to :func:`streamed_rows`    `lm_head_argmax_packed` streams it, bf16 or quantised
    fp8 codes are held (`hold_codes`)      `quantize_rows`, then `lm_head_argmax_fp8` multiplies fp8 with fp8
    else                                   `lm_head_argmax` over the dense weight
    =====================================  =====================================================================

    A call allocates nothing if the rows are contiguous, so it can be captured. One at a time: buffers and counters
    are shared.

    Attributes:
        weight: ``[V, H]``, dense, as it was given.
        max_rows: rows that the buffers of a dense call are made for.
        packed: for few rows; None until `pack`. codes: its fp8 codes once more; None until `hold_codes`.
    """

    def __init__(self, weight: torch.Tensor, max_rows: int) -> None:
        from dflash_kernels.ops import lm_head_workspace

        self.weight, self.max_rows = weight, max_rows
        self.packed: PackedHead | None = None
        self.codes: QuantizedWeight | None = None
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None  # codes and scales of hidden rows
        self._workspace = lm_head_workspace(max_rows, weight.device)

    def pack(self, weight: Weight) -> None:
        """Hold `weight`, the dense one or a quantised one of its shape, as the streaming kernel reads it."""
        from dflash_kernels.ops import lm_head_argmax_packed_workspace

        self.packed = self._packed(weight)
        self._packed_workspace = lm_head_argmax_packed_workspace(self.packed)

    def _packed(self, weight: Weight) -> PackedHead:
        shape = tuning.head_shape(weight.shape[0], weight.shape[1], format_of(weight))
        return pack_head(weight, blocks=tuning.stream_blocks("head", shape, self.weight.device))

    def needs_codes(self, rows: int) -> bool:
        """Whether calls of up to `rows` rows would use :meth:`hold_codes`: the packed weights are fp8 on a device that
        multiplies it, and not all those rows are streamed."""
        if self.packed is None or rows <= streamed_rows(has_codes=True):
            return False
        return has_fp8_head(self.packed.weight_format, self.packed.hidden_size, self.weight.device)

    def hold_codes(self, rows: int) -> None:
        """Hold the packed weights' codes once more, and buffers for up to `rows` hidden rows in fp8.

        Raises:
            ValueError: no packed fp8 weights, or more rows than `max_rows`.
        """
        codes = None if self.packed is None else self.packed.unpack()
        if not isinstance(codes, QuantizedWeight) or codes.format.kind != "fp8":
            raise ValueError("LMHead.hold_codes: fp8 weights must have been packed, got others or none")
        if rows > self.max_rows:
            raise ValueError(f"LMHead.hold_codes: rows must be at most {self.max_rows}, got {rows}")
        device, width = codes.codes.device, codes.shape[1]
        scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
        self.codes, self._rows = codes, (torch.empty(rows, width, dtype=torch.uint8, device=device), scales)

    def drop_codes(self) -> None:
        """Undo :meth:`hold_codes`, if it was called."""
        self.codes = self._rows = None

    def load(self, weight: Weight) -> None:
        """Other values, of the format that was packed, at the addresses that graphs know."""
        assert self.packed is not None
        self.packed.weights.copy_(self._packed(weight).weights)
        if self.codes is not None:
            assert isinstance(weight, QuantizedWeight)
            self.codes.codes.copy_(weight.codes)
            self.codes.scale.copy_(weight.scale)

    def argmax(self, hidden: torch.Tensor, vocab_start: int, *, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write the best token of each of ``hidden [N, H]``, and its logit, to ``out``: ``[N]`` int64 and float32.

        Raises:
            ValueError: more rows than buffers were made for, and as the ops do.
        """
        from dflash_kernels.ops import lm_head_argmax, lm_head_argmax_fp8, lm_head_argmax_packed, quantize_rows

        rows = hidden.shape[0]
        if self.packed is not None and rows <= streamed_rows(self.codes is not None):
            lm_head_argmax_packed(hidden, self.packed, vocab_start, out=out, workspace=self._packed_workspace)
        elif self.codes is not None and self._rows is not None and rows <= len(self._rows[0]):
            coded = quantize_rows(hidden.contiguous(), out=(self._rows[0][:rows], self._rows[1][:rows]))
            weight = self.codes
            lm_head_argmax_fp8(
                *coded, weight.codes, weight.scale, None, vocab_start, out=out, workspace=self._workspace
            )
        else:
            lm_head_argmax(hidden, self.weight, None, vocab_start, out=out, workspace=self._workspace)
