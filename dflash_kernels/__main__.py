"""``python -m dflash_kernels``: the same as the ``dflash-kernels`` command."""

import sys

from dflash_kernels.cli import main

sys.exit(main())
