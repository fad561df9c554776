"""SGLang's DFLASH path on this package's kernels, as a general plugin (entry point group `sglang.srt.plugins`).

Installed beside SGLang, it replaces functions at *seams*; start the server as before with
``--speculative-algorithm DFLASH``. A seam that does not fit the engine, the drafter or the pools stays stock, and a
table in the log says which and why.

==========================  ==========================================================================================
``DFLASH_KERNELS_SEAMS``    ``all`` (default), ``none``, or a comma-separated list of seams
``DFLASH_KERNELS_STRICT``   ``1``: refuse to start, or stop, where a seam that was asked for would fall back
``DFLASH_KERNELS_PACK``     ``auto`` (default): where a GPU has the memory, few rows read a second copy of the weights
                            as the streaming kernels do; ``0``: never; ``1``: without looking at the memory
``DFLASH_KERNELS_WEIGHTS``  ``bf16`` (default), ``fp8``, ``int4-g128``, ..: weights of the packed drafter and draft head
                            are rounded to it at the start; acceptance may change, the text does not. With ``fp8``, on
                            GPUs that multiply it, the codes are held once more for rows that are too many to stream
``DFLASH_KERNELS_ROWS``     rows (requests times block size, or tokens of a prompt) up to which a seam is used: default
                            ``inject=1024,forward=32,head=64``, and 1024 of a seam that holds such codes
``DFLASH_KERNELS_PEERS``    with tensor parallelism ``auto`` (default): the ranks' kernels write to each other's memory
                            for `forward`'s sums and the choice of tokens; ``0``: all take the engine's collectives
==========================  ==========================================================================================

For comparisons within one engine, ``DFLASH_KERNELS_SEAMS_FILE`` names a file with a list of seams that is read whenever
it changes: of the active seams, those that no CUDA graph holds are used as it says.

With tensor parallelism every rank has its own worker, and all take the same way at every seam: what one declines, all
do. Give them the same variables on all hosts.

`plugin` holds the hook and the worker subclass, `seam` what all seams share, `ranks` what the ranks ask each other, and
every seam has a module.
"""

from dflash_kernels.integrations.sglang.plugin import activate

__all__ = ["activate"]
