"""The engine on tiny random targets: lossless in every arrangement, sound pool, sampling true to the target."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from dflash_kernels.engine import Engine, SamplingParams, TargetRunner  # noqa: E402
from dflash_kernels.engine.rounding import measure_rounding, near_tie, score  # noqa: E402
from dflash_kernels.engine.step import round_keys, round_rows  # noqa: E402
from dflash_kernels.engine.text import StreamDecoder  # noqa: E402
from dflash_kernels.model.config import parse_config  # noqa: E402
from dflash_kernels.model.drafter import Drafter  # noqa: E402
from dflash_kernels.model.weights import DrafterWeights  # noqa: E402

VOCAB, HIDDEN, LAYERS, BLOCK = 97, 48, 4, 8
PROMPT_LENGTHS = (3, 17, 1, 40, 9)


def make_target(family: str, vocab: int = VOCAB, seed: int = 0) -> torch.nn.Module:
    """A random model whose weights are large enough that its text does not settle into one token."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)).eval()


class ScriptedDrafter:
    """Stands in for a drafter: proposes ``script(prefix_len, anchor, j)``, and checks what the engine hands it.

    Its hidden rows are one-hot and its LM head the identity, so the head's argmax is the scripted token. Injected
    positions are noted in the caches themselves, which lets ``forward`` check that every earlier position is there.
    """

    block_size, mask_token_id, target_layer_ids = BLOCK, 3, (0, 2)
    num_layers, num_kv_heads, head_dim, dtype = 1, 1, 1, torch.float32
    hidden_size, max_positions = HIDDEN, 4096

    def __init__(self, script: Callable[[int, int, int], int], vocab: int = VOCAB) -> None:
        self.script, self.vocab_size = script, vocab
        self.lm_head_weight = torch.eye(vocab)

    def forward(
        self,
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        rows, block = block_ids.shape
        hidden = torch.zeros(rows, block, self.vocab_size)
        for b in range(rows):
            prefix, anchor = int(prefix_lens[b]), int(block_ids[b, 0])
            assert positions[b].tolist() == list(range(prefix, prefix + block))
            assert block_ids[b, 1:].eq(self.mask_token_id).all()
            context = req_to_token[req_pool_indices[b], :prefix].long()
            # Position p was injected (as p + 1) into the slot that the page table names for it.
            assert k_caches[0][context, 0, 0].tolist() == [float(p + 1) for p in range(prefix)]
            assert len(set(slots[b].tolist()) | set(context.tolist())) == prefix + block and not slots[b].eq(0).any()
            for j in range(1, block):
                hidden[b, j, self.script(prefix, anchor, j)] = 1.0
        return hidden.view(rows * block, -1)

    def inject(
        self,
        taps: list[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        commit_lens: torch.Tensor | None,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> None:
        assert [tuple(t.shape) for t in taps] == [(positions.numel(), HIDDEN)] * 2
        live = torch.ones(positions.numel(), dtype=torch.bool)
        if commit_lens is not None:
            block = positions.numel() // commit_lens.numel()
            live = (torch.arange(block) < commit_lens[:, None]).view(-1)
        k_caches[0][slots[live].long(), 0, 0] = (positions[live] + 1).float()


def oracle(texts: list[list[int]], hit_rate: float = 0.8) -> ScriptedDrafter:
    """Knows the true texts and is right at a given rate: acceptance of every length occurs."""
    generator = torch.Generator().manual_seed(7)

    def script(prefix: int, anchor: int, j: int) -> int:
        for text in texts:
            if prefix + j < len(text) and text[prefix] == anchor:
                if torch.rand((), generator=generator) < hit_rate:
                    return text[prefix + j]
                break
        return 5

    return ScriptedDrafter(script)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, list[list[int]], list[list[int]]]:
    """Target, prompts, and transformers' own greedy texts (48 new tokens, prompt included)."""
    target = make_target(request.param)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    texts = [target.generate(torch.tensor([p]), max_new_tokens=48, do_sample=False)[0].tolist() for p in prompts]
    return target, prompts, texts


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("max_batch", [1, 2, 5])
def test_greedy_equals_transformers_generate(case: Any, max_batch: int, page_size: int) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=max_batch, max_len=128, page_size=page_size, prefill_chunk=16)
    for count in range(1, len(prompts) + 1):
        results = engine.generate(prompts[:count], SamplingParams(max_new_tokens=48))
        assert [r.prompt_ids + r.token_ids for r in results] == texts[:count]
        assert all(r.finish_reason == "length" for r in results)
        assert all(1 + sum(r.stats.commit_lens) == len(r.token_ids) == r.stats.new_tokens for r in results)
        assert all(1 <= n <= BLOCK for r in results for n in r.stats.commit_lens)
        engine.pool.assert_sound()
        assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    assert max(r.stats.mean_commit for r in results) > 2  # the oracle's hits were taken
    plain = engine.decode_plain(prompts, SamplingParams(max_new_tokens=48))
    assert [r.token_ids for r in plain] == [r.token_ids for r in results]
    assert all(set(r.stats.commit_lens) == {1} for r in plain)
    engine.close()


@pytest.mark.parametrize("hit_rate", [0.0, 1.0])
def test_acceptance_at_its_ends(case: Any, hit_rate: float) -> None:
    """An oracle that is always right commits whole blocks; one that is never right commits about one token a step."""
    target, prompts, texts = case
    for prompt, text in zip(prompts, texts, strict=True):
        engine = Engine(target, oracle([text], hit_rate), max_batch=1, max_len=128)
        (result,) = engine.generate([prompt], SamplingParams(max_new_tokens=41))
        assert result.prompt_ids + result.token_ids == text[: len(prompt) + 41]
        if hit_rate:  # 1 token from the prompt, then 40 in five full blocks
            assert result.stats.commit_lens == [BLOCK] * 5
        else:
            assert result.stats.mean_commit < 2
        engine.close()


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 30])
def test_max_new_tokens(case: Any, limit: int) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=3, max_len=128)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=limit))
    assert [r.token_ids for r in results] == [t[len(p) : len(p) + limit] for p, t in zip(prompts, texts, strict=True)]
    engine.close()


