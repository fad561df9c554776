"""Benchmarks of the dflash ops: `python -m bench SUITE... [--json FILE] [--quick]`.

One module per suite (`bench_<suite>.py`): `cases(device, quick)` yields the `Case` objects of `harness.py`, which says
how a row is timed; the card's measured ceilings come from `ceilings.py`, how to read the numbers is in `NOTES.md`.
"""
