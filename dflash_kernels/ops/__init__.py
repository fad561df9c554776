"""The Python face of `torch.ops.dflash`, one module per op group."""