def test_max_len_ends_the_text(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=5, max_len=44)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=1000))
    for result, text in zip(results, texts, strict=True):
        whole = result.prompt_ids + result.token_ids
        assert len(whole) == 44 and whole == text[:44] and result.finish_reason == "length"
    engine.close()


def test_stop_tokens(case: Any) -> None:
    """The text ends with the stop token wherever it falls: first token, inside a block, or as the bonus."""
    target, prompts, texts = case
    engine = Engine(target, oracle(texts, 1.0), max_batch=4, max_len=128)
    for offset in (0, 1, 4, 8, 9, 25):
        stops = tuple(t[len(p) + offset] for p, t in zip(prompts, texts, strict=True))
        results = engine.generate(
            prompts, [SamplingParams(max_new_tokens=48, stop_token_ids=(stop,)) for stop in stops]
        )
        for result, prompt, text, stop in zip(results, prompts, texts, stops, strict=True):
            new = text[len(prompt) :]
            assert result.token_ids == new[: new.index(stop) + 1]
            assert result.finish_reason == "stop"
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    engine.close()


@pytest.mark.parametrize("mode", ["dflash", "plain"])
def test_running_ahead_changes_nothing(case: Any, mode: Any) -> None:
    """One step launched before the last is read, as on CUDA: same texts, overrun dropped, pool sound."""
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=2, max_len=128, page_size=4, run_ahead=1)
    stops = [t[len(p) + o] for p, t, o in zip(prompts, texts, (0, 3, 11, 20, 47), strict=True)]
    params = [SamplingParams(max_new_tokens=48, stop_token_ids=(stop,)) for stop in stops]
    results = engine.generate(prompts, params, mode=mode)
    for result, prompt, text, stop in zip(results, prompts, texts, stops, strict=True):
        new = text[len(prompt) :]
        assert result.token_ids == new[: new.index(stop) + 1]
    assert engine.last_stats.overrun_rows > 0
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    full = engine.generate(prompts, SamplingParams(max_new_tokens=48), mode=mode)
    assert [r.prompt_ids + r.token_ids for r in full] == texts
    engine.close()


