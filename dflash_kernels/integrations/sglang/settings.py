"""The plugin's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dflash_kernels.formats import WeightFormat

SEAMS_VARIABLE = "DFLASH_KERNELS_SEAMS"
STRICT_VARIABLE = "DFLASH_KERNELS_STRICT"
PACK_VARIABLE = "DFLASH_KERNELS_PACK"
PACKING = ("auto", "0", "1")
SWITCH_VARIABLE = "DFLASH_KERNELS_SEAMS_FILE"
ROWS_VARIABLE = "DFLASH_KERNELS_ROWS"
WEIGHTS_VARIABLE = "DFLASH_KERNELS_WEIGHTS"
PEERS_VARIABLE = "DFLASH_KERNELS_PEERS"
PEERS = ("auto", "0")
# Rows up to which a seam takes a call, where nothing else is said. Longer prompts stay with SGLang: its library GEMMs
# gain there what the fused op gains on a few rows. A pass over more than 32 rows and a head over more than 64 are no
# stream of weights any more: the head is slower in the engine, the pass beside the engine's time (bench/NOTES.md).
ROWS = {"inject": 1024, "forward": 32, "head": 64}
# The same of a seam that multiplies fp8 codes for many rows: half of SGLang's bytes and twice its rate.
FP8_ROWS = {**ROWS, "forward": 1024, "head": 1024}


@dataclass(frozen=True)
class Settings:
    """Seams that are asked for, whether falling back is refused, and whether weights may be held a second time.

    ``pack``: "auto" where a GPU has the memory, "0" never, "1" always. ``switch``: a file that names the seams to use
    from the next step on, for comparisons within one engine. ``rows``: up to how many a seam is used, of those seams
    for which it was said (:meth:`limit`).
    ``weights``: the format of the packed drafter and draft head; None: bf16. ``peers``: with tensor parallelism "auto",
    kernels of the ranks hand each other what is summed and compared, or "0", the engine's collectives do.
    """

    seams: tuple[str, ...]
    strict: bool
    pack: str = "auto"
    switch: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    weights: WeightFormat | None = None
    peers: str = "auto"

    def limit(self, seam: str, fp8_codes: bool = False) -> int:
        """Rows up to which a seam of `ROWS` is used; `fp8_codes`: where it multiplies fp8 codes for many."""
        return self.rows.get(seam, (FP8_ROWS if fp8_codes else ROWS)[seam])


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
    rows: dict[str, int] = {}
    for part in filter(None, environment.get(ROWS_VARIABLE, "").replace(" ", "").split(",")):
        name, _, number = part.partition("=")
        if name not in ROWS or not number.isdigit() or int(number) < 1:
            raise ValueError(f"{ROWS_VARIABLE} must be a list of NAME=ROWS, NAME of {', '.join(ROWS)}, got {part}")
        rows[name] = int(number)
    named = environment.get(WEIGHTS_VARIABLE, "bf16").strip() or "bf16"
    try:
        weights = None if named == "bf16" else WeightFormat.parse(named)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS_VARIABLE} must be bf16 or a weight format: {error}") from error
    peers = environment.get(PEERS_VARIABLE, "auto").strip() or "auto"
    if peers not in PEERS:
        raise ValueError(f"{PEERS_VARIABLE} must be {' or '.join(PEERS)}, got {peers}")
    return Settings(seams, strict == "1", pack, environment.get(SWITCH_VARIABLE, "").strip(), rows, weights, peers)
