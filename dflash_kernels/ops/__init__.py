"""The Python face of `torch.ops.dflash`, one module per op group."""

from dflash_kernels.ops.alloc import init_free_pages, prepare_block, release_kv_slots, reserve_kv_slots

__all__ = [
    "init_free_pages",
    "prepare_block",
    "release_kv_slots",
    "reserve_kv_slots",
]