def test_stream_events_add_up_to_the_results(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=2, max_len=128)
    stream = engine.stream(prompts, SamplingParams(max_new_tokens=20))
    seen: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    ended = []
    for event in stream:
        assert event.index not in ended and event.tokens
        assert (event.commit_len is None) == (not seen[event.index])
        seen[event.index] += event.tokens
        ended += [event.index] if event.finish_reason else []
    assert sorted(ended) == list(range(len(prompts)))
    assert [seen[r.index] for r in stream.results] == [r.token_ids for r in stream.results]
    assert engine.last_stats.new_tokens == 20 * len(prompts)
    engine.close()


def test_close_and_abort_give_everything_back(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=3, max_len=128, page_size=1)
    stream = engine.stream(prompts, SamplingParams(max_new_tokens=48))
    for _ in range(7):
        next(stream)
    with pytest.raises(RuntimeError, match="still open"):
        next(engine.stream(prompts))
    stream.close()
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1

    stream = engine.stream(prompts, SamplingParams(max_new_tokens=48))
    next(stream)
    stream.abort(1)  # running
    stream.abort(4)  # waiting
    reasons = {e.index: e.finish_reason for e in stream if e.finish_reason}
    assert reasons == {0: "length", 1: "abort", 2: "length", 3: "length", 4: "abort"}
    assert [r.prompt_ids + r.token_ids for r in stream.results if r.index in (0, 2, 3)] == [texts[i] for i in (0, 2, 3)]
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    # Rows and slots are used again by the next call, stale content and all.
    again = engine.generate(prompts, SamplingParams(max_new_tokens=48))
    assert [r.prompt_ids + r.token_ids for r in again] == texts
    engine.close()


