"""A loaded drafter: its weights packed for `draft_forward` and `inject_kv`, and the target's embedding and LM head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dflash_kernels import ops, tuning
from dflash_kernels.draft_stream import (
    PackedDraft,
    default_blocks,
    has_fp8_chain,
    has_nvfp4_chain,
    pack_draft,
    streamed_tokens,
    why_not_packed,
)
from dflash_kernels.formats import scale_blocks
from dflash_kernels.model.checkpoint import load_weights
from dflash_kernels.model.config import DrafterConfig, load_config
from dflash_kernels.model.weights import DrafterWeights
from dflash_kernels.tiles import Weight

MATRICES = ("qkv_weight", "o_weight", "gate_up_weight", "down_weight")


class Drafter:
    """A DFlash drafter; what the engine asks of one (`engine.draft.DrafterLike`), once it is bound to a target.

    A drafter has no embedding and no LM head: :meth:`bind` takes the target's. The dtype is bf16 on CUDA and fp32 or
    bf16 on the CPU, never fp16, in which the target's outliers overflow in ``fc``. Of quantised weights CUDA's kernel
    for few rows reads the codes; more rows, injection and the CPU take them dequantised to that dtype, so the drafter
    holds both. Of fp8 weights more rows multiply the codes, too, where the GPU can (`draft_forward_fp8`): with
    activations that are rounded to fp8, so a draft may differ from that of few rows. NVFP4 weights are multiplied so
    with any number of rows (`draft_forward_nvfp4`), where the GPU can. Where neither is made for the drafter's sizes or
    its GPU, all take the weights dequantised, with a warning.

    Args:
        config: sizes of the drafter, or of this rank's shard of it.
        weights: its tensors.
        max_positions: length of the rope table; None: all positions the drafter was made for.

    Raises:
        ValueError: ``max_positions`` is not in 1..config.max_positions, or the dtype is not allowed on the device.
    """

    def __init__(self, config: DrafterConfig, weights: DrafterWeights, *, max_positions: int | None = None) -> None:
        max_positions = config.max_positions if max_positions is None else max_positions
        if not 1 <= max_positions <= config.max_positions:
            raise ValueError(f"max_positions must be in 1..{config.max_positions} (the drafter's), got {max_positions}")
        _check_dtype(weights.dtype, weights.device)
        self.config, self.weights = config, _for_device(config, weights)
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.target_layer_ids: Sequence[int] = config.target_layer_ids
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.hidden_size, self.vocab_size, self.max_positions = config.hidden_size, config.vocab_size, max_positions
        self.cos_sin = config.rope.cos_sin_table(max_positions).to(weights.device)
        self.embed_weight = self.lm_head_weight = torch.empty(
            (0, config.hidden_size), dtype=weights.dtype, device=weights.device
        )
        self._windows, self._causal = list(config.windows), [int(c) for c in config.causal]
        self._fp8_chain = has_fp8_chain(self._matrices())
        self._nvfp4_chain = _nvfp4_scales(self.weights) if has_nvfp4_chain(self._matrices()) else None
        self._draft_buffers = _Buckets(self._new_draft_buffers)
        self._packed_buffers = _Buckets(self._new_packed_buffers)
        self._inject_buffers = _Buckets(self._new_inject_buffers)
        self._inject_plan: ops.InjectPlan | None = None
        self._packed: PackedDraft | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights, caches and hidden rows."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.device

    @property
    def bound(self) -> bool:
        """Whether :meth:`bind` has given it an embedding and an LM head."""
        return self.embed_weight.shape[0] > 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Drafter:
        """Move weights and table in place; returns the drafter itself. Where something changes, buffers start anew.

        Raises:
            ValueError: fp16, or another dtype than bf16 on CUDA.
        """
        device, dtype = torch.device(device), dtype or self.dtype
        _check_dtype(dtype, device)
        before = (self.device, self.dtype)
        self.weights = _for_device(self.config, self.weights.to(device, dtype))
        self.cos_sin = self.cos_sin.to(device)
        self.embed_weight = self.embed_weight.to(device, dtype)
        self.lm_head_weight = self.lm_head_weight.to(device, dtype)
        self._fp8_chain = has_fp8_chain(self._matrices())
        self._nvfp4_chain = _nvfp4_scales(self.weights) if has_nvfp4_chain(self._matrices()) else None
        if before != (self.device, self.dtype):
            self._draft_buffers = _Buckets(self._new_draft_buffers)
            self._inject_buffers = _Buckets(self._new_inject_buffers)
            self._inject_plan = None
            self._packed = None
            self._packed_buffers = _Buckets(self._new_packed_buffers)
        return self

    def bind(self, target: nn.Module, dtype: torch.dtype | None = None) -> Drafter:
        """Take the embedding and LM head of a transformers causal LM, and move to its device.

        They share the target's memory where the dtypes agree.

        Args:
            dtype: of the drafter; None: bf16 on CUDA, else the target's, fp32 where that is fp16.

        Raises:
            ValueError: another hidden size or vocabulary, or an LM head with a bias.
        """
        embedding: torch.Tensor = target.get_input_embeddings().weight  # type: ignore[operator]
        head: nn.Module = target.get_output_embeddings()  # type: ignore[operator]
        lm_head: torch.Tensor = head.weight  # type: ignore[assignment]
        if getattr(head, "bias", None) is not None:
            raise ValueError("drafter does not fit the target: an LM head without bias is needed, got one with a bias")
        expected = [self.vocab_size, self.hidden_size]
        for name, weight in (("embedding", embedding), ("LM head", lm_head)):
            if list(weight.shape) != expected:
                raise ValueError(
                    f"drafter does not fit the target: its {name} must have shape {expected}, got {list(weight.shape)}"
                )
        device = embedding.device
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else embedding.dtype
            dtype = torch.float32 if dtype == torch.float16 else dtype
        self.to(device, dtype)
        self.embed_weight = embedding.detach().to(dtype)
        tied = lm_head.data_ptr() == embedding.data_ptr()
        self.lm_head_weight = self.embed_weight if tied else lm_head.detach().to(dtype)
        return self

    def multiply_codes(self) -> Drafter:
        """Round activations to fp8, with NVFP4 weights to that, wherever a pass is a chain of kernels, also on the CPU,
        which by itself dequantises.

        To see what that does to drafts without a GPU; undone by :meth:`to`. Returns the drafter itself.

        Raises:
            ValueError: the layers' weights are neither fp8 nor nvfp4, or nvfp4 of columns that are no multiples of 32.
        """
        weight_format = self.weights.weight_format
        if weight_format is None or weight_format.kind not in ("fp8", "nvfp4"):
            raise ValueError(
                f"drafter must have fp8 or nvfp4 weights for activations in that, got {weight_format or 'bf16'}"
            )
        if weight_format.kind == "fp8":
            self._fp8_chain = True
        else:
            for name, matrix in zip(MATRICES, self._matrices(), strict=True):
                if matrix.shape[-1] % 32:
                    raise ValueError(f"drafter's {name} must have a multiple of 32 columns, got {matrix.shape[-1]}")
            self._nvfp4_chain = _nvfp4_scales(self.weights)
        self._draft_buffers = _Buckets(self._new_draft_buffers)
        return self

    def reserve(self, batch: int, tokens: int) -> None:
        """Allocate what steps of up to ``batch`` blocks and injections of up to ``tokens`` rows need, once."""
        self._draft_buffers.reserve(batch)
        if self._pack_layers() is not None:
            rows = streamed_tokens(self.weights.weight_format, self._fp8_chain)
            self._packed_buffers.reserve(min(batch, max(1, rows // self.block_size)))
        self._inject_buffers.reserve(tokens)
        self._plan_injection()

    def forward(
        self,
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """Final-normed hidden rows of the blocks over the context in the caches.

        Args:
            block_ids, positions: [B, T] int; slots: [B, T], not read: a block's own K and V are never cached.
            prefix_lens, req_pool_indices: [B] int; req_to_token: [R, W] int.
            k_caches, v_caches: L tensors [slots, Hkv, D] of this drafter's dtype.

        Returns:
            [B*T, H], valid until the next call of any size (the buffer is used again).

        Raises:
            ValueError: the drafter is not bound, or an argument does not fit (named by the op).
        """
        if not self.bound:
            raise ValueError("drafter must be bound to its target before it runs: call bind(target), got none")
        rows = block_ids.numel()
        w = self.weights
        packed = self._pack_layers() if self.why_not_one_kernel(rows) is None else None
        if packed is not None:
            buffer, workspace = self._packed_buffers.at_least(block_ids.shape[0])
            return ops.draft_forward_packed(
                block_ids,
                positions,
                prefix_lens,
                req_pool_indices,
                req_to_token,
                k_caches,
                v_caches,
                self.embed_weight,
                w.input_norm,
                w.qkv_bias,
                w.q_norm,
                w.k_norm,
                w.o_bias,
                w.post_norm,
                w.final_norm,
                self.cos_sin,
                packed,
                self._windows,
                self._causal,
                self.config.rms_norm_eps,
                out=buffer[:rows],
                workspace=workspace,
            )
        buffer, workspace = self._draft_buffers.at_least(block_ids.shape[0])
        if self._fp8_chain or self._nvfp4_chain is not None:
            assert w.quantized is not None
            qkv, o, gate_up, down = (w.quantized[name] for name in MATRICES)
            scales = [weight.scale for weight in (qkv, o, gate_up, down)]
            multiply: Callable[..., torch.Tensor] = ops.draft_forward_fp8
            if self._nvfp4_chain is not None:
                scales, blocks = self._nvfp4_chain
                multiply = partial(ops.draft_forward_nvfp4, blocks=blocks)
            return multiply(
                block_ids,
                positions,
                prefix_lens,
                req_pool_indices,
                req_to_token,
                k_caches,
                v_caches,
                self.embed_weight,
                w.input_norm,
                qkv.codes,
                scales[0],
                w.qkv_bias,
                w.q_norm,
                w.k_norm,
                o.codes,
                scales[1],
                w.o_bias,
                w.post_norm,
                gate_up.codes,
                scales[2],
                down.codes,
                scales[3],
                w.final_norm,
                self.cos_sin,
                self._windows,
                self._causal,
                self.config.rms_norm_eps,
                out=buffer[:rows],
                workspace=workspace,
            )
        return ops.draft_forward(
            block_ids,
            positions,
            prefix_lens,
            req_pool_indices,
            req_to_token,
            k_caches,
            v_caches,
            self.embed_weight,
            w.input_norm,
            w.qkv_weight,
            w.qkv_bias,
            w.q_norm,
            w.k_norm,
            w.o_weight,
            w.o_bias,
            w.post_norm,
            w.gate_up_weight,
            w.down_weight,
            w.final_norm,
            self.cos_sin,
            self._windows,
            self._causal,
            self.config.rms_norm_eps,
            out=buffer[:rows],
            workspace=workspace,
        )

    def inject(
        self,
        taps: list[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        commit_lens: torch.Tensor | None,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> None:
        """Write the context K and V of N rows into the caches.

        Args:
            taps: K tensors [N, H], the target's hidden states in the order of ``target_layer_ids``, any float dtype.
            positions, slots: [N] int.
            commit_lens: [B] int; of each run of N / B rows only the first ``commit_lens[b]`` are written. None: all.

        Raises:
            ValueError: an argument does not fit (named by the op).
        """
        rows = positions.numel()
        casts, workspace = self._inject_buffers.at_least(rows)
        if taps and taps[0].dtype != self.dtype:
            taps = [cast[:rows].copy_(tap) for cast, tap in zip(casts, taps, strict=True)]
        w = self.weights
        ops.inject_kv(
            taps,
            w.fc_weight,
            w.hidden_norm,
            w.kv_weight,
            w.kv_bias,
            w.k_norm,
            self.cos_sin,
            positions,
            slots,
            commit_lens,
            k_caches,
            v_caches,
            workspace,
            self.config.rms_norm_eps,
            self._plan_injection(),
        )

    def why_not_one_kernel(self, rows: int) -> str | None:
        """Why :meth:`forward` of `rows` = B * T is a chain of kernels; None: one kernel that streams the weights."""
        if self.device.type != "cuda":
            return f"the drafter is on {self.device.type}"
        config = self.config
        return why_not_packed(
            tokens=rows,
            num_layers=config.num_layers,
            head_dim=config.head_dim,
            dtype=self.weights.dtype,
            weight_format=self.weights.weight_format,
            fp8_chain=self._fp8_chain,
        )

    def _pack_layers(self) -> PackedDraft | None:
        """The layers' matrices once more, in the order that few rows stream them in; made once, on CUDA only.

        Not while a graph is captured: :meth:`reserve` before. None: the chain of kernels runs.
        """
        if self._packed is None and self.why_not_one_kernel(0) is None:
            if torch.cuda.is_current_stream_capturing():
                return None
            config, matrices = self.config, self._matrices()
            blocks = self._blocks()
            if blocks == 0:  # by measurement the chain is faster
                return None
            self._packed = pack_draft(
                *matrices, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, blocks=blocks
            )
        return self._packed

    def _matrices(self) -> tuple[Weight, Weight, Weight, Weight]:
        """Of all layers: codes where the drafter is quantised."""
        codes = self.weights.quantized or {}
        qkv, o, gate_up, down = (codes.get(name, getattr(self.weights, name)) for name in MATRICES)
        return qkv, o, gate_up, down

    def _blocks(self) -> int:
        """Of the one kernel; 0: it is not to be taken."""
        config, weight_format = self.config, self.weights.weight_format
        heads = (config.num_heads, config.num_kv_heads)
        shape = tuning.draft_shape(
            config.num_layers, config.hidden_size, config.intermediate_size, heads, config.head_dim, weight_format
        )
        return tuning.stream_blocks("draft", shape, self.device, self._default_blocks())

    def _default_blocks(self) -> int:
        return default_blocks(self._matrices(), self.device)

    def _new_packed_buffers(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._packed is not None
        out = torch.empty((batch * self.block_size, self.hidden_size), dtype=self.dtype, device=self.device)
        size = ops.draft_forward_packed_workspace(batch, self.block_size, self._packed)
        return out, torch.empty(size, dtype=torch.uint8, device=self.device)

    def _new_draft_buffers(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        c, rows = self.config, batch * self.config.block_size
        out = torch.empty((rows, c.hidden_size), dtype=self.dtype, device=self.device)
        needed = ops.draft_forward_fp8_workspace if self._fp8_chain else ops.draft_forward_workspace
        if self._nvfp4_chain is not None:
            needed = ops.draft_forward_nvfp4_workspace
        size = needed(batch, c.block_size, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim)
        return out, torch.empty(size, dtype=torch.uint8, device=self.device)

    def _plan_injection(self) -> ops.InjectPlan | None:
        """The weights of injection once more, in the order that few rows stream them in; made once, on CUDA only.

        Not while a graph is captured: :meth:`reserve` before.
        """
        if self._inject_plan is None and self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            w = self.weights
            self._inject_plan = ops.inject_kv_plan(w.fc_weight, w.kv_weight, self.config.head_dim)
        return self._inject_plan

    def _new_inject_buffers(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        casts = torch.empty((c.num_context_features, tokens, c.hidden_size), dtype=self.dtype, device=self.device)
        workspace = ops.inject_kv_workspace(
            tokens,
            c.hidden_size,
            c.num_layers,
            c.num_kv_heads,
            c.head_dim,
            dtype=self.dtype,
            device=self.device,
            num_taps=c.num_context_features,
        )
        return casts, workspace


class _Buckets:
    """Buffers by capacity. None is ever dropped: a captured graph may still hold the address of a smaller one."""

    def __init__(self, make: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._make = make
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, size: int) -> None:
        """Make sure that ``size`` fits."""
        if size > max(self._made, default=0):
            self._made[size] = self._make(size)

    def at_least(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest buffers that hold ``size``; new ones, rounded up to a power of two, where none do."""
        fitting = [capacity for capacity in self._made if capacity >= size]
        if not fitting:
            fitting = [1 << max(size - 1, 0).bit_length()]
            self.reserve(fitting[0])
        return self._made[min(fitting)]


