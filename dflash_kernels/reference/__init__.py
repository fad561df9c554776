"""Torch oracles, one module per op group, written independently of the kernels: slow, clear, any device."""
