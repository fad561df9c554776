"""Seam `inputs`: a step's block is prepared where the CUDA graphs read it, so that copying it there launches nothing.

Makes the worker's block buffers (``dflash_worker_v2.py`` _ensure_draft_block_buffers) views of the input buffers of its
graphs (``model_executor/runner/decode_cuda_graph_runner.py``), which drafter and target share. The copies into them
remain, but between equal views torch copies nothing. Positions and slots hold until the injection, ids until the draft
tokens take their place; no step reads another's.

Where this package's forward is in the drafter's graph, which embeds the block itself, the embedding that the worker
looks up for it is not computed either: in its place comes the graph's own, unused input buffer.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, Seam, Target, require

# The worker's buffer, the graph runner's, and whose runner: draft tokens go to the target, the others to the drafter.
VIEWS = (
    ("_draft_block_ids_buf", "input_ids", "draft_model_runner"),
    ("_draft_block_positions_buf", "positions", "draft_model_runner"),
    ("_draft_verify_out_cache_loc_buf", "out_cache_loc", "draft_model_runner"),
    ("_draft_block_tokens_buf", "input_ids", "model_runner"),
)


class InputsSeam(Seam):
    name = "inputs"
    switchable = False
    targets = (Target(WORKER_MODULE, "DFlashWorkerV2._ensure_draft_block_buffers", ("bs",)),)

    def prepare(self, worker: Any) -> None:
        require(
            not hasattr(worker.model_runner, "kv_index_translator"), "slot ids that are translated between the graphs"
        )
        require(not getattr(worker, "use_compact_draft_cache", False), "compact draft window")
        for name, *_ in VIEWS:
            require(hasattr(worker, name), f"a worker without {name}")

    def captured(self, worker: Any) -> None:
        block_size = int(worker.block_size)
        runners = {name: _runner(worker, name) for name in ("draft_model_runner", "model_runner")}
        most = min(int(runner.max_bs) for runner in runners.values())
        buffers = {}
        for name, source, owner in VIEWS:
            buffer = getattr(runners[owner].buffers, source)
            require(
                buffer.dtype is torch.int64 and buffer.dim() == 1 and buffer.is_contiguous(), f"the graphs' {source}"
            )
            require(buffer.numel() >= most * block_size, f"{buffer.numel()} {source} in the graphs")
            buffers[name] = buffer[: most * block_size].view(most, block_size)
        worker._ensure_draft_block_buffers(most)
        require(worker._draft_block_ids_buf.shape[0] == most, "block buffers for more requests than the graphs")
        for name, view in buffers.items():
            setattr(worker, name, view)
        self._skip_embedding(worker, runners["draft_model_runner"])

    def _skip_embedding(self, worker: Any, runner: Any) -> None:
        self.skipping = False
        self.forward = worker._dflash_seams["forward"]
        self.sizes = sorted(int(n) for n in runner.capture_bs)
        unused = runner.buffers.input_embeds
        if not self.forward.active or unused is None:
            return
        model = worker.model_runner.model
        stock = model.get_input_embeddings

        def instead(block_ids: torch.Tensor) -> torch.Tensor:
            return unused[: block_ids.numel()].view(*block_ids.shape, -1)

        model.get_input_embeddings = lambda: instead if self.skipping else stock()
        self.note = "the block's embedding is looked up in the drafter's graph alone"

    def start_step(self, batch: Any) -> None:
        if not hasattr(self, "forward"):
            return
        self.skipping = False
        if self.active and self.forward.active and not batch.forward_mode.is_extend() and not batch.is_extend_in_batch:
            bucket = next((size for size in self.sizes if size >= len(batch.seq_lens)), 0)
            self.skipping = bucket in self.forward.captured_sizes

    def end_step(self) -> None:
        self.skipping = False


def _runner(worker: Any, owner: str) -> Any:
    runner = getattr(getattr(worker, owner), "decode_cuda_graph_runner", None)
    require(runner is not None and getattr(runner, "buffers", None) is not None, f"no graphs of the {owner}")
    return runner
