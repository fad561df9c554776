"""The Python face of `torch.ops.dflash`, one module per op group."""

from dflash_kernels.ops.alloc import (
    init_free_pages,
    prepare_block,
    release_kv_slots,
    reserve_and_prepare_block,
    reserve_kv_slots,
)
from dflash_kernels.ops.dflash2 import grouped_conv, select_path
from dflash_kernels.ops.draft import (
    draft_forward,
    draft_forward_fp8,
    draft_forward_fp8_supported,
    draft_forward_fp8_workspace,
    draft_forward_nvfp4,
    draft_forward_nvfp4_workspace,
    draft_forward_workspace,
)
from dflash_kernels.ops.draft_layer import draft_attention, draft_mlp
from dflash_kernels.ops.draft_packed import (
    draft_exchange_words,
    draft_forward_packed,
    draft_forward_packed_workspace,
    draft_forward_sharded,
)
from dflash_kernels.ops.gemm import gemm_fp8, gemm_nvfp4, gemm_nvfp4_supported
from dflash_kernels.ops.head import (
    lm_head_argmax,
    lm_head_topk,
    lm_head_topk_workspace,
    lm_head_workspace,
    verify_block_from_hidden,
)
from dflash_kernels.ops.head_fp8 import lm_head_argmax_fp8
from dflash_kernels.ops.head_packed import lm_head_argmax_packed, lm_head_argmax_packed_workspace
from dflash_kernels.ops.inject import (
    InjectPlan,
    inject_kv,
    inject_kv_fuse,
    inject_kv_plan,
    inject_kv_project,
    inject_kv_sharded,
    inject_kv_workspace,
)
from dflash_kernels.ops.quantize import quantize_rows, quantize_rows_nvfp4, rmsnorm_quantize_rows
from dflash_kernels.ops.verify import (
    Verified,
    argmax_logits,
    merge_exchange_words,
    merge_vocab_ranks,
    merge_vocab_shards,
    verify_block,
    verify_block_sampled,
    verify_workspace,
)

__all__ = [
    "argmax_logits",
    "draft_attention",
    "draft_exchange_words",
    "draft_forward",
    "draft_forward_fp8",
    "draft_forward_fp8_supported",
    "draft_forward_fp8_workspace",
    "draft_forward_nvfp4",
    "draft_forward_nvfp4_workspace",
    "draft_forward_packed",
    "draft_forward_packed_workspace",
    "draft_forward_sharded",
    "draft_forward_workspace",
    "draft_mlp",
    "gemm_fp8",
    "gemm_nvfp4",
    "gemm_nvfp4_supported",
    "grouped_conv",
    "init_free_pages",
    "inject_kv",
    "inject_kv_fuse",
    "inject_kv_plan",
    "inject_kv_project",
    "inject_kv_sharded",
    "inject_kv_workspace",
    "InjectPlan",
    "lm_head_argmax",
    "lm_head_argmax_fp8",
    "lm_head_argmax_packed",
    "lm_head_argmax_packed_workspace",
    "lm_head_topk",
    "lm_head_topk_workspace",
    "lm_head_workspace",
    "merge_exchange_words",
    "merge_vocab_ranks",
    "merge_vocab_shards",
    "prepare_block",
    "quantize_rows",
    "quantize_rows_nvfp4",
    "release_kv_slots",
    "reserve_and_prepare_block",
    "reserve_kv_slots",
    "rmsnorm_quantize_rows",
    "select_path",
    "Verified",
    "verify_block",
    "verify_block_from_hidden",
    "verify_block_sampled",
    "verify_workspace",
]
