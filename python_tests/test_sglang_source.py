"""What the seams expect of SGLang, checked against the source of both versions: targets, signatures, attributes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sglang_source import Source, attributes_of, calls_of

from dflash_kernels.integrations.sglang.plugin import HOOK_TARGET, SEAMS
from dflash_kernels.integrations.sglang.seam import (
    WORKER_CLASS,
    WORKER_MODULE,
    Declined,
    FunctionSeam,
    Parameter,
    Target,
)


def parameters_of(node: ast.AST | None) -> list[Parameter]:
    assert isinstance(node, ast.FunctionDef)
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults = len(plain) - len(node.args.defaults)
    found = [Parameter(a.arg, i >= defaults) for i, a in enumerate(plain)]
    found += [Parameter(a.arg, d is not None) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [p for p in found if p.name != "self"]


# Targets that a version has rewritten, so that the seam stays stock there.
CHANGED = {
    ("0.5.23", "LogitsProcessor._copy_logits_to_buffer"): "unknown parameter softcap",
    ("0.5.23", "LogitsProcessor._compute_lm_head"): "unknown parameter out",
    ("0.5.23", "FlashAttentionBackend._apply_cuda_graph_metadata"): "no parameter seq_lens_sum",
}


@pytest.mark.parametrize("target", [t for seam in SEAMS for t in seam.targets], ids=lambda t: t.qualname)
def test_target_is_there_with_the_expected_signature(source: Source, target: Target) -> None:
    node = source.find(target.module, target.qualname)
    assert node is not None, f"sglang {source.version} has no {target.module}.{target.qualname}"
    declined = CHANGED.get((source.version, target.qualname))
    if declined is None:
        target.check(parameters_of(node))
    else:
        with pytest.raises(Declined, match=declined):
            target.check(parameters_of(node))


@pytest.mark.parametrize("seam", [s for s in SEAMS if issubclass(s, FunctionSeam)], ids=lambda s: s.name)
def test_worker_calls_the_function_by_keywords(source: Source, seam: type[FunctionSeam]) -> None:
    """The wrapper takes keyword calls only, through the worker module's global name."""
    worker = source.find(WORKER_MODULE, WORKER_CLASS)
    assert worker is not None
    (target,) = seam.targets
    calls = calls_of(worker, target.qualname)
    assert calls
    for call in calls:
        assert not call.args
        assert {k.arg for k in call.keywords} == set(target.required)


def test_injection_is_called_by_keywords(source: Source) -> None:
    worker = source.find(WORKER_MODULE, WORKER_CLASS)
    assert worker is not None
    name = "_append_target_hidden_to_draft_kv_by_loc"
    calls = [n for n in ast.walk(worker) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == name]
    assert len(calls) == 2  # prefill and verify
    for call in calls:
        assert not call.args


