"""The drafter's paged KV pool: caches, page table, device free list, and the host ledger that guards them.

Every request owns one *pool row*: row ``r`` of ``req_to_token`` maps its positions to slots. Rows ``rows .. 2*rows``
never own a page; they stand in for the unused rows of a padded batch, so that rows stay distinct. Page 0 is the dummy
page: unmapped positions point at slot 0, whose content nobody reads.

Pages are booked twice. The *ledger* on the host books a request's largest possible length when it is admitted, so the
device can never run dry; the *device allocator* hands out the pages one step at a time, without the host waiting.
"""

from __future__ import annotations

import torch

from dflash_kernels import ops
from dflash_kernels.ledger import KvLedger


class DrafterKvPool:
    """Drafter KV caches of ``num_layers`` layers for ``rows`` requests of up to ``max_positions`` tokens.

    Attributes:
        k_caches, v_caches: per layer ``[slots, Hkv, D]``.
        req_to_token: ``[2*rows, W]`` int32, W = max_positions rounded up to whole pages.
        alloc_lens: ``[2*rows]`` int32; free_pages ``[P]`` int32; ring ``[4]`` int64: the device allocator's state.

    Args:
        num_pages: pages in all, the dummy page included; None gives every row its full length.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        max_positions: int,
        page_size: int = 16,
        num_pages: int | None = None,
    ) -> None:
        if not 1 <= page_size <= 64:
            raise ValueError(f"page_size must be in 1..64, got {page_size}")
        pages_per_row = -(-max_positions // page_size)
        self.rows, self.page_size, self.device = rows, page_size, device
        self.max_positions = pages_per_row * page_size
        self.num_pages = rows * pages_per_row + 1 if num_pages is None else num_pages
        if self.num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (page 0 is the dummy page), got {self.num_pages}")
        shape = (self.num_pages * page_size, num_kv_heads, head_dim)
        self.k_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.req_to_token = torch.zeros((2 * rows, self.max_positions), dtype=torch.int32, device=device)
        self.alloc_lens = torch.zeros(2 * rows, dtype=torch.int32, device=device)
        self.free_pages, self.ring = ops.init_free_pages(self.num_pages, page_size, device)
        self.ledger = KvLedger(self.num_pages - 1, page_size, rows)
        self._free_rows = list(range(rows - 1, -1, -1))
        self._zero = torch.zeros(1, dtype=torch.int64, device=device)
        self._row_ids = torch.arange(2 * rows, dtype=torch.int64, device=device)

    def admit(self, worst_len: int) -> int | None:
        """Book a row and pages for a request that never grows beyond ``worst_len``; None when they are not free now."""
        worst_len = min(worst_len, self.max_positions)
        if not self._free_rows or not self.ledger.try_reserve([self._free_rows[-1]], [worst_len]):
            return None
        return self._free_rows.pop()

    def fits(self, worst_len: int) -> bool:
        """Whether a request of that length could ever be admitted."""
        return -(-min(worst_len, self.max_positions) // self.page_size) <= self.num_pages - 1

    def reserve(self, pool_rows: torch.Tensor, target_lens: torch.Tensor) -> None:
        """Device side: make the rows' pages cover ``target_lens`` (both [B] int64, rows distinct)."""
        ops.reserve_kv_slots(
            self.req_to_token,
            self.alloc_lens,
            self.free_pages,
            self.ring,
            pool_rows,
            target_lens,
            self.page_size,
        )

    def reserve_block(
        self,
        anchor_ids: torch.Tensor,
        prefix_lens: torch.Tensor,
        pool_rows: torch.Tensor,
        active: torch.Tensor,
        block_size: int,
        mask_token_id: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Start of a step: pages for every active row's next block, and its ids, positions and slots, [B, T] int64."""
        return ops.reserve_and_prepare_block(
            self.req_to_token,
            self.alloc_lens,
            self.free_pages,
            self.ring,
            anchor_ids,
            prefix_lens,
            pool_rows,
            self.page_size,
            mask_token_id,
            block_size=block_size,
            active=active,
        )

    def reserve_row(self, pool_row: int, target_len: int) -> None:
        """:meth:`reserve` for one row whose length the host knows (the prompt)."""
        target = torch.full((1,), target_len, dtype=torch.int64, device=self.device)
        self.reserve(self._row_ids[pool_row : pool_row + 1], target)

    def slots_of(self, pool_row: int, start: int, stop: int) -> torch.Tensor:
        """Slots of positions ``start .. stop`` of a row, a view ``[stop - start]`` int32."""
        return self.req_to_token[pool_row, start:stop]

    def release(self, pool_row: int) -> None:
        """Give all pages of a row back, on the device (in stream order) and in the ledger, and free the row."""
        ops.release_kv_slots(
            self.req_to_token,
            self.alloc_lens,
            self.free_pages,
            self.ring,
            self._row_ids[pool_row : pool_row + 1],
            self._zero,
            self.page_size,
        )
        self.ledger.release(pool_row, 0)
        self._free_rows.append(pool_row)

    def free_page_count(self) -> int:
        """Pages in the device's free list. Waits for the device: for tests and reports, not for the step."""
        return int(self.ring[1].item())

    def assert_sound(self) -> None:
        """Check that every page but the dummy is owned exactly once. Waits for the device.

        Raises:
            RuntimeError: a page is booked twice, lost, or the allocator ran dry.
        """
        head, count, missing, _ = self.ring.tolist()
        if missing:
            raise RuntimeError(f"drafter KV pool ran dry: {missing} pages were missing in the last reservation")
        free = [int(self.free_pages[(head + i) % self.num_pages]) for i in range(count)]
        owned: list[int] = []
        for row, length in enumerate(self.alloc_lens.tolist()):
            owned += [int(s) // self.page_size for s in self.req_to_token[row, : length : self.page_size]]
        if sorted(free + owned) != list(range(1, self.num_pages)):
            raise RuntimeError(
                f"drafter KV pool is unsound: {len(free)} free and {len(owned)} owned pages, "
                f"{len(set(free + owned))} distinct, expected {self.num_pages - 1}"
            )
