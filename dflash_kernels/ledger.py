"""Host-side books of a device page allocator: never below what the device holds, so the device never runs dry.

The device allocator (:mod:`dflash_kernels.ops.alloc`) hands out pages while the host runs ahead, so the host cannot
know what the device holds. It books an upper bound instead, *before* it launches: for a block in flight the length it
reaches if every draft token is accepted. When the step's results arrive, :meth:`KvLedger.shrink` lowers the booking to
what is now known. As long as the ledger accepts, the device cannot run out.

``KvLedger`` is the C++ class of the optional module ``dflash_kernels._host`` where that was built, else
:class:`PyKvLedger`, which behaves the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING

__all__ = ["KvLedger", "PyKvLedger"]


class PyKvLedger:
    """Pages booked for each of ``rows`` pool rows out of ``num_pages`` in all.

    Args:
        num_pages: pages that can be handed out (the dummy page not counted), >= 0.
        page_size: tokens of a page, >= 1.
        rows: pool rows, >= 0.

    Attributes:
        num_pages, page_size, rows: as given.
        used_pages, free_pages: pages booked, and not booked.

    Raises:
        ValueError: in all methods, for a row outside ``0 .. rows - 1`` or a negative length; nothing changes then.
    """

    def __init__(self, num_pages: int, page_size: int, rows: int) -> None:
        self.num_pages = _at_least("num_pages", num_pages, 0)
        self.page_size = _at_least("page_size", page_size, 1)
        self.rows = _at_least("rows", rows, 0)
        self.used_pages = 0
        self._pages = [0] * self.rows

    @property
    def free_pages(self) -> int:
        return self.num_pages - self.used_pages

    def row_len(self, row: int) -> int:
        """Tokens that the booked pages of ``row`` cover."""
        return self._pages[self._row(row)] * self.page_size

    def try_reserve(self, rows: Sequence[int], lens: Sequence[int]) -> bool:
        """Book pages so that each of ``rows`` (distinct) covers at least its length, for all of them or for none.

        A row that is already covered keeps its booking. To be called before the launch that may take the pages.

        Returns:
            False, with nothing changed, if there are too few pages.

        Raises:
            ValueError: a row twice, or ``rows`` and ``lens`` of different lengths.
        """
        if len(rows) != len(lens):
            raise ValueError(f"KvLedger.try_reserve: lens must have {len(rows)} entries, as rows, got {len(lens)}")
        wanted: dict[int, int] = {}
        more = 0
        for given, length in zip(rows, lens, strict=True):
            row = self._row(given)
            if row in wanted:
                raise ValueError(f"KvLedger.try_reserve: rows must be distinct, got {row} twice")
            wanted[row] = max(self._pages_of(length), self._pages[row])
            more += wanted[row] - self._pages[row]
        if more > self.free_pages:
            return False
        for row, pages in wanted.items():
            self._pages[row] = pages
        self.used_pages += more
        return True

    def shrink(self, row: int, length: int) -> None:
        """Lower the booking of ``row`` to ``length`` tokens, now known to be the most that the device can hold for it.

        The bound must count what is still in flight: the length just read back, plus what the steps launched since may
        reserve. No launch goes with it. A booking that is lower already stays.
        """
        row = self._row(row)
        pages = min(self._pages_of(length), self._pages[row])
        self.used_pages -= self._pages[row] - pages
        self._pages[row] = pages

    def release(self, row: int, keep_len: int) -> None:
        """Give back what ``row`` holds beyond ``keep_len`` tokens (0: finished, aborted or evicted).

        To be called when ``release_kv_slots`` with the same length has been launched: later launches on that stream
        find the pages in the free list.
        """
        self.shrink(row, keep_len)

    def _row(self, row: int) -> int:
        row = index(row)
        if not 0 <= row < self.rows:
            raise ValueError(f"KvLedger: row must be in [0, {self.rows}), got {row}")
        return row

    def _pages_of(self, length: int) -> int:
        return -(-_at_least("length", length, 0) // self.page_size)


def _at_least(name: str, value: int, least: int) -> int:
    value = index(value)
    if value < least:
        raise ValueError(f"KvLedger: {name} must be at least {least}, got {value}")
    return value


if TYPE_CHECKING:
    KvLedger = PyKvLedger
else:
    try:
        from dflash_kernels._host import KvLedger
    except ImportError:
        KvLedger = PyKvLedger