def load_drafter(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_positions: int | None = None,
) -> Drafter:
    """Load a drafter directory (``config.json`` and safetensors, z-lab or speculators layout), not yet bound.

    Args:
        device: where the weights go now; binding moves them to the target's device.
        dtype: bf16, or fp32 on the CPU. None: bf16 on CUDA, else the file's (bf16 where that is fp16).
        max_positions: length of the rope table; None: all positions the drafter was made for.

    Raises:
        ValueError: the directory is no such drafter, has features that are not supported, or is damaged.
    """
    device = torch.device(device)
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16
    if dtype is not None:
        _check_dtype(dtype, device)
    config = load_config(path)
    weights = load_weights(path, config, dtype)
    return Drafter(config, weights.to(device, weights.dtype), max_positions=max_positions)


def _for_device(config: DrafterConfig, weights: DrafterWeights) -> DrafterWeights:
    """The weights as the kernels of their device read them."""
    if weights.weight_format is None or weights.device.type == "cpu":
        return weights
    if weights.quantized is not None and has_nvfp4_chain(list(weights.quantized.values())):
        return weights
    reason = why_not_packed(
        tokens=0,
        num_layers=config.num_layers,
        head_dim=config.head_dim,
        dtype=weights.dtype,
        weight_format=weights.weight_format,
    )
    if reason is None:
        return weights
    warnings.warn(
        f"no CUDA kernel reads this drafter's weights in format {weights.weight_format} ({reason}): they were "
        "dequantised to bf16, with the memory and the speed of bf16 weights",
        stacklevel=3,
    )
    return weights.dense()


def _nvfp4_scales(weights: DrafterWeights) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of the four matrices, as `draft_forward_nvfp4` takes them: of rows, and of groups in blocks."""
    assert weights.quantized is not None
    rows, blocks = [], []
    for name in MATRICES:
        weight = weights.quantized[name]
        assert weight.global_scale is not None
        rows.append(1.0 / weight.global_scale)
        blocks.append(scale_blocks(weight.scale, gated=name == "gate_up_weight"))
    return rows, blocks


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    allowed = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    if dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"drafter dtype must be {names} on {device.type}, got {str(dtype).removeprefix('torch.')}")
