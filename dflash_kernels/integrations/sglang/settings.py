"""The plugin's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEAMS_VARIABLE = "DFLASH_KERNELS_SEAMS"
STRICT_VARIABLE = "DFLASH_KERNELS_STRICT"
PACK_VARIABLE = "DFLASH_KERNELS_PACK"
PACKING = ("auto", "0", "1")
SWITCH_VARIABLE = "DFLASH_KERNELS_SEAMS_FILE"


@dataclass(frozen=True)
class Settings:
    """Seams that are asked for, whether falling back is refused, and whether weights may be held a second time.

    ``pack``: "auto" where a GPU has the memory, "0" never, "1" always. ``switch``: a file that names the seams to use
    from the next step on, for comparisons within one engine.
    """

    seams: tuple[str, ...]
    strict: bool
    pack: str = "auto"
    switch: str = ""


def read_settings(known: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment; ``known`` are the names of all seams.

    Raises:
        ValueError: an unknown seam, or another value than those above.
    """
    asked = environment.get(SEAMS_VARIABLE, "all").strip() or "all"
    if asked == "all":
        seams = tuple(known)
    elif asked == "none":
        seams = ()
    else:
        names = [name.strip() for name in asked.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"{SEAMS_VARIABLE} must be all, none or a list of {', '.join(known)}, got {', '.join(unknown)}"
            )
        seams = tuple(name for name in known if name in names)
    strict = environment.get(STRICT_VARIABLE, "0").strip() or "0"
    if strict not in ("0", "1"):
        raise ValueError(f"{STRICT_VARIABLE} must be 0 or 1, got {strict}")
    pack = environment.get(PACK_VARIABLE, "auto").strip() or "auto"
    if pack not in PACKING:
        raise ValueError(f"{PACK_VARIABLE} must be {', '.join(PACKING)}, got {pack}")
    return Settings(seams, strict == "1", pack, environment.get(SWITCH_VARIABLE, "").strip())
