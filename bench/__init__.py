"""Benchmarks of the dflash ops: `python -m bench SUITE [--json FILE] [--quick]`.

One module per suite (`bench_<suite>.py`, each with `cases(config) -> list[Case]`); how a row is timed is in
`harness.py`, the measured ceilings of the card in `ceilings.py`, the reading of the numbers in `NOTES.md`.
"""
