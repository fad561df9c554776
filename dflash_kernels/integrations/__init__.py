"""Engines that the kernels plug into."""