@pytest.mark.parametrize("failing_call", [0, 1, 6])
def test_a_failure_gives_everything_back(case: Any, failing_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass over the first prompt, over the second, and in a step: the engine is as good as new afterwards."""
    target, prompts, texts = case
    drafter = oracle(texts)
    engine = Engine(target, drafter, max_batch=2, max_len=128)
    calls, inject = iter(range(100)), drafter.inject

    def failing(*args: Any) -> None:
        if next(calls) == failing_call:
            raise RuntimeError("out of memory")
        inject(*args)

    monkeypatch.setattr(drafter, "inject", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(prompts, SamplingParams(max_new_tokens=48))
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    results = engine.generate(prompts, SamplingParams(max_new_tokens=48))
    assert [r.prompt_ids + r.token_ids for r in results] == texts
    engine.close()


def test_small_pool_makes_requests_wait(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=5, max_len=128, page_size=16, num_pages=1 + 2 * 7)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=48))
    assert [r.prompt_ids + r.token_ids for r in results] == texts
    engine.pool.assert_sound()
    with pytest.raises(ValueError, match="pool has"):
        Engine(target, oracle(texts), max_batch=1, max_len=128, num_pages=3).generate([prompts[3]])
    engine.close()


def test_sampling_is_reproducible_by_seed(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=3, max_len=128)
    engine.steps.drafter.script = lambda prefix, anchor, j: (anchor * 7 + j) % VOCAB  # no state: draws repeat
    params = [SamplingParams(max_new_tokens=24, temperature=1.0, top_k=20, top_p=0.9, seed=i) for i in range(5)]
    first = [r.token_ids for r in engine.generate(prompts, params)]
    assert [r.token_ids for r in engine.generate(prompts, params)] == first
    alone = [engine.generate([p], [s])[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert alone == first
    other = [SamplingParams(max_new_tokens=24, temperature=1.0, top_k=20, top_p=0.9, seed=i + 50) for i in range(5)]
    assert [r.token_ids for r in engine.generate(prompts, other)] != first
    engine.close()


def test_greedy_rows_beside_sampled_rows_stay_greedy(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=5, max_len=128)
    params = [SamplingParams(max_new_tokens=30, temperature=float(i % 2), seed=i) for i in range(5)]
    results = engine.generate(prompts, params)
    for i in (0, 2, 4):
        assert results[i].token_ids == texts[i][len(prompts[i]) : len(prompts[i]) + 30]
    engine.close()


@pytest.mark.parametrize("mode", ["dflash", "plain"])
def test_sampled_texts_follow_the_target_distribution(mode: Any) -> None:
    """Chi-square of three sampled tokens against the exact probabilities, on a vocabulary of 5."""
    vocab, draws, temperature = 5, 1200, 1.3
    target = make_target("llama", vocab=vocab, seed=3)
    prompt = [1, 4, 2]
    cells = [(a, b, c) for a in range(vocab) for b in range(vocab) for c in range(vocab)]
    with torch.no_grad():
        logits = target(torch.tensor([[*prompt, a, b] for a, b, _ in cells])).logits[:, 2:].double()
    probs = torch.softmax(logits / temperature, -1)
    exact = torch.tensor([math.prod(float(probs[i, j, t]) for j, t in enumerate(c)) for i, c in enumerate(cells)])

    drafter = ScriptedDrafter(lambda prefix, anchor, j: (anchor + 2 * j) % vocab, vocab)
    engine = Engine(target, drafter, max_batch=60, max_len=32, page_size=4)
    params = [SamplingParams(max_new_tokens=3, temperature=temperature, seed=i) for i in range(draws)]
    texts = [tuple(r.token_ids) for r in engine.generate([prompt] * draws, params, mode=mode)]
    counts = torch.tensor([texts.count(c) for c in cells], dtype=torch.float64)
    engine.close()

    expected = exact * draws
    rare = expected < 5
    chi, cells_used = 0.0, int((~rare).sum())
    for want, got in [*zip(expected[~rare], counts[~rare], strict=True), (expected[rare].sum(), counts[rare].sum())]:
        chi += float((got - want) ** 2 / want) if want > 0 else 0.0
    assert int(counts.sum()) == draws
    assert chi < cells_used + 5 * math.sqrt(2 * cells_used), (chi, cells_used)


def test_target_runner_matches_the_model_on_ragged_rows(case: Any) -> None:
    """Logits and taps of rows of different lengths equal the model's own, row by row."""
    target, prompts, _ = case
    runner = TargetRunner(target, (0, LAYERS - 1), rows=3, max_positions=64)
    chosen = [prompts[1], prompts[0], prompts[4]]
    for row, ids in enumerate(chosen):
        tokens, where = torch.tensor([ids[:-2]]), torch.arange(len(ids) - 2)[None]
        if len(ids) > 2:
            runner.forward(tokens, where, len(ids) - 2, first_row=row, start=0)
    tokens = torch.tensor([ids[-2:] for ids in chosen])
    where = torch.tensor([[len(ids) - 2, len(ids) - 1] for ids in chosen])
    output = runner.forward(tokens, where, int(where.max()) + 1)
    for row, ids in enumerate(chosen):
        with torch.no_grad():
            whole = target(torch.tensor([ids]), output_hidden_states=True)
            # transformers' last entry is normed: the last layer's own output comes from running it by itself.
            hidden, length = whole.hidden_states[-2], len(ids)
            where = torch.arange(length)[None]
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            last = target.model.layers[-1](
                hidden, attention_mask=causal, position_embeddings=target.model.rotary_emb(hidden, where)
            )
            last = last[0] if isinstance(last, tuple) else last
        torch.testing.assert_close(output.logits[row], whole.logits[0, -2:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            output.taps[0].view(3, 2, -1)[row], whole.hidden_states[1][0, -2:], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(output.taps[1].view(3, 2, -1)[row], last[0, -2:], atol=1e-4, rtol=1e-4)
    runner.close()


def test_rounding_report(case: Any) -> None:
    target, prompts, texts = case
    new = texts[1][len(prompts[1]) :]
    runner = TargetRunner(target, (), rows=1, max_positions=128)
    report = measure_rounding(runner, prompts[1], new, BLOCK)
    assert report.positions == len(new) and report.flips == () and report.max_abs_diff < 1e-3
    assert score(runner, prompts[1], new, BLOCK).argmax(-1).tolist() == new
    other = [*new[:10], (new[10] + 1) % VOCAB, *new[11:]]
    offset, gap, tie = near_tie(runner, prompts[1], other, new, report.max_abs_diff)
    assert offset == 10 and gap > 0 and not tie
    runner.close()
    low = TargetRunner(copy.deepcopy(target).to(torch.bfloat16), (), rows=1, max_positions=128)
    assert measure_rounding(low, prompts[1], new, BLOCK).positions == len(new)
    low.close()


def test_bad_input(case: Any) -> None:
    target, prompts, texts = case
    engine = Engine(target, oracle(texts), max_batch=2, max_len=32)
    for prompt, match in (
        ([], "prompt 0 must have at least one token"),
        ([VOCAB], rf"ids in 0..{VOCAB - 1}, got {VOCAB}"),
        ([1] * 32, r"shorter than max_len \(32 tokens\), got 32"),
        ("text", "needs a tokenizer"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.generate([prompt])
    with pytest.raises(ValueError, match=r"one each \(1\), got 2"):
        engine.generate([[1]], [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="mode must be"):
        engine.generate([[1]], mode="fast")  # type: ignore[arg-type]
    assert engine.generate([]) == []
    engine.close()
    for name, value, match in (
        ("hidden_size", 64, "hidden_size must be 48, got 64"),
        ("vocab_size", 98, "vocab_size must be 97, got 98"),
        ("mask_token_id", 97, "mask_token_id must be in 0..96, got 97"),
        ("target_layer_ids", (0, LAYERS), f"taps target layer {LAYERS}"),
        ("max_positions", 40, "rope table: 48 positions are needed"),
    ):
        drafter = oracle(texts)
        setattr(drafter, name, value)
        with pytest.raises(ValueError, match=match):
            Engine(target, drafter, max_len=32)
    with pytest.raises(ValueError, match="page_size must be in 1..64, got 65"):
        Engine(target, oracle(texts), max_len=32, page_size=65)
    for field, value in (("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("min_p", 2.0), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})


def test_buckets() -> None:
    assert [round_rows(n, 6) for n in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 4, 6, 6]
    assert [round_keys(n, 4000) for n in (1, 256, 257, 513, 769, 1100, 3500)] == [256, 256, 512, 768, 1024, 1536, 4000]


def test_stream_decoder_holds_back_incomplete_characters() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve – 日本語 🙂 end"
    for size in (1, 2, 3, 5):
        decoder, data = StreamDecoder(Bytes()), list(text.encode())
        pieces = [decoder.push(data[i : i + size], final=i + size >= len(data)) for i in range(0, len(data), size)]
        assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)


class TableDrafter:
    """An oracle that can be captured: knows the true texts on the device, and is right where a hash of the place says.

    Its hidden rows are one-hot in the drafter's dtype. Injection writes position + 1 into the caches.
    """

    block_size, mask_token_id, target_layer_ids = BLOCK, 3, (0, 2)
    num_layers, num_kv_heads, head_dim = 1, 1, 8
    hidden_size, vocab_size, max_positions = HIDDEN, VOCAB, 4096

    def __init__(self, texts: list[list[int]], device: str, misses: int = 5) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        length = max(len(t) for t in texts)
        self.texts = torch.tensor([t + [0] * (length - len(t)) for t in texts], device=device)
        self.width = -(-VOCAB // 8) * 8
        self.lm_head_weight = torch.eye(VOCAB, self.width, dtype=self.dtype, device=device)
        self.ahead = torch.arange(BLOCK, device=device)
        self.misses = misses

    def forward(
        self,
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        *rest: Any,
    ) -> torch.Tensor:
        last = self.texts.shape[1] - 1
        here = self.texts[:, prefix_lens.clamp(max=last)]  # [texts, B]
        text = (here == block_ids[:, 0]).int().argmax(0)
        true = self.texts[text[:, None], positions.clamp(max=last)]
        guess = torch.where((positions * 31 + self.ahead) % self.misses == 0, 5, true)
        hidden = torch.zeros(*guess.shape, self.width, dtype=self.dtype, device=guess.device)
        return hidden.scatter_(2, guess[:, :, None], 1.0).view(-1, self.width)

    def inject(
        self,
        taps: list[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        commit_lens: torch.Tensor | None,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> None:
        old, new = k_caches[0][slots.long()], (positions + 1).to(self.dtype)[:, None, None]
        if commit_lens is not None:
            live = (
                torch.arange(positions.numel() // commit_lens.numel(), device=positions.device) < commit_lens[:, None]
            )
            new = torch.where(live.view(-1, 1, 1), new, old)
        k_caches[0][slots.long()] = new.expand_as(old)


def random_drafter(device: str, seed: int = 3) -> Drafter:
    """A drafter with random weights that fits the tiny targets, with sliding and full layers."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, kv_heads, dim, inner = 2, 4, 2, 32, 64
    raw = {
        "block_size": BLOCK,
        "mask_token_id": 3,
        "target_layer_ids": [0, 2],
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
    }
    q, kv = heads * dim, kv_heads * dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    qkv = normal(layers, q + 2 * kv, HIDDEN)
    weights = DrafterWeights(
        fc_weight=normal(HIDDEN, 2 * HIDDEN),
        hidden_norm=torch.ones(HIDDEN),
        kv_weight=qkv[:, q:].contiguous(),
        kv_bias=None,
        input_norm=torch.ones(layers, HIDDEN),
        qkv_weight=qkv,
        qkv_bias=None,
        q_norm=torch.ones(layers, dim),
        k_norm=torch.ones(layers, dim),
        o_weight=normal(layers, HIDDEN, q),
        o_bias=None,
        post_norm=torch.ones(layers, HIDDEN),
        gate_up_weight=normal(layers, 2 * inner, HIDDEN),
        down_weight=normal(layers, HIDDEN, inner),
        final_norm=torch.ones(HIDDEN),
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Drafter(parse_config(raw), weights.to(device, dtype))


def make_drafter(kind: str, texts: list[list[int]], device: str) -> Any:
    return TableDrafter(texts, device) if kind == "oracle" else random_drafter(device)


@pytest.mark.parametrize("kind", ["oracle", "drafter"])
@pytest.mark.parametrize("use_graphs", [False, True])
def test_every_batch_is_lossless_on_the_device(case: Any, device: str, kind: str, use_graphs: bool) -> None:
    """The whole step on its device, padded batches and running ahead included: texts equal transformers' own."""
    target, prompts, texts = case
    target = copy.deepcopy(target).to(device)
    engine = Engine(
        target, make_drafter(kind, texts, device), max_batch=5, max_len=128, page_size=4, use_graphs=use_graphs
    )
    if kind == "drafter":
        assert engine.drafter.bound and engine.drafter.device.type == device
        tied = engine.drafter.embed_weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
        assert tied == (device == "cpu")  # fp32 target: shared on the CPU, cast to bf16 on CUDA
    for count in (5, 1, 3):
        results = engine.generate(prompts[:count], SamplingParams(max_new_tokens=48))
        assert [r.prompt_ids + r.token_ids for r in results] == texts[:count]
        assert engine.last_stats.steps < 48 or kind == "drafter"
    stop = texts[1][len(prompts[1]) + 11]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=48, stop_token_ids=(stop,)))
    for result, prompt, text in zip(results, prompts, texts, strict=True):
        new = text[len(prompt) :]
        assert result.token_ids == (new[: new.index(stop) + 1] if stop in new else new)
    engine.pool.assert_sound()
    assert engine.pool.free_page_count() == engine.pool.num_pages - 1
    assert (engine.last_stats.graph_replays > 0) == (use_graphs and device == "cuda")
    engine.close()


def test_sampling_on_the_device_is_reproducible(case: Any, device: str) -> None:
    """A request's sampled text depends on its seed alone: not on the batch, the graphs or running ahead."""
    target, prompts, texts = case
    target = copy.deepcopy(target).to(device)
    params = [SamplingParams(max_new_tokens=24, temperature=1.0, top_k=20, top_p=0.9, seed=i) for i in range(5)]
    found = []
    for max_batch, use_graphs in ((5, True), (2, False), (1, True)):
        # Not a drafter of floating-point sums: these may round another way in another batch, and propose other tokens.
        engine = Engine(target, TableDrafter(texts, device), max_batch=max_batch, max_len=128, use_graphs=use_graphs)
        found.append([r.token_ids for r in engine.generate(prompts, params)])
        engine.close()
    assert found[0] == found[1] == found[2]


def test_a_second_engine_leaves_the_first_one_alone(case: Any) -> None:
    """A bound drafter serves engines of several sizes; its buffers only grow."""
    target, prompts, texts = case
    drafter = random_drafter("cpu")
    small = Engine(target, drafter, max_batch=1, max_len=64, prefill_chunk=4)
    first = drafter._draft_buffers.at_least(1)[0].data_ptr()
    large = Engine(target, drafter, max_batch=5, max_len=128)
    assert drafter._draft_buffers.at_least(1)[0].data_ptr() == first
    for engine in (large, small):
        results = engine.generate(prompts[:2], SamplingParams(max_new_tokens=20))
        assert [r.token_ids for r in results] == [
            t[len(p) : len(p) + 20] for p, t in zip(prompts, texts[:2], strict=False)
        ]
    large.close()
    small.close()
    with pytest.raises(ValueError, match="drafter must be on its target's device meta, got cpu"):
        Engine(copy.deepcopy(target).to("meta"), drafter, max_len=64)


@pytest.mark.gpu
@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("mode", ["dflash", "plain"])
def test_steady_steps_do_not_wait_for_the_device(case: Any, mode: Any, use_graphs: bool) -> None:
    """Launching a step and its readback makes no synchronising call; only reading the ticket waits."""
    target, prompts, texts = case
    target = copy.deepcopy(target).cuda()
    engine = Engine(target, random_drafter("cuda"), max_batch=4, max_len=128, use_graphs=use_graphs)
    steps, pool = engine.steps, engine.pool
    params = SamplingParams(max_new_tokens=64, seed=0, stop_token_ids=())
    tickets = []
    for row, prompt in enumerate(prompts[:3]):
        pool_row = pool.admit(120) if mode == "dflash" else None
        tickets.append(steps.prefill(row, pool_row, prompt, params, 1024, mode))
    longest = max(len(p) for p in prompts[:3])
    for i in range(3):  # eager once, captured once, replayed once
        tickets.append(steps.run(mode, 3, longest + i * BLOCK, False))
    for ticket in tickets:
        steps.readback.finish(ticket)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        tickets = [steps.run(mode, 3, longest + (3 + i) * BLOCK, False) for i in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(steps.readback.finish(ticket)) == 3 for ticket in tickets)
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("use_graphs", [False, True])
def test_plain_decoding_on_cuda(case: Any, use_graphs: bool) -> None:
    target, prompts, texts = case
    engine = Engine(copy.deepcopy(target).cuda(), max_batch=4, max_len=128, use_graphs=use_graphs)
    results = engine.decode_plain(prompts, SamplingParams(max_new_tokens=48))
    assert [r.prompt_ids + r.token_ids for r in results] == texts
    assert (engine.last_stats.graph_replays > 0) == use_graphs
    engine.close()
