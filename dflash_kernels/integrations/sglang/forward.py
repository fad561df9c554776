"""Seam `forward`: the drafter's pass over a block, from token ids to the final norm, inside the captured draft graph.

Replaces ``models/dflash.py`` DFlashDraftModel.forward on the worker's model, which the draft graph calls at capture
(``model_executor/runner/decode_cuda_graph_runner.py``) and which nothing else calls with a block of T tokens a request.
The block is embedded from its ids with the target's table, as the worker does before (``input_embeds`` stays unused).
The block's own K and V are not written to the pool: the worker writes the committed ones again when it injects, and
nobody reads the others.

Rounding is SGLang's: K and Q round after their norm and after the rotation, sums are in float32. The order of the sums
is not, so a draft token may differ where two logits all but tie; the output does not, as the target decides.

With tensor parallelism this rank's pass takes the parts of the weights that its linear layers hold, and there are two
sums over the ranks in a layer (``layers/linear.py`` RowParallelLinear) and one for the embedding
(``layers/vocab_parallel_embedding.py`` VocabParallelEmbedding). Where the GPUs have peer memory one kernel a rank makes
them itself. Else, and beyond the rows that it takes, a chain of kernels has them from the engine's own all-reduce: on
GPUs only where DFLASH_KERNELS_PEERS=0 asks for it, as it is slower than SGLang's pass (bench/NOTES.md). Whatever is
taken runs once before it is captured. A rank must not fall back alone, so an error after that ends the engine.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import torch

from dflash_kernels import tuning
from dflash_kernels.draft_stream import (
    MAX_RANKS,
    Exchange,
    PackedDraft,
    default_blocks,
    has_fp8_chain,
    pack_draft,
    streamed_tokens,
    why_not_packed,
)
from dflash_kernels.formats import QuantizedWeight
from dflash_kernels.integrations.sglang.ranks import PATIENCE, TRIAL_PATIENCE
from dflash_kernels.integrations.sglang.seam import (
    DraftPool,
    Refused,
    RotaryTable,
    Seam,
    Target,
    follow_loading,
    for_packing,
    max_positions,
    may_pack,
    require,
    require_norms,
    require_plain_drafter,
    require_weights,
)
from dflash_kernels.integrations.sglang.settings import PEERS_VARIABLE

MATRICES = ("qkv", "o", "gate_up", "down")
# Arguments of the server with which ranks do not each hold all rows, or sum what is allocated in a certain place.
UNKNOWN_SUMS = ("enable_symm_mem", "enable_attn_tp_input_scattered", "enable_pdmux")
# Of one kernel's rows beside the chain's, in the norm: both round to bfloat16, and quantised weights are others.
TRIAL_DIFFERENCE, TRIAL_DIFFERENCE_QUANTISED = 0.1, 0.5

# Of a block: ids and positions [B, T], prefix lengths and pool rows [B], the table, the caches of all layers.
Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]
]


class ForwardSeam(Seam):
    name = "forward"
    switchable = False
    targets = (
        Target(
            "sglang.srt.models.dflash",
            "DFlashDraftModel.forward",
            ("input_ids", "positions", "forward_batch", "input_embeds"),
            ("get_embedding", "pp_proxy_tensors"),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.captured_sizes: set[int] = set()  # batch sizes whose graphs hold this pass
        self.exchange: Exchange | None = None  # of the ranks' kernels

    def prepare(self, worker: Any) -> None:
        require_plain_drafter(worker)
        model = worker.draft_model
        for target in self.targets:
            target.check_function(type(model).forward)
        layers = list(model.layers)
        attentions = [layer.self_attn for layer in layers]
        self.block_size = int(worker.block_size)
        require(self.block_size <= 32, f"block size {self.block_size}, at most 32")
        require(not getattr(worker, "use_compact_draft_cache", False), "compact draft window")
        for layer in layers:
            attention = layer.self_attn
            parts = attention.total_num_heads // attention.num_heads
            require(parts == self.ranks.world, f"a drafter in {parts} parts on {self.ranks.world} ranks")
            require(type(layer.mlp.act_fn).__name__ == "SiluAndMul", f"activation {type(layer.mlp.act_fn).__name__}")
            require(not getattr(attention.attn, "logit_cap", 0), "a logit cap in the attention")
        self.windows, self.causal = _masks(attentions)
        self.eps = require_norms(
            [
                model.norm,
                *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
                *(norm for a in attentions for norm in (a.q_norm, a.k_norm)),
            ]
        )
        scales = {float(a.scaling) for a in attentions}
        require(len(scales) == 1, f"layers with different softmax scales {sorted(scales)}")
        self.scale = scales.pop()
        if self.ranks.world > 1:
            self._require_sums(worker, layers)
        self.embed = self._embedding(worker)
        groups = {
            "input_norm": [layer.input_layernorm for layer in layers],
            "qkv": [a.qkv_proj for a in attentions],
            "q_norm": [a.q_norm for a in attentions],
            "k_norm": [a.k_norm for a in attentions],
            "o": [a.o_proj for a in attentions],
            "post_norm": [layer.post_attention_layernorm for layer in layers],
            "gate_up": [layer.mlp.gate_up_proj for layer in layers],
            "down": [layer.mlp.down_proj for layer in layers],
        }
        every = [module.weight for modules in groups.values() for module in modules]
        self.dtype = require_weights([self.embed, model.norm.weight, *every])
        self.cos_sin = RotaryTable(attentions[0].rotary_emb, max_positions(worker))
        self.final_norm = model.norm.weight.detach()
        # Last, as it changes the model: every parameter becomes a view of a stack over the layers, so that nothing is
        # held twice, and weights that are loaded into the parameters later reach the stack.
        self.weights = {name: _stack(modules) for name, modules in groups.items()}

    def _embedding(self, worker: Any) -> torch.Tensor:
        require(float(getattr(worker, "_noise_embed_scale", 1.0)) == 1.0, "a scale on the block's embedding")
        require(getattr(worker, "_full_embed_gpu", None) is None, "DP attention")
        module = worker.model_runner.model.get_input_embeddings()
        require(type(module).__name__ == "VocabParallelEmbedding", f"target embedding {type(module).__name__}")
        method = getattr(module, "quant_method", None)
        plain = method is None or type(method).__name__ == "UnquantizedEmbeddingMethod"
        require(plain, f"quantised target embedding ({type(method).__name__})")
        self.look_up = module
        if self.ranks.world == 1:
            return module.weight.detach()
        require(int(module.tp_size) == self.ranks.world, f"a target embedding in {module.tp_size} parts")
        shard = module.shard_indices
        require(int(module.num_embeddings) == int(module.org_vocab_size), "added vocabulary")
        require(shard.num_org_elements > 0, "a rank without a part of the vocabulary")
        self.vocab_start, self.vocab_size = int(shard.org_vocab_start_index), int(module.org_vocab_size)
        return module.weight.detach()[: int(shard.num_org_elements)]

    def _require_sums(self, worker: Any, layers: list[Any]) -> None:
        """`Declined` unless the layers' sums are plain ones over all ranks."""
        arguments = getattr(worker, "server_args", None)
        for name in UNKNOWN_SUMS:
            require(not getattr(arguments, name, False), f"--{name.replace('_', '-')}")
        first = layers[0].self_attn
        width, inner = first.num_heads * first.head_dim, layers[0].mlp.down_proj.weight.shape[1]
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.o_proj, mlp.down_proj):
                require(getattr(linear, "reduce_results", False), "a layer whose sum over the ranks is elsewhere")
            require(attention.o_proj.weight.shape[1] == width, "an output projection that is cut in another way")
            require(mlp.down_proj.weight.shape[1] == inner, "MLPs that are cut in different ways")
            require(mlp.gate_up_proj.weight.shape[0] == 2 * inner, "an MLP that is cut in another way")

    def bind(self, worker: Any) -> None:
        from dflash_kernels import ops

        self.pool = DraftPool(worker, self.dtype)
        self.req_to_token = worker.draft_model_runner.req_to_token_pool.req_to_token
        model = worker.draft_model
        first = model.layers[0].self_attn
        hidden, device = self.embed.shape[1], self.embed.device
        inner = self.weights["down"].shape[2]

        def most(fp8_codes: bool) -> int:
            """Requests of a pass."""
            rows = self.settings.limit("forward", fp8_codes)
            return min(max(1, rows // self.block_size), self.req_to_token.shape[0])

        self.packed, self.note = self._pack(first)
        self.codes = self._chain_codes(most(fp8_codes=True) * self.block_size)
        if self.codes is not None:
            self.note += ", as codes for many rows as much again"
        batch = most(fp8_codes=self.codes is not None)
        needed = ops.draft_forward_workspace if self.codes is None else ops.draft_forward_fp8_workspace
        size = needed(batch, self.block_size, hidden, inner, first.num_heads, first.num_kv_heads, first.head_dim)
        if self.packed is not None:
            self.streamed = streamed_tokens(self.packed.weight_format, self.codes is not None)
            streamed = max(1, self.streamed // self.block_size)
            size = max(size, ops.draft_forward_packed_workspace(min(batch, streamed), self.block_size, self.packed))
            follow_loading(model, self._repack)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.out = torch.empty(batch * self.block_size, hidden, dtype=self.dtype, device=device)
        stock = model.forward

        # The graph runner looks for `input_embeds` in the signature.
        def forward(
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            forward_batch: Any,
            input_embeds: torch.Tensor | None = None,
            **rest: Any,
        ) -> Any:
            output = None
            if self.active and input_embeds is not None and self._fits(input_ids, forward_batch):
                try:
                    output = self._output(self.run(input_ids, positions, forward_batch))
                except Exception as error:
                    self.failed(error)
                    if self.ranks.world > 1:
                        raise Refused(f"dflash-kernels: seam {self.name} failed on one rank: {error}") from error
                    # Seam `inputs` may have left the embedding to this pass.
                    input_embeds = torch.nn.functional.embedding(input_ids, self.embed)
                    if self.settings.strict:
                        raise Refused(f"dflash-kernels: seam {self.name} failed: {error}") from error
            if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                change = self.captured_sizes.discard if output is None else self.captured_sizes.add
                change(int(forward_batch.batch_size))
            if output is not None:
                return output
            return stock(input_ids, positions, forward_batch, input_embeds, **rest)

        model.forward = forward

    def meet(self, worker: Any) -> None:
        """How the ranks' parts are summed, settled for all of them and tried."""
        held = self.embed.shape[0]
        parts = sorted(self.ranks.gather((self.vocab_start, self.vocab_start + held)))
        edges = [0, *(stop for _, stop in parts)]
        whole = all(start == edge for (start, _), edge in zip(parts, edges, strict=False))
        require(whole and edges[-1] == self.vocab_size, f"a vocabulary in parts {parts}")
        reason = self._meet_in_one_kernel()
        if reason:
            self.packed = None
            asked = self.settings.peers == "0" or self.embed.device.type == "cpu"
            require(asked, f"no sums over the ranks in one kernel: {reason}")
            self.note = f"sums over {self.ranks.world} ranks by the engine"
        else:
            self.note += f"; sums over {self.ranks.world} ranks in its kernel"
        failed, bits = self._try()
        tried = self.ranks.gather((failed, bits))
        require(not any(why for why, _ in tried), next((why for why, _ in tried if why), ""))
        require(len({bits for _, bits in tried}) == 1, "one kernel gave the ranks different rows")

    def _meet_in_one_kernel(self) -> str:
        """Why the sums are not made in one kernel; empty if they are. The same on all ranks."""
        from dflash_kernels.ops import draft_exchange_words

        world = self.ranks.world
        reasons = self.ranks.gather("" if self.packed is not None else self.note or "weights not packed")
        if any(reasons):
            return next(filter(None, reasons))
        if world > MAX_RANKS:
            return f"more than {MAX_RANKS} ranks"
        words = draft_exchange_words(world, self.embed.shape[1])
        self.exchange, reason = self.ranks.exchange(words, self.embed.device)
        return reason

    def _try(self) -> tuple[str, int]:
        """A pass of a block without context, before graphs hold such: what is wrong with it, and a sum over the bits
        of what one kernel gave, which must be alike on all ranks."""
        device, tokens = self.embed.device, self.block_size
        ids = torch.arange(tokens, device=device) * (self.vocab_size - 1) // max(1, tokens - 1)  # in all ranks' parts
        none = torch.zeros(1, dtype=torch.int64, device=device)
        block = SimpleNamespace(batch_size=1, seq_lens=none, req_pool_indices=none)
        try:
            inputs = self._inputs(ids, torch.arange(tokens, device=device), block)
            expected = self._chain(ids, inputs).float()
            if self.exchange is None:
                return ("" if bool(expected.isfinite().all()) else "rows that are not finite"), 0
            rows = self._one_kernel(inputs, self.out[:tokens], TRIAL_PATIENCE)
            difference = float((rows.float() - expected).norm() / expected.norm())
            bits = zlib.crc32(bytes(rows.cpu().view(torch.uint8).flatten().tolist()))
        except Exception as error:
            return f"{type(error).__name__}: {error}", 0
        most = TRIAL_DIFFERENCE if self.settings.weights is None else TRIAL_DIFFERENCE_QUANTISED
        fine = difference <= most
        return ("" if fine else f"one kernel's rows differ from the chain's by {difference:.3f} of their norm"), bits

    def _pack(self, attention: Any) -> tuple[PackedDraft | None, str]:
        """The layers' matrices once more, for the kernel that streams them, and a note for the table.

        Made before the graphs are captured. The graphs of all batch sizes share its counters: the draft graphs of a
        worker are replayed one after the other.
        """
        matrices = [self.weights[name] for name in MATRICES]
        if self.ranks.world > 1 and self.settings.peers == "0":
            return None, f"{PEERS_VARIABLE}=0"
        allowed, note = may_pack(self.settings, matrices)
        if not allowed:
            return None, note
        reason = why_not_packed(
            tokens=0, num_layers=len(self.windows), head_dim=attention.head_dim, dtype=matrices[0].dtype
        )
        if reason is not None:
            return None, f"weights not packed: {reason}"
        sizes = {"num_kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
        heads, inner = (attention.num_heads, attention.num_kv_heads), self.weights["down"].shape[2]
        shape = tuning.draft_shape(
            len(self.windows), self.embed.shape[1], inner, heads, attention.head_dim, self.settings.weights
        )
        device, alone = matrices[0].device, self.ranks.world == 1
        default = default_blocks(matrices, device) if alone else _all_blocks(device)
        sizes["blocks"] = tuning.stream_blocks("draft", shape, device, default) or (0 if alone else default)
        if sizes["blocks"] == 0:
            return None, "weights not packed: by this machine's tuning the chain of kernels is faster"
        self._pack_again = lambda: pack_draft(*(for_packing(self.settings, m) for m in matrices), **sizes)
        return self._pack_again(), note

    def _chain_codes(self, rows: int) -> list[QuantizedWeight] | None:
        """The packed matrices' codes once more, of fp8 where a pass may have more rows than are streamed, for
        `draft_forward_fp8`. None: those rows take the model's own weights."""
        packed = self.packed
        if self.ranks.world > 1:  # of that chain there are no parts
            return None
        if packed is None or packed.weight_format is None or rows <= streamed_tokens(packed.weight_format, True):
            return None
        allowed, _ = may_pack(self.settings, [self.weights[name] for name in MATRICES])
        if not allowed:
            return None
        codes = packed.unpack()
        return [code for code in codes if isinstance(code, QuantizedWeight)] if has_fp8_chain(codes) else None

    def _repack(self) -> None:
        """Weights that were loaded later, at the addresses that the graphs know."""
        if self.packed is None:
            return
        self.packed.weights.copy_(self._pack_again().weights)
        if self.codes is not None:
            for held, loaded in zip(self.codes, self.packed.unpack(), strict=True):
                assert isinstance(loaded, QuantizedWeight)
                held.codes.copy_(loaded.codes)
                held.scale.copy_(loaded.scale)

    def _fits(self, input_ids: torch.Tensor, forward_batch: Any) -> bool:
        rows = input_ids.numel()
        return (
            0 < rows <= self.out.shape[0]
            and forward_batch.forward_mode.is_target_verify()
            and rows == forward_batch.batch_size * self.block_size
        )

    @staticmethod
    def _output(hidden: torch.Tensor) -> Any:
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden)

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """Hidden rows ``[B * T, H]`` of a block a request."""
        from dflash_kernels.ops import draft_forward, draft_forward_fp8, draft_forward_packed

        self.pool.refresh()
        weights, inputs = self.weights, self._inputs(input_ids, positions, forward_batch)
        out = self.out[: input_ids.numel()]
        streams = self.packed is not None and input_ids.numel() <= self.streamed
        if self.ranks.world > 1:
            return (
                self._one_kernel(inputs, out)
                if streams and self.exchange is not None
                else self._chain(input_ids, inputs)
            )
        embedded = (*inputs, self.embed, weights["input_norm"])
        if self.packed is not None and streams:
            return draft_forward_packed(
                *embedded,
                None,
                weights["q_norm"],
                weights["k_norm"],
                None,
                weights["post_norm"],
                self.final_norm,
                self.cos_sin.table,
                self.packed,
                self.windows,
                self.causal,
                self.eps,
                self.scale,
                out=out,
                workspace=self.workspace,
            )
        if self.codes is not None:
            qkv, o, gate_up, down = self.codes
            return draft_forward_fp8(
                *embedded,
                qkv.codes,
                qkv.scale,
                None,
                weights["q_norm"],
                weights["k_norm"],
                o.codes,
                o.scale,
                None,
                weights["post_norm"],
                gate_up.codes,
                gate_up.scale,
                down.codes,
                down.scale,
                self.final_norm,
                self.cos_sin.table,
                self.windows,
                self.causal,
                self.eps,
                self.scale,
                out=out,
                workspace=self.workspace,
            )
        return draft_forward(
            *embedded,
            weights["qkv"],
            None,
            weights["q_norm"],
            weights["k_norm"],
            weights["o"],
            None,
            weights["post_norm"],
            weights["gate_up"],
            weights["down"],
            self.final_norm,
            self.cos_sin.table,
            self.windows,
            self.causal,
            self.eps,
            self.scale,
            out=out,
            workspace=self.workspace,
        )

    def _inputs(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Inputs:
        """The first arguments of every op."""
        batch = int(forward_batch.batch_size)
        return (
            input_ids.view(batch, self.block_size),
            positions.view(batch, self.block_size),
            forward_batch.seq_lens[:batch],
            forward_batch.req_pool_indices[:batch],
            self.req_to_token,
            self.pool.k,
            self.pool.v,
        )

    def _one_kernel(self, inputs: Inputs, out: torch.Tensor, patience: float = PATIENCE) -> torch.Tensor:
        """This rank's part of the pass, with the sums inside."""
        from dflash_kernels.ops import draft_forward_sharded

        assert self.packed is not None and self.exchange is not None
        weights = self.weights
        return draft_forward_sharded(
            *inputs,
            self.embed,
            weights["input_norm"],
            None,
            weights["q_norm"],
            weights["k_norm"],
            None,
            weights["post_norm"],
            self.final_norm,
            self.cos_sin.table,
            self.packed,
            self.windows,
            self.causal,
            self.eps,
            self.exchange,
            self.vocab_start,
            self.vocab_size,
            self.scale,
            patience=patience,
            out=out,
            workspace=self.workspace,
        )

    @torch.no_grad()
    def _chain(self, input_ids: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """This rank's part of the pass between sums by the engine."""
        from dflash_kernels.ops import draft_attention, draft_mlp

        weights, ranks = self.weights, self.ranks
        _, positions, seq_lens, req_pool_indices, req_to_token, k_caches, v_caches = inputs
        x = self.look_up(input_ids).contiguous()
        first = ranks.rank == 0  # whose part brings the residual along
        for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
            part = draft_attention(
                x,
                positions,
                seq_lens,
                req_pool_indices,
                req_to_token,
                k_cache,
                v_cache,
                weights["input_norm"][i],
                weights["qkv"][i],
                None,
                weights["q_norm"][i],
                weights["k_norm"][i],
                weights["o"][i],
                None,
                self.cos_sin.table,
                self.windows[i],
                bool(self.causal[i]),
                self.eps,
                self.scale,
                add_x=first,
                out=torch.empty_like(x),
                workspace=self.workspace,
            )
            x = ranks.total(part)
            part = draft_mlp(
                x,
                weights["post_norm"][i],
                weights["gate_up"][i],
                weights["down"][i],
                self.eps,
                add_x=first,
                out=torch.empty_like(x),
                workspace=self.workspace,
            )
            x = ranks.total(part)
        return torch.nn.functional.rms_norm(x, (x.shape[1],), self.final_norm, self.eps)


def _all_blocks(device: torch.device) -> int:
    """One a multiprocessor: fewer were not measured with the sums over ranks inside."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _masks(attentions: list[Any]) -> tuple[list[int], list[int]]:
    """Window and causality of each layer.

    Source: ``models/dflash.py`` _get_dflash_layer_attention_params: a window is stored as the tokens to the left of the
    query, -1 for none; ENCODER_ONLY sees the whole block, DECODER is causal in it.
    """
    windows, causal = [], []
    for attention in attentions:
        kind, left = attention.attn_type.name, int(attention.sliding_window_size)
        require(kind in ("ENCODER_ONLY", "DECODER"), f"attention type {kind}")
        require(left < 0 or kind == "DECODER", "a sliding window without causality")
        windows.append(left + 1 if left >= 0 else 0)
        causal.append(int(kind == "DECODER"))
    return windows, causal


def _stack(modules: list[Any]) -> torch.Tensor:
    stacked = torch.stack([module.weight.detach() for module in modules]).contiguous()
    for module, view in zip(modules, stacked.unbind(0), strict=True):
        module.weight.data = view
    return stacked
