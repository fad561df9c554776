"""A loaded drafter against the method's own published model (PyPI `dflash`), from the same saved checkpoint.

The published model is a whole-sequence one: it takes all context hidden states of a request and its block, in fp32.
Ours injects the context step by step into a paged cache, rows of different lengths together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dflash_kernels.model.drafter import load_drafter

published = pytest.importorskip("dflash.model")
qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")

H, V, T, TAPS, LAYERS = 64, 61, 8, (0, 3, 4), 3
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"layer_types": SLIDING, "sliding_window": 5, "use_sliding_window": True},
    "sliding-non-causal": {
        "layer_types": SLIDING,
        "sliding_window": 6,
        "use_sliding_window": True,
        "is_causal": False,
    },
    "causal-biased": {"is_causal": True, "attention_bias": True},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}


def save_published(folder: Path, changes: dict[str, Any], generator: torch.Generator) -> torch.nn.Module:
    """The published model with random weights, and its checkpoint in the z-lab layout."""
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": T,
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": list(TAPS)},
        "num_target_layers": 6,
        "hidden_size": H,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": V,
        "tie_word_embeddings": False,
    } | changes
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = published.DFlashDraftModel(qwen3.Qwen3Config(**settings)).float().eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * values if "norm" in name else values * (0.3 if name.endswith("bias") else 0.12)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return model


class Target(torch.nn.Module):
    """As much of a target as a drafter binds to."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(V, H), torch.nn.Linear(H, V, bias=False)
        self.embedding.weight.data = torch.randn(V, H, generator=generator)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_three_steps_equal_the_published_model(case: str, tmp_path: Path, rng: torch.Generator) -> None:
    model = save_published(tmp_path, CASES[case], rng)
    target = Target(rng)
    drafter = load_drafter(tmp_path).bind(target)
    assert drafter.embed_weight.data_ptr() == target.embedding.weight.data_ptr()  # the same memory
    assert drafter.lm_head_weight.data_ptr() == target.head.weight.data_ptr()

    rows, width = 3, 40
    pool = torch.randperm(rows * width, generator=rng)
    table = pool.view(rows, width).to(torch.int32)[[2, 0, 1]]
    pool_rows = torch.tensor([1, 2, 0])
    shape = (rows * width, drafter.num_kv_heads, drafter.head_dim)
    caches = [[torch.full(shape, torch.nan) for _ in range(LAYERS)] for _ in range(2)]
    # The context of every row: hidden states of all tapped layers, one tensor a layer, as the target gives them.
    hidden = torch.randn(rows, width, len(TAPS) * H, generator=rng)
    prompts = [1, 7, 12]
    for b, length in enumerate(prompts):
        slots = table[pool_rows[b], :length].long()
        taps = list(hidden[b, :length].split(H, dim=-1))
        drafter.inject(taps, torch.arange(length), slots, None, *caches)

    lens = torch.tensor(prompts)
    for step in range(3):
        block = torch.full((rows, T), drafter.mask_token_id)
        block[:, 0] = torch.randint(0, V - 1, (rows,), generator=rng)
        positions = lens[:, None] + torch.arange(T)
        slots = table[pool_rows].gather(1, positions).long()
        got = drafter.forward(block, positions, slots, lens, pool_rows, table, *caches).view(rows, T, H).clone()
        for b in range(rows):
            length = int(lens[b])
            want = model(
                position_ids=torch.arange(length + T)[None],
                noise_embedding=target.embedding(block[b : b + 1]),
                target_hidden=hidden[b : b + 1, :length],
            )[0]
            torch.testing.assert_close(got[b], want, atol=2e-4, rtol=2e-4)
        commit = torch.tensor([[1, T, 3], [4, 2, T], [1, 1, 1]][step], dtype=torch.int32)
        at = positions.flatten()
        chosen = hidden[torch.arange(rows).repeat_interleave(T), at]
        dead = (torch.arange(T) >= commit[:, None]).flatten()
        chosen[dead] = torch.nan  # rows that are not committed must not be read
        drafter.inject(list(chosen.split(H, dim=-1)), at, slots.flatten(), commit, *caches)
        lens = lens + commit
        for cache in (*caches[0], *caches[1]):
            for b in range(rows):
                written = table[pool_rows[b]].long()
                assert cache[written[: lens[b]]].isfinite().all() and cache[written[lens[b] :]].isnan().all()


@torch.inference_mode()
def test_binding_in_other_dtypes_and_to_the_wrong_target(tmp_path: Path, rng: torch.Generator) -> None:
    save_published(tmp_path, {}, rng)
    drafter = load_drafter(tmp_path)
    caches: list[list[torch.Tensor]] = [[], []]
    with pytest.raises(ValueError, match="must be bound to its target before it runs"):
        drafter.forward(torch.zeros(1, T, dtype=torch.int64), *[torch.zeros(0)] * 5, *caches)
    half = Target(rng).half()
    drafter.bind(half)
    assert drafter.dtype == drafter.lm_head_weight.dtype == torch.float32  # never fp16
    drafter.bind(Target(rng).bfloat16())
    assert drafter.dtype == drafter.embed_weight.dtype == drafter.weights.kv_weight.dtype == torch.bfloat16
    other = Target(rng)
    other.head = torch.nn.Linear(H, V + 1, bias=False)
    with pytest.raises(ValueError, match=rf"its LM head must have shape \[{V}, {H}\], got \[{V + 1}, {H}\]"):
        drafter.bind(other)
    other.head = torch.nn.Linear(H, V)
    with pytest.raises(ValueError, match="an LM head without bias is needed"):
        drafter.bind(other)