@pytest.mark.parametrize(
    ("module", "cls", "attributes"),
    [
        (
            WORKER_MODULE,
            WORKER_CLASS,
            "draft_model draft_model_runner block_size device model_runner _draft_sampler init_cuda_graphs "
            "forward_batch_generation _maybe_build_draft_sampler",
        ),
        (WORKER_MODULE, "_DflashDraftSampler", "weight block_size num_org org_vocab_start tp_group out"),
        ("sglang.srt.models.dflash", "DFlashDraftModel", "layers fc hidden_norm norm num_context_features"),
        (
            "sglang.srt.models.dflash",
            "DFlashAttention",
            "qkv_proj o_proj q_norm k_norm rotary_emb q_size kv_size num_kv_heads head_dim attn",
        ),
        ("sglang.srt.models.dflash", "DFlashMLP", "gate_up_proj down_proj"),
        (
            "sglang.srt.layers.layernorm",
            "RMSNorm",
            "weight variance_epsilon cast_x_before_out_mul variance_size_override",
        ),
        ("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool", "k_buffer v_buffer kv_cache_layout use_hnd"),
        ("sglang.srt.mem_cache.memory_pool", "KVCache", "start_layer dtype"),
        ("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool", "is_quantized_kv_cache"),
        ("sglang.srt.layers.rotary_embedding.base", "RotaryEmbedding", "is_neox_style rotary_dim"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_attributes_that_seams_read(source: Source, module: str, cls: str, attributes: str) -> None:
    node = source.find(module, cls)
    assert node is not None
    assert set(attributes.split()) <= attributes_of(node)


@pytest.mark.parametrize(
    ("module", "cls", "attributes"),
    [
        (
            "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
            "DecodeCudaGraphRunner",
            "buffers capture_bs max_bs attn_backend load_batch",
        ),
        (
            "sglang.srt.model_executor.runner_utils.buffers",
            "DecodeInputBuffers",
            "input_ids positions out_cache_loc input_embeds seq_lens req_pool_indices next_token_logits_buffer",
        ),
        (
            "sglang.srt.layers.logits_processor",
            "LogitsProcessor",
            "vocab_size logit_scale use_fp32_lm_head do_tensor_parallel_all_gather rl_on_policy_target "
            "do_tensor_parallel_all_gather_dp_attn final_logit_softcapping",
        ),
        ("sglang.srt.layers.logits_processor", "LogitsMetadata", "forward_mode next_token_logits_buffer"),
        (
            "sglang.srt.layers.attention.flashattention_backend",
            "FlashAttentionBackend",
            "topk needs_cpu_seq_lens use_sliding_window_kv_pool target_verify_metadata forward_metadata "
            "forward_metadata_spec_decode_expand",
        ),
        (
            "sglang.srt.layers.attention.flashattention_backend",
            "FlashAttentionMetadata",
            "cache_seqlens_int32 cu_seqlens_k page_table",
        ),
        (
            WORKER_MODULE,
            WORKER_CLASS,
            "_draft_block_ids_buf _draft_block_positions_buf _draft_block_tokens_buf _draft_verify_out_cache_loc_buf "
            "_target_worker",
        ),
        (
            "sglang.srt.sampling.sampling_batch_info",
            "SamplingBatchInfo",
            "is_all_greedy has_custom_logit_processor penalizer_orchestrator acc_additive_penalties "
            "acc_scaling_penalties vocab_mask logit_bias",
        ),
        (
            "sglang.srt.managers.schedule_batch",
            "ScheduleBatch",
            "forward_mode is_extend_in_batch seq_lens sampling_info has_grammar return_logprob",
        ),
        ("sglang.srt.model_executor.model_runner", "ModelRunner", "decode_cuda_graph_runner capture_tail_hooks"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_attributes_of_the_older_version(source: Source, module: str, cls: str, attributes: str) -> None:
    """What `logits`, `inputs` and `metadata` read, which run with 0.5.16 alone."""
    if source.version != "0.5.16":
        pytest.skip("these seams decline there")
    node = source.find(module, cls)
    assert node is not None, f"{module} has no {cls}"
    assert set(attributes.split()) <= attributes_of(node), set(attributes.split()) - attributes_of(node)


def test_the_target_worker_is_called_for_verification_by_keyword(source: Source) -> None:
    """`logits` acts on calls that say is_verify=True."""
    worker = source.find(WORKER_MODULE, WORKER_CLASS)
    assert worker is not None
    calls = [n for n in ast.walk(worker) if isinstance(n, ast.Call)]
    calls = [c for c in calls if ast.unparse(c.func).endswith("target_worker.forward_batch_generation")]
    verify = [c for c in calls if any(k.arg == "is_verify" for k in c.keywords)]
    assert verify and all(ast.unparse(k.value) == "True" for c in verify for k in c.keywords if k.arg == "is_verify")


def test_argmax_of_the_logits_is_the_call_that_the_seam_knows(source: Source) -> None:
    if source.version != "0.5.16":
        pytest.skip("the seam declines there")
    worker = source.find(WORKER_MODULE, f"{WORKER_CLASS}.forward_batch_generation")
    assert worker is not None
    uses = [n for n in ast.walk(worker) if isinstance(n, ast.Attribute) and n.attr == "next_token_logits"]
    calls = [n for n in ast.walk(worker) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.argmax"]
    assert [ast.unparse(c) for c in calls] == ["torch.argmax(logits_output.next_token_logits, dim=-1)"]
    assert len(uses) == 3  # adjustments, the sampled path, and the argmax


def test_features_that_are_declined_by_name(source: Source) -> None:
    """The names by which the newer version marks what the seams decline; the older one has none of these features."""
    if source.version == "0.5.16":
        text = (source.root / "sglang/srt/models/dflash.py").read_text(encoding="utf-8")
        assert "candidate_selector" not in text and "attention_conv" not in text and "use_gemma_norm" not in text
        return
    model = source.find("sglang.srt.models.dflash", "DFlashDraftModel")
    layer = source.find("sglang.srt.models.dflash", "DFlashDecoderLayer")
    attention = source.find("sglang.srt.models.dflash", "DFlashAttention")
    worker = source.find(WORKER_MODULE, WORKER_CLASS)
    assert model and layer and attention and worker
    assert {"candidate_selector", "lilicorr", "is_nemotron_35_draft", "quantizable"} <= attributes_of(model)
    assert {"attention_conv", "mlp_conv"} <= attributes_of(layer)
    assert {"use_gemma_norm", "v_scale", "attention_sink_bias"} <= attributes_of(attention)
    assert "_is_domino" in attributes_of(worker)


def test_context_k_rounds_once_after_the_rotation(source: Source) -> None:
    """The fused kernel that `inject` stands for keeps K in float32 from the norm to the store."""
    kernel = source.find("sglang.kernels.ops.speculative.fused_kv_materialize", "_fused_norm_rope_kernel_stacked")
    assert kernel is not None
    text = ast.unparse(kernel)
    assert "k_normed = k_raw * inv_rms * norm_w" in text
    assert "k_rot_first.to(v_raw.dtype)" in text and "k_normed.to(tl.bfloat16)" not in text


def test_hook_target_is_there(source: Source) -> None:
    module, _, qualname = HOOK_TARGET.partition(".SpeculativeAlgorithm.")
    node = source.find(module, f"SpeculativeAlgorithm.{qualname}")
    assert [p.name for p in parameters_of(node)] == ["server_args"]


def test_entry_point_names_the_plugin() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["sglang.srt.plugins"]
    assert points == {"dflash_kernels": "dflash_kernels.integrations.sglang:activate"}


def test_changed_signatures_are_declined() -> None:
    target = Target("m", "f", ("a", "b"), ("c",))
    target.check([Parameter("a", False), Parameter("b", False)])
    target.check([Parameter("b", False), Parameter("a", False), Parameter("c", True)])
    with pytest.raises(Declined, match="no parameter b"):
        target.check([Parameter("a", False)])
    with pytest.raises(Declined, match="unknown parameter d"):
        target.check([Parameter("a", False), Parameter("b", False), Parameter("d", True)])
