"""Write a recipe for `python -m bench.bench_sglang`: `python tools/sglang_recipe.py OUT --model qwen3-4b`.

OUT/target/config.json and OUT/draft/config.json, the published sizes of a Qwen3 target and of its DFlash drafter, and
no weights: SGLang makes random ones. --layers cuts the target down to what a GPU holds; the layers that the drafter
reads are then spread over those that are left. Of the mixture of experts, 24 of 48 layers are 31 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
# Of each model what the target adds to, or has otherwise than, the drafter; and how many layers the drafter has.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "sizes": {"hidden_size": 2560, "intermediate_size": 9728, **HEADS},
        "target": {"num_hidden_layers": 36, "tie_word_embeddings": True},
        "drafter_layers": 5,
    },
    "qwen3-8b": {
        "sizes": {"hidden_size": 4096, "intermediate_size": 12288, **HEADS},
        "target": {"num_hidden_layers": 36},
        "drafter_layers": 5,
    },
    "qwen3-30b-a3b": {
        "sizes": {"hidden_size": 2048, "intermediate_size": 6144, **HEADS, "num_key_value_heads": 4},
        "target": {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        "drafter_layers": 8,
    },
}
TAPS = 5
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def tapped(layers: int) -> list[int]:
    """The layers behind which the drafter reads: from the second to the third from last, evenly."""
    return [1 + round(i * (layers - 4) / (TAPS - 1)) for i in range(TAPS)]


def configs(model: str, layers: int | None = None) -> dict[str, dict[str, Any]]:
    """The two configurations, by directory; ``layers`` of the target, if not all.

    Raises:
        ValueError: more layers than the model has, or too few to read from.
    """
    sizes, changes, drafter_layers = (MODELS[model][key] for key in ("sizes", "target", "drafter_layers"))
    most = changes["num_hidden_layers"]
    layers = most if layers is None else layers
    if not TAPS + 3 <= layers <= most:
        raise ValueError(f"--layers must be from {TAPS + 3} to {most} for {model}, got {layers}")
    target = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **COMMON, **sizes, **changes}
    target.update(num_hidden_layers=layers, max_window_layers=layers)
    draft = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **COMMON,
        **sizes,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": tapped(layers)},
        "layer_types": ["full_attention"] * drafter_layers,
        "max_window_layers": drafter_layers,
        "num_hidden_layers": drafter_layers,
        "num_target_layers": layers,
    }
    return {"target": target, "draft": draft}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 fine, 2 arguments that do not fit."""
    parser = argparse.ArgumentParser(prog="python tools/sglang_recipe.py", description="A recipe for bench_sglang.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--layers", type=int, metavar="N", help="of the target; default: all")
    args = parser.parse_args(argv)
    try:
        found = configs(args.model, args.layers)
    except ValueError as error:
        print(f"sglang_recipe: {error}", file=sys.stderr)
        return 2
    for name, config in found.items():
        (args.out / name).mkdir(parents=True, exist_ok=True)
        (args.out / name / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
