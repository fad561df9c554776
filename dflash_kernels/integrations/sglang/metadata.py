"""Seam `metadata`: attention metadata of both graphs, before each replay, in one launch or two instead of ten.

``layers/attention/flashattention_backend.py`` FlashAttentionBackend.init_forward_metadata_out_graph fills lengths,
their prefix sums and the page table from the graph's input buffers: five kernels a graph for a block to verify, from
the same addresses into the same addresses at every step of a batch size. They are captured in a graph of their own,
at the second step of a batch size; what its replay leaves is compared with what the kernels left before it is used.
For the drafter they are left out where this package's forward is in its graph, which reads lengths and slots itself.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import Seam, Target, require

BACKEND_MODULE = "sglang.srt.layers.attention.flashattention_backend"
FILLED = ("cache_seqlens_int32", "cu_seqlens_k", "page_table")


class MetadataSeam(Seam):
    name = "metadata"
    targets = (
        Target(
            BACKEND_MODULE, "FlashAttentionBackend.init_forward_metadata_out_graph", ("forward_batch",), ("in_capture",)
        ),
        # A version that translates slots or plans on the host has other parameters.
        Target(
            BACKEND_MODULE,
            "FlashAttentionBackend._apply_cuda_graph_metadata",
            (
                "bs",
                "req_pool_indices",
                "seq_lens",
                "seq_lens_sum",
                "encoder_lens",
                "forward_mode",
                "spec_info",
                "seq_lens_cpu",
            ),
            ("out_cache_loc",),
        ),
    )

    def captured(self, worker: Any) -> None:
        runners = (worker.model_runner, worker.draft_model_runner)
        graphs = [getattr(runner, "decode_cuda_graph_runner", None) for runner in runners]
        require(None not in graphs, "no graphs of target or drafter")
        target, draft = (graph.attn_backend for graph in graphs if graph is not None)
        require(target is not draft, "one attention backend for target and drafter")
        for backend in (target, draft):
            self._require_device_only(backend)
        self.graphs: dict[tuple[int, ...], _Replay | None] = {}
        # Replays follow each other on one stream, so what they keep in between may share memory.
        self.memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.forward = worker._dflash_seams["forward"]
        self._replay(target)
        self._replay(draft)
        self._leave_out(draft)

    def _require_device_only(self, backend: Any) -> None:
        kind = type(backend)
        require(kind.__name__ == "FlashAttentionBackend", f"attention backend {kind.__name__}")
        for target in self.targets:
            target.check_function(getattr(kind, target.qualname.rpartition(".")[2]))
        require(not backend.needs_cpu_seq_lens, "lengths that the host reads")
        require(not backend.use_sliding_window_kv_pool, "a KV pool with a sliding window")
        require(backend.topk <= 1, "trees")

    def _leave_out(self, backend: Any) -> None:
        stock = backend.init_forward_metadata_out_graph

        def init_forward_metadata_out_graph(forward_batch: Any, in_capture: bool = False) -> None:
            unused = (
                self.active
                and not in_capture
                and forward_batch.forward_mode.is_target_verify()
                and int(forward_batch.batch_size) in self.forward.captured_sizes
            )
            if not unused:
                stock(forward_batch, in_capture=in_capture)

        backend.init_forward_metadata_out_graph = init_forward_metadata_out_graph

    def _replay(self, backend: Any) -> None:
        stock = backend.init_forward_metadata_out_graph

        def init_forward_metadata_out_graph(forward_batch: Any, in_capture: bool = False) -> None:
            usual = (
                self.active
                and not in_capture
                and forward_batch.forward_mode.is_target_verify()
                and getattr(forward_batch, "encoder_lens", None) is None
                and getattr(forward_batch.spec_info, "ragged_verify_layout", None) is None
            )
            if not usual:
                stock(forward_batch, in_capture=in_capture)
                return
            batch = int(forward_batch.batch_size)
            key = (id(backend), batch, forward_batch.seq_lens.data_ptr(), forward_batch.req_pool_indices.data_ptr())
            replay = self.graphs.get(key)
            if replay is not None and replay.fits():
                replay()
                return
            stock(forward_batch, in_capture=in_capture)
            if key not in self.graphs or replay is not None:
                self.graphs[key] = None  # kernels are compiled and loaded now
                return
            try:
                self.graphs[key] = _Replay(backend, batch, lambda: stock(forward_batch, in_capture=False), self.memory)
            except Exception as error:
                self.failed(error)
                stock(forward_batch, in_capture=in_capture)

        backend.init_forward_metadata_out_graph = init_forward_metadata_out_graph


class _Replay:
    """One batch size's metadata kernels as a graph, checked against what they have just left."""

    def __init__(self, backend: Any, batch: int, run: Any, memory: Any) -> None:
        self.backend, self.metadata, self.batch = backend, backend.forward_metadata, batch
        require(self.metadata is backend.target_verify_metadata[batch], "metadata of another batch size")
        filled = [getattr(self.metadata, name) for name in FILLED]
        expected = [tensor.clone() for tensor in filled]
        device = expected[0].device
        self.graph = capture(run, device, memory)
        filled[0].fill_(-1)
        filled[1][1:].fill_(-1)  # a sum begins with a 0 that is not written; the page table is, as far as lengths say
        self()
        if not all(torch.equal(a, b) for a, b in zip(filled, expected, strict=True)):
            raise RuntimeError("captured attention metadata differs")

    def fits(self) -> bool:
        """Whether the backend still has the tensors that are filled here; it makes others when it captures again."""
        return self.backend.target_verify_metadata.get(self.batch) is self.metadata

    def __call__(self) -> None:
        self.graph.replay()
        self.backend.forward_metadata = self.metadata
        self.backend.forward_metadata_spec_decode_expand = None


def capture(run: Any, device: torch.device, memory: Any) -> torch.cuda.CUDAGraph:
    """``run`` as a graph, captured beside whatever other streams and threads are doing."""
    graph = torch.cuda.CUDAGraph()
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=memory, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph
