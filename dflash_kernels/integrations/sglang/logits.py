"""Seam `logits`: greedy verification reads the target's bfloat16 logits as the LM head leaves them.

The target's verify graph copies the logits to float32 (``layers/logits_processor.py`` LogitsProcessor._get_logits,
_copy_logits_to_buffer) for ``dflash_worker_v2.py`` forward_batch_generation to take ``torch.argmax`` of. The copy is
exact, so the argmax of the bfloat16 logits is the same token, and costs 2 bytes an element instead of 2 + 4 + 4.

In a verify pass that is captured, the LM head therefore writes into a bfloat16 buffer that all batch sizes share, and
that is what the pass returns. A step that needs more than its argmax (sampling, penalties, a grammar, a logit bias, a
custom processor) or that this seam is switched off for gets the float32 copy first, in the engine's own buffer. Passes
that are not captured, other heads, and logits that are scaled or capped stay stock.

With tensor parallelism a rank's verify pass returns the logits of its part of the vocabulary, which SGLang gathers over
the ranks inside the graph. A greedy step compares the ranks' best tokens instead; any other one gathers the logits
after the pass. As the ranks have to do the same, the seam is then not switched, and an error in it ends the engine.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dflash_kernels.integrations.sglang.ranks import Merge
from dflash_kernels.integrations.sglang.seam import MEMORY_LEFT, Refused, Seam, Target, require

PROCESSOR_MODULE = "sglang.srt.layers.logits_processor"

# Of SamplingBatchInfo (``sampling/sampling_batch_info.py``), what changes logits where it is not None.
ADJUSTMENTS = ("acc_linear_penalties", "acc_additive_penalties", "acc_scaling_penalties", "vocab_mask", "logit_bias")


class GreedyLogits(torch.Tensor):
    """Verified logits that are asked for nothing but their argmax over the last dimension."""

    seam: ClassVar[LogitsSeam | None] = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.argmax and len(args) == 1 and kwargs == {"dim": -1} and cls.seam is not None:
                return cls.seam.top1(args[0].as_subclass(torch.Tensor))
            return func(*args, **(kwargs or {}))


class LogitsSeam(Seam):
    name = "logits"
    targets = (
        Target(
            PROCESSOR_MODULE,
            "LogitsProcessor._get_logits",
            ("hidden_states", "lm_head", "logits_metadata"),
            ("embedding_bias", "use_logits_buffer"),
        ),
        # A version that casts and caps in one kernel, or lets the head write float32, is not known here.
        Target(
            PROCESSOR_MODULE, "LogitsProcessor._copy_logits_to_buffer", ("logits", "logits_metadata"), ("use_buffer",)
        ),
        Target(PROCESSOR_MODULE, "LogitsProcessor._compute_lm_head", ("hidden_states", "lm_head"), ("embedding_bias",)),
    )

    def prepare(self, worker: Any) -> None:
        """Before the target's graphs are captured, which is before `bind`."""
        found = [m for m in worker.model_runner.model.modules() if type(m).__name__ == "LogitsProcessor"]
        require(len(found) == 1, f"{len(found)} logits processors in the target")
        (processor,) = found
        for target in self.targets:
            target.check_function(getattr(type(processor), target.qualname.rpartition(".")[2]))
        several = self.ranks.world > 1
        require(bool(processor.do_tensor_parallel_all_gather) == several, "logits that are gathered in another way")
        require(not processor.do_tensor_parallel_all_gather_dp_attn, "DP attention")
        require(processor.logit_scale is None, "scaled logits")
        require(not processor.final_logit_softcapping, "capped logits")
        require(not processor.use_fp32_lm_head, "an LM head in float32")
        require(processor.rl_on_policy_target is None, "rl_on_policy_target")
        self.vocab_size = int(processor.vocab_size)
        self.vocab_start, self.width = 0, self.vocab_size  # of this rank's logits
        self.merge: Merge | None = None
        if several:
            self._require_part(worker, processor)
        self.buffers: list[torch.Tensor] = []  # every one that a graph may hold
        self.floats: torch.Tensor | None = None
        self.greedy = False
        self._capture(processor)
        self._settle_after(worker._target_worker)

    def _require_part(self, worker: Any, processor: Any) -> None:
        """`Declined` unless the head's rows are this rank's part of the vocabulary, of as many rows on all ranks."""
        require(not processor.use_attn_tp_group, "an LM head over the ranks of the attention")
        head = worker.model_runner.model.lm_head
        shard, held = head.shard_indices, int(head.weight.shape[0])
        require(shard.num_added_elements == 0, "added vocabulary")
        require(shard.num_org_elements > 0, "a rank without a part of the vocabulary")
        require(shard.org_vocab_start_index == self.ranks.rank * held, "a vocabulary that is cut in another way")
        require(held * self.ranks.world >= self.vocab_size, "a vocabulary that is cut in another way")
        self.vocab_start, self.width, self.held = int(shard.org_vocab_start_index), int(shard.num_org_elements), held
        self.switchable = False

    def bind(self, worker: Any) -> None:
        from dflash_kernels.ops import verify_workspace

        require(self.buffers, self.note or "no verify pass was captured")
        rows, device = self.buffers[-1].shape[0], self.buffers[-1].device
        self.ids = torch.empty(rows, dtype=torch.int64, device=device)
        self.values = torch.empty(rows, dtype=torch.float32, device=device)
        self.workspace = verify_workspace(rows, 1, device)
        self.note = f"a buffer of {sum(b.nbytes for b in self.buffers) / 1e9:.2f} GB"
        GreedyLogits.seam = self
        if self.ranks.world > 1:
            self.best_ids, self.best_values = torch.empty_like(self.ids), torch.empty_like(self.values)
            self.merge = Merge(self.ranks.group, rows, device)

    def meet(self, worker: Any) -> None:
        assert self.merge is not None
        self.note += f"; tokens {self.merge.meet(self.ranks, self.settings)}"

    def start_step(self, batch: Any) -> None:
        """Whether the step that begins asks for the argmax alone."""
        info = getattr(batch, "sampling_info", None)
        penalizer = getattr(info, "penalizer_orchestrator", None)
        self.greedy = (
            not getattr(batch, "return_logprob", False)
            and not getattr(batch, "has_grammar", False)
            and (
                info is None
                or (
                    bool(info.is_all_greedy)
                    and not getattr(info, "has_custom_logit_processor", False)
                    and all(getattr(info, name, None) is None for name in ADJUSTMENTS)
                    and (penalizer is None or not penalizer.is_required)
                )
            )
        )

    def _capture(self, processor: Any) -> None:
        """Let captured verify passes return bfloat16 logits."""
        stock = processor._get_logits

        def _get_logits(
            hidden_states: torch.Tensor,
            lm_head: Any,
            logits_metadata: Any,
            embedding_bias: torch.Tensor | None = None,
            use_logits_buffer: bool = True,
        ) -> torch.Tensor:
            if use_logits_buffer and embedding_bias is None and self._fits(hidden_states, lm_head, logits_metadata):
                buffer = self._buffer(hidden_states.shape[0], lm_head.weight)
                if buffer is not None:
                    self._remember(logits_metadata.next_token_logits_buffer)
                    torch.matmul(hidden_states.detach(), lm_head.weight.detach().T, out=buffer)
                    return buffer[:, : self.width]
            return stock(hidden_states, lm_head, logits_metadata, embedding_bias, use_logits_buffer)

        processor._get_logits = _get_logits

    def _fits(self, hidden: torch.Tensor, lm_head: Any, metadata: Any) -> bool:
        """Source: LogitsProcessor._compute_lm_head, its plain branch, and the condition of _copy_logits_to_buffer."""
        floats, weight = getattr(metadata, "next_token_logits_buffer", None), getattr(lm_head, "weight", None)
        method = type(getattr(lm_head, "quant_method", None)).__name__
        return (
            self.agreed
            and floats is not None
            and floats.dtype is torch.float32
            and tuple(floats.shape) == (hidden.shape[0], self.vocab_size)
            and metadata.forward_mode.is_target_verify()
            and not hasattr(lm_head, "set_lora")
            and method in ("NoneType", "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
            and isinstance(weight, torch.Tensor)
            and weight.dtype is hidden.dtype is torch.bfloat16
            and (weight.shape[0] >= self.vocab_size if self.ranks.world == 1 else weight.shape[0] == self.held)
        )

    def _buffer(self, rows: int, weight: torch.Tensor) -> torch.Tensor | None:
        """``rows`` of the shared buffer, which the first, largest batch size makes in its warm-up."""
        if self.buffers and self.buffers[-1].shape[0] >= rows:
            return self.buffers[-1][:rows]
        fits = True
        if weight.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            free, _ = torch.cuda.mem_get_info(weight.device)
            size = rows * weight.shape[0] * 2
            fits = free >= size + MEMORY_LEFT
            if not fits:
                self.note = f"{free / 1e9:.1f} GB free, {(size + MEMORY_LEFT) / 1e9:.1f} needed"
        if not all(self.ranks.gather(fits)):  # on all ranks, which capture the same sizes at the same time
            return None
        with torch.inference_mode(False):  # it is written outside of inference mode, too
            self.buffers.append(torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device))
        return self.buffers[-1]

    def _remember(self, floats: torch.Tensor) -> None:
        if self.floats is None or self.floats.shape[0] < floats.shape[0]:
            self.floats = floats

    def _settle_after(self, target_worker: Any) -> None:
        stock = target_worker.forward_batch_generation

        def forward_batch_generation(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            if kwargs.get("is_verify"):
                self._settle(result.logits_output)
            return result

        target_worker.forward_batch_generation = forward_batch_generation

    def _settle(self, output: Any) -> None:
        """Bfloat16 logits of ours as what the step needs; whether the seam is active or not."""
        logits = output.next_token_logits
        if logits is None or all(logits.data_ptr() != buffer.data_ptr() for buffer in self.buffers):
            return
        if self.active and self.greedy:
            output.next_token_logits = logits.as_subclass(GreedyLogits)
            return
        assert self.floats is not None
        if self.ranks.group is not None:
            whole = torch.as_strided(logits, (logits.shape[0], self.held), (self.held, 1))
            logits = self.ranks.group.all_gather(whole, dim=-1)[:, : self.vocab_size]
        output.next_token_logits = self.floats[: logits.shape[0]].copy_(logits)

    def top1(self, logits: torch.Tensor) -> torch.Tensor:
        """``torch.argmax(logits, dim=-1)``."""
        from dflash_kernels.ops import argmax_logits

        rows = logits.shape[0]
        best = (self.ids[:rows], self.values[:rows])
        try:
            argmax_logits(logits, self.vocab_start, out=best, workspace=self.workspace)
            if self.merge is None:
                return best[0]
            self.merge(*best, (self.best_ids[:rows], self.best_values[:rows]))
            return self.best_ids[:rows]
        except Exception as error:
            self.failed(error)
            if self.merge is not None:
                raise Refused(f"dflash-kernels: seam {self.name} failed on one rank: {error}") from error
            return torch.argmax(logits, dim=-1)
