"""verify_block_sampled: the emitted tokens are the target's, exactly the oracle's for given seeds, on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import on_device

from dflash_kernels import ops
from dflash_kernels.ops import Verified
from dflash_kernels.reference import verify as reference

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
RULES = ["token", "block"]
# Weights and sums of the op are good to a few 1e-7, the oracle's to 1e-15. Decisions closer than this may differ.
MARGIN = 5e-6


def settings(batch: int, device: str = "cpu", **given: Any) -> dict[str, torch.Tensor]:
    """Per-request arguments: plain sampling at temperature 1 unless given."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 1234, "offsets": 0, **given}
    types = {"top_k": torch.int64, "seeds": torch.int64, "offsets": torch.int64}
    return {
        name: torch.as_tensor(value, dtype=types.get(name, torch.float32)).expand(batch).contiguous().to(device)
        for name, value in values.items()
    }


def to(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def poisoned(batch: int, block_size: int, device: str) -> Verified:
    out = Verified.empty(batch, block_size, device)
    for tensor in out:
        tensor.fill_(-77)
    return out


def front_size(batch: int, block_size: int, vocab: int) -> int:
    """Elements that are zero between calls."""
    return batch * (2 * block_size + 2) + 3 + batch * block_size * (-(-vocab // 4096) * 8 + 2)


def poisoned_workspace(batch: int, block_size: int, vocab: int, device: str) -> torch.Tensor:
    """Zero where it has to be."""
    workspace = ops.verify_workspace(batch, block_size, device, vocab)
    workspace[front_size(batch, block_size, vocab) :] = -1
    return workspace


def is_clean(workspace: torch.Tensor, batch: int, block_size: int, vocab: int) -> bool:
    return not workspace[: front_size(batch, block_size, vocab)].any()


def assert_matches(device: str, arguments: dict[str, Any]) -> Verified:
    """The op gives the oracle's result, except where a decision was closer than MARGIN; the workspace ends zero."""
    batch, block_size, vocab = arguments["logits"].shape
    out, workspace = poisoned(batch, block_size, device), poisoned_workspace(batch, block_size, vocab, device)
    ops.verify_block_sampled(**to(device, arguments), out=out, workspace=workspace)
    assert is_clean(workspace, batch, block_size, vocab)
    margins: list[float] = []
    expected = reference.verify_block_sampled(**arguments, margins=margins)
    for b in range(batch):
        same = all(torch.equal(a.cpu()[b], e[b]) for a, e in zip(out, expected, strict=True))
        assert same or margins[b] < MARGIN, f"request {b}: {[a[b] for a in out]} not {[e[b] for e in expected]}"
    assert sum(m < MARGIN for m in margins) <= batch // 8  # the comparison must mean something
    return out


def draw_draft(logits: torch.Tensor, width: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """A sparse draft: the rows' top tokens with noisy probabilities, a padding pair, and candidates drawn from it."""
    batch, block_size, _ = logits.shape
    noisy = logits[:, :-1].float() + torch.randn(logits[:, :-1].shape, generator=rng)
    top = noisy.topk(width, dim=-1)
    probs = torch.softmax(top.values, -1)
    ids = top.indices.clone()
    probs[..., -1] = 0.0
    ids[..., -1] = ids[..., 0]  # a pair without mass may repeat an id
    probs = probs / probs.sum(-1, keepdim=True)
    place = torch.multinomial(probs.view(-1, width), 1, generator=rng).view(batch, block_size - 1, 1)
    candidates = torch.zeros(batch, block_size, dtype=torch.int64)
    candidates[:, 1:] = ids.gather(-1, place)[..., 0]
    return {"candidates": candidates, "draft_ids": ids, "draft_probs": probs}


def one_hot_draft(logits: torch.Tensor, rng: torch.Generator) -> dict[str, torch.Tensor]:
    batch, block_size, _ = logits.shape
    noisy = logits[:, :-1].float() + 0.5 * torch.randn(logits[:, :-1].shape, generator=rng)
    candidates = torch.zeros(batch, block_size, dtype=torch.int64)
    candidates[:, 1:] = noisy.argmax(-1)
    return {"candidates": candidates}


def mixed_settings(batch: int, vocab: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Greedy, plain, and every filter, mixed in one batch."""
    pick = torch.arange(batch) % 6
    return settings(
        batch,
        temperature=torch.where(pick == 0, 0.0, torch.rand(batch, generator=rng) * 1.5 + 0.3),
        top_k=torch.where(pick % 2 == 0, torch.randint(1, 40, (batch,), generator=rng), 0),
        top_p=torch.where(pick >= 3, torch.rand(batch, generator=rng), 1.0),
        min_p=torch.where(pick == 5, 0.08, 0.0),
        seeds=torch.randint(-(2**62), 2**62, (batch,), generator=rng),
        offsets=torch.randint(0, 2**40, (batch,), generator=rng),
    )


# ---- against the oracle -----------------------------------------------------------------------------------------


def test_philox_known_answer() -> None:
    """Random123's test vectors for philox4x32-10: zeros; and pi's digits."""
    assert reference.philox(0, 0, 0) == ((0x6627E8D5 >> 8) / 2**24, (0xE169C58D >> 8) / 2**24)
    logits = torch.zeros(1, 1, 1 << 16)  # the bonus is floor(u * 2^16) of word 1
    token = ops.verify_block_sampled(
        torch.zeros(1, 1, dtype=torch.int64), logits, torch.zeros(1, dtype=torch.int64), **settings(1, seeds=0)
    )
    assert token.bonus_ids.item() == 0xE169


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "block_size", "vocab", "sparse"),
    [
        (24, 8, 300, False),
        (24, 8, 301, True),
        (12, 16, 83, True),
        (12, 32, 61, False),
        (7, 1, 50, False),
        (64, 10, 97, True),
        (256, 7, 61, False),
    ],
)
def test_matches_reference(
    device: str,
    rng: torch.Generator,
    batch: int,
    block_size: int,
    vocab: int,
    sparse: bool,
    dtype: torch.dtype,
    rule: str,
) -> None:
    logits = (torch.randn(batch, block_size, vocab, generator=rng) * 2.5).to(dtype)
    draft = draw_draft(logits, 6, rng) if sparse else one_hot_draft(logits, rng)
    prefix = torch.randint(0, 9000, (batch,), generator=rng)
    out = assert_matches(
        device, {**draft, "logits": logits, "prefix_lens": prefix, **mixed_settings(batch, vocab, rng), "rule": rule}
    )
    if block_size == 8:
        assert out.accept_lens.unique().numel() >= 3  # a test that only ever accepts nothing proves little


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_mask_and_bias(device: str, rng: torch.Generator, index: torch.dtype, rule: str) -> None:
    batch, block_size, vocab = 18, 7, 203
    logits = torch.randn(batch, block_size, vocab, generator=rng) * 2
    mask = torch.randint(-(2**31), 2**31, (batch, block_size, 7), generator=rng, dtype=torch.int64).to(torch.int32)
    mask[3] = 0  # nothing allowed: token 0
    mask[4] = -1
    bias = torch.randn(batch, vocab, generator=rng)
    draft = draw_draft(logits + bias[:, None], 5, rng)
    draft = {"candidates": draft["candidates"].to(index), "draft_ids": draft["draft_ids"].to(index), **draft} | {
        "candidates": draft["candidates"].to(index),
        "draft_ids": draft["draft_ids"].to(index),
    }
    values = mixed_settings(batch, vocab, rng)
    values["top_k"] = values["top_k"].to(index)
    arguments = {
        **draft,
        "logits": logits,
        "prefix_lens": torch.arange(batch).to(index),
        **values,
        "token_bitmask": mask,
        "logit_bias": bias,
        "rule": rule,
    }
    out = assert_matches(device, arguments)
    for b in (5, 6, 7):
        j = int(out.accept_lens[b])
        token = int(out.bonus_ids[b])
        assert (int(mask[b, j, token // 32]) >> (token % 32)) & 1


def few_tokens(batch: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Settings under which a row keeps few tokens: greedy, and top-k up to 64 with the other filters."""
    pick = torch.arange(batch) % 4
    return settings(
        batch,
        temperature=torch.where(pick == 0, 0.0, torch.rand(batch, generator=rng) * 1.5 + 0.3),
        top_k=torch.randint(1, 65, (batch,), generator=rng),
        top_p=torch.where(pick >= 2, torch.rand(batch, generator=rng), 1.0),
        min_p=torch.where(pick == 3, 0.08, 0.0),
        seeds=torch.randint(-(2**62), 2**62, (batch,), generator=rng),
        offsets=torch.randint(0, 2**40, (batch,), generator=rng),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [5003, 20000, 151936])
def test_few_tokens_of_many(device: str, rng: torch.Generator, vocab: int, dtype: torch.dtype, rule: str) -> None:
    """Rows of many groups of neighbours: tokens spread, crowded in one group, rounded to ties, equal at the top."""
    batch, block_size = (4, 3) if vocab > 20000 else (8, 5)
    logits = torch.randn(batch, block_size, vocab, generator=rng) * 2.5
    logits[1, :, 700:790] += 9.0
    logits[2] = (logits[2] * 4).round() / 4
    logits[3, :, -1] = logits[3, :, 0] = logits[3].amax(-1) + 1.0
    logits = logits.to(dtype)
    for draft in (one_hot_draft(logits, rng), draw_draft(logits, 6, rng)):
        prefix = torch.arange(batch)
        arguments = {**draft, "logits": logits, "prefix_lens": prefix, **few_tokens(batch, rng), "rule": rule}
        assert_matches(device, arguments)


@pytest.mark.parametrize("rule", RULES)
def test_few_tokens_masked_and_biased(device: str, rng: torch.Generator, rule: str) -> None:
    batch, block_size, vocab = 8, 4, 5003
    logits = torch.randn(batch, block_size, vocab, generator=rng) * 2
    mask = torch.randint(-(2**31), 2**31, (batch, block_size, 157), generator=rng, dtype=torch.int64).to(torch.int32)
    mask[1] = 0  # fewer allowed than top-k
    mask[1, :, 40] = 0b1011
    mask[2] = 0  # nothing
    bias = torch.randn(batch, vocab, generator=rng) * 2
    draft = draw_draft(logits + bias[:, None], 5, rng)
    arguments = {**draft, "logits": logits, "prefix_lens": torch.arange(batch), **few_tokens(batch, rng), "rule": rule}
    assert_matches(device, {**arguments, "token_bitmask": mask, "logit_bias": bias})
    assert_matches(device, {**arguments, "token_bitmask": mask})
    assert_matches(device, {**arguments, "logit_bias": bias})


def test_flat_rows_among_others(device: str, rng: torch.Generator) -> None:
    """A flat row has more tokens within any bound than a list holds: before, at, and behind the end of the prefix."""
    batch, block_size, vocab = 9, 4, 3000
    logits = torch.randn(batch, block_size, vocab, generator=rng) * 2
    draft = one_hot_draft(logits, rng)
    for b, j in ((1, 0), (2, 1), (3, 2), (4, 3), (7, 0)):
        logits[b, j] = 0.5
    values = {**few_tokens(batch, rng), **settings(batch, temperature=0.8, top_k=20)}
    values["temperature"][7] = 0.0  # greedy: token 0, flat or not
    values["top_k"][8] = 0
    out = assert_matches(device, {**draft, "logits": logits, "prefix_lens": torch.arange(batch), **values})
    if int(draft["candidates"][7, 1]) != 0:
        assert out.bonus_ids[7] == 0


def test_one_workspace_for_all(device: str, rng: torch.Generator) -> None:
    """Scratch of one call is never in the part that another wants to be zero."""
    workspace = ops.verify_workspace(6, 5, device, 3000)
    for batch, block_size, vocab in ((6, 5, 3000), (2, 3, 700), (1, 1, 3000), (6, 5, 20), (6, 5, 3000)):
        logits = torch.randn(batch, block_size, vocab, generator=rng) * 2
        arguments = to(device, {**one_hot_draft(logits, rng), "logits": logits, "prefix_lens": torch.arange(batch)})
        values = to(device, few_tokens(batch, rng))
        values["top_k"][0] = 0
        shared = {"out": poisoned(batch, block_size, device), "workspace": workspace}
        for a, e in zip(
            ops.verify_block_sampled(**arguments, **values, **shared),
            ops.verify_block_sampled(**arguments, **values),
            strict=True,
        ):
            assert torch.equal(a, e)
        greedy = {"candidates": arguments["candidates"], "target": arguments["logits"]}
        for a, e in zip(
            ops.verify_block(**greedy, prefix_lens=arguments["prefix_lens"], **shared),
            ops.verify_block(**greedy, prefix_lens=arguments["prefix_lens"]),
            strict=True,
        ):
            assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_alignment(device: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    for start in range(9):
        storage = torch.randn(6, 9, 2100, generator=rng).to(dtype)
        draft = one_hot_draft(storage[:, :8, start : 2090 - start], rng)
        values = {**draft, "prefix_lens": torch.arange(6), **mixed_settings(6, 2000, rng)}
        expected = reference.verify_block_sampled(logits=storage[:, :8, start : 2090 - start], **values)
        view = storage.to(device)[:, :8, start : 2090 - start]
        result = ops.verify_block_sampled(logits=view, **to(device, values))
        for a, e in zip(result, expected, strict=True):
            assert torch.equal(a.cpu(), e)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [151936, 248320])
def test_large_vocabulary(device: str, rng: torch.Generator, vocab: int, rule: str) -> None:
    """Normal logits, one dominant token, all equal, and ties across the whole row; in bfloat16, so with many ties.

    Each once where all or many tokens are kept, and once where few are.
    """
    logits = torch.randn(8, 2, vocab, generator=rng) * 2.0
    logits[[1, 5], :, vocab // 3] = 40.0
    logits[[2, 6]] = 1.5
    logits[[3, 7]] = logits[[3, 7]].round()
    logits = logits.to(torch.bfloat16)
    values = settings(
        8,
        temperature=[0.7, 1.0, 1.0, 0.9, 0.0, 1.0, 1.0, 0.9],
        top_k=[20, 0, 0, 1000, 0, 50, 20, 64],
        top_p=[0.95, 0.9, 0.5, 0.8, 1.0, 0.9, 0.5, 0.8],
        min_p=[0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.02],
        seeds=torch.randint(0, 2**40, (8,), generator=rng),
    )
    draft = one_hot_draft(logits, rng)
    arguments = {**draft, "logits": logits, "prefix_lens": torch.zeros(8, dtype=torch.int64), **values, "rule": rule}
    margins: list[float] = []
    expected = reference.verify_block_sampled(**arguments, margins=margins)
    result = ops.verify_block_sampled(**to(device, arguments))
    for b in range(8):
        # Among 100,000 equal tokens a uniform is never far from a boundary: the token may be a neighbour.
        if margins[b] >= MARGIN:
            assert all(torch.equal(a.cpu()[b], e[b]) for a, e in zip(result, expected, strict=True)), b
        else:
            assert torch.equal(result.accept_lens.cpu()[b], expected.accept_lens[b])
            kept = reference.target_probs(
                logits[b, int(expected.accept_lens[b])],
                *(values[name][b].item() for name in ("temperature", "top_k", "top_p", "min_p")),
            )
            assert kept[result.bonus_ids.cpu()[b]] > 0
            assert abs(int(result.bonus_ids.cpu()[b]) - int(expected.bonus_ids[b])) < 200


@pytest.mark.parametrize("vocab", [3000, 151936])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (64, 0.9, 0.01), (1, 1.0, 0.0), (0, 0.0, 0.0)],
)
def test_kept_set_is_exact(
    device: str, rng: torch.Generator, vocab: int, top_k: int, top_p: float, min_p: float
) -> None:
    """Draws of many requests over one row: every token the oracle keeps turns up, and no other."""
    row = torch.randn(vocab, generator=rng) * 1.5
    row[torch.randperm(vocab, generator=rng)[:24]] = torch.linspace(9.0, 10.5, 24).repeat_interleave(2)[::2]
    row[int(row.argmax()) - 1] = row.max()  # a tie at the top
    draws = 2048 if vocab == 3000 or device != "cpu" else 24
    p = reference.target_probs(row, 0.8, top_k, top_p, min_p)
    arguments = {
        "candidates": torch.zeros(draws, 1, dtype=torch.int64),
        "prefix_lens": torch.zeros(draws, dtype=torch.int64),
        **settings(draws, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, seeds=torch.arange(draws)),
    }
    logits = row.to(device).expand(draws, 1, vocab)
    drawn = ops.verify_block_sampled(logits=logits, **to(device, arguments)).bonus_ids.cpu()
    assert (p[drawn] > 0).all()
    if draws == 2048:
        likely = (p * draws > 20).nonzero()[:, 0]
        assert torch.isin(likely, drawn).all()


# ---- distribution -----------------------------------------------------------------------------------------------


def chi_square_p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.flatten() * counts.sum()
    assert (counts.flatten()[expected == 0] == 0).all(), "a token the target never emits"
    likely = expected >= 5
    rest_count, rest = counts.flatten()[~likely].sum(), expected[~likely].sum()
    statistic = ((counts.flatten()[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    cells = int(likely.sum())
    if rest >= 5:
        statistic, cells = statistic + (rest_count - rest) ** 2 / rest, cells + 1
    degrees = torch.tensor((cells - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


DRAFTS = ["one-hot", "far", "near", "equal"]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}], ids=["plain", "filtered"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_tokens_are_the_targets(
    device: str, rng: torch.Generator, rule: str, draft: str, filters: dict[str, float]
) -> None:
    """Joint distribution of the first two emitted tokens, over a target whose second token depends on the first.

    Where a step commits one token, the second is drawn from the target here, as the next step would.
    """
    requests, vocab, block_size = 30000, 6, 4
    root = torch.randn(vocab, generator=rng) * 1.2
    table = torch.randn(vocab, vocab, generator=rng) * 1.2  # logits of the next token given the last one
    first = reference.target_probs(root, **{"temperature": 1.0, **filters})
    after = torch.stack([reference.target_probs(row, **{"temperature": 1.0, **filters}) for row in table])

    def draft_of(p: torch.Tensor) -> torch.Tensor:
        if draft == "equal":
            return p
        noise = torch.rand(p.shape, generator=rng, dtype=torch.float64) + 0.05
        weights = noise if draft == "far" else p * (0.5 + noise)
        return weights / weights.sum(-1, keepdim=True)

    first_q, after_q = draft_of(first).float(), draft_of(after).float()
    if draft == "one-hot":
        first_q = torch.nn.functional.one_hot(first.argmax(), vocab).float()
        after_q = torch.nn.functional.one_hot(after.argmin(-1), vocab).float()  # often wrong
    candidates = torch.zeros(requests, block_size, dtype=torch.int64)
    candidates[:, 1] = torch.multinomial(first_q.expand(requests, vocab), 1, generator=rng)[:, 0]
    for j in range(2, block_size):
        candidates[:, j] = torch.multinomial(after_q[candidates[:, j - 1]], 1, generator=rng)[:, 0]
    logits = torch.stack([root.expand(requests, vocab), *(table[candidates[:, j]] for j in range(1, block_size))], 1)
    pairs: dict[str, torch.Tensor] = {}
    if draft != "one-hot":
        rows = [first_q.expand(requests, vocab), *(after_q[candidates[:, j]] for j in range(1, block_size - 1))]
        order = torch.randperm(vocab, generator=rng)
        pairs["draft_probs"] = torch.stack(rows, 1)[..., order].contiguous()
        pairs["draft_ids"] = order.expand(requests, block_size - 1, vocab).contiguous()
    arguments = {
        "candidates": candidates,
        "logits": logits,
        "prefix_lens": torch.zeros(requests, dtype=torch.int64),
        **settings(requests, seeds=torch.arange(requests) * 7 + 1, offsets=3, **filters),
        **pairs,
        "rule": rule,
    }
    result = Verified(*(t.cpu() for t in ops.verify_block_sampled(**to(device, arguments))))
    one, two = result.out_tokens[:, 0], result.out_tokens[:, 1].clone()
    short = result.commit_lens == 1
    two[short] = torch.multinomial(after[one[short]], 1, generator=rng)[:, 0]
    counts = torch.zeros(vocab, vocab, dtype=torch.float64)
    counts.index_put_((one, two), torch.ones(requests, dtype=torch.float64), accumulate=True)
    assert chi_square_p_value(counts.sum(1), first) > 1e-4
    assert chi_square_p_value(counts, first[:, None] * after) > 1e-4
    # The third token too, given the second, where the step committed it.
    three = result.commit_lens >= 3
    if rule == "token" and three.sum() > 1000:
        # Under the token rule, the third token's distribution does not depend on how many were accepted before it.
        again = torch.zeros(vocab, vocab, dtype=torch.float64)
        again.index_put_(
            (two[three], result.out_tokens[three, 2]), torch.ones(int(three.sum())).double(), accumulate=True
        )
        assert chi_square_p_value(again, again.sum(1, keepdim=True) / again.sum() * after) > 1e-4
    if draft == "equal" and not filters:
        assert (result.accept_lens == block_size - 1).double().mean() > 0.999


def test_block_rule_accepts_more(device: str, rng: torch.Generator) -> None:
    logits = (torch.randn(8, 50, generator=rng) * 1.5).expand(4000, 8, 50)
    draft = draw_draft(logits, 20, rng)
    values = settings(4000, seeds=torch.arange(4000))
    mean = {}
    for rule in RULES:
        arguments = {**draft, "logits": logits, "prefix_lens": torch.zeros(4000, dtype=torch.int64), **values}
        result = ops.verify_block_sampled(**to(device, arguments), rule=rule)
        mean[rule] = float(result.accept_lens.double().mean())
    assert mean["block"] > mean["token"]


# ---- properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_temperature_zero_is_greedy(device: str, rng: torch.Generator, dtype: torch.dtype, rule: str) -> None:
    logits = (torch.randn(9, 16, 400, generator=rng) * 3).round().to(dtype)  # ties
    logits[0, 2, 7] = float("nan")
    logits[1, 1, 9] = float("inf")
    logits[2, 0] = -float("inf")
    candidates = torch.zeros(9, 16, dtype=torch.int64)
    candidates[:, 1:] = reference.argmax(logits)[:, :-1]
    candidates[torch.arange(9), torch.randint(1, 16, (9,), generator=rng)] = 399
    prefix = torch.arange(9)
    values = to(device, settings(9, temperature=0.0, top_k=3, top_p=0.4))
    arguments = (candidates.to(device), logits.to(device), prefix.to(device))
    draft = draw_draft(logits.float().nan_to_num(0, 0, 0), 4, rng)
    pairs = {k: v.to(device) for k, v in draft.items() if k != "candidates"}
    for extra in ({}, pairs):
        sampled = ops.verify_block_sampled(*arguments, **values, **extra, rule=rule)
        for a, e in zip(sampled, ops.verify_block(*arguments), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("rule", RULES)
def test_requests_do_not_depend_on_each_other(device: str, rng: torch.Generator, rule: str) -> None:
    batch = 30
    logits = torch.randn(batch, 8, 200, generator=rng) * 2
    arguments = {**draw_draft(logits, 5, rng), "logits": logits, "prefix_lens": torch.arange(batch)}
    arguments.update(mixed_settings(batch, 200, rng))
    whole = ops.verify_block_sampled(**to(device, arguments), rule=rule)
    order = torch.randperm(batch, generator=rng)[:17]
    part = ops.verify_block_sampled(**to(device, {k: v[order] for k, v in arguments.items()}), rule=rule)
    for a, e in zip(part, whole, strict=True):
        assert torch.equal(a.cpu(), e.cpu()[order])


def test_rows_past_the_rejection_do_not_matter(device: str, rng: torch.Generator) -> None:
    batch = 40
    logits = torch.randn(batch, 8, 200, generator=rng) * 2
    arguments = {**one_hot_draft(logits, rng), "prefix_lens": torch.arange(batch), **mixed_settings(batch, 200, rng)}
    on_device = to(device, arguments)
    clean = ops.verify_block_sampled(logits=logits.to(device), **on_device)
    for b, length in enumerate(clean.accept_lens.tolist()):
        logits[b, length + 1 :] = float("nan")
    for a, e in zip(ops.verify_block_sampled(logits=logits.to(device), **on_device), clean, strict=True):
        assert torch.equal(a, e)


def test_nan_and_infinities(device: str) -> None:
    """A NaN or +inf, or nothing allowed: all mass on the argmax. -inf: never drawn."""
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(4, 1, 100)
    logits[0, 0, 60] = nan
    logits[1, 0, 61] = inf
    logits[2] = -inf
    logits[3] = -inf
    logits[3, 0, 70] = -1e30
    values = to(device, settings(4, temperature=[1.0, 0.5, 1.0, 2.0], top_k=[0, 3, 0, 9], top_p=[1.0, 0.5, 0.5, 0.9]))
    zeros = torch.zeros(4, 1, dtype=torch.int64, device=device)
    result = ops.verify_block_sampled(zeros, logits.to(device), zeros[:, 0], **values)
    assert result.bonus_ids.tolist() == [60, 61, 0, 70]


def test_extreme_temperatures(device: str, rng: torch.Generator) -> None:
    logits = torch.randn(4, 1, 64, generator=rng)
    zeros = torch.zeros(4, 1, dtype=torch.int64, device=device)
    values = settings(4, temperature=[1e-30, 1e-6, 1e30, float("inf")], seeds=torch.arange(4))
    drawn = ops.verify_block_sampled(zeros, logits.to(device), zeros[:, 0], **to(device, values)).bonus_ids.cpu()
    assert drawn[:2].tolist() == logits[:2, 0].argmax(-1).tolist()
    expected = [int(reference.philox(seed, 0, 0)[1] * 64) for seed in (2, 3)]  # uniform over all tokens
    assert drawn[2:].tolist() == expected


def test_empty_batch(device: str) -> None:
    zeros = torch.zeros(0, 16, dtype=torch.int64, device=device)
    values = to(device, settings(0))
    result = ops.verify_block_sampled(zeros, torch.zeros(0, 16, 9, device=device), zeros[:, 0], **values)
    assert result.out_tokens.shape == (0, 16)


# ---- contract ---------------------------------------------------------------------------------------------------


def good(device: str) -> dict[str, Any]:
    arguments = {
        "candidates": torch.ones(2, 4, dtype=torch.int64),
        "logits": torch.zeros(2, 4, 40),
        "prefix_lens": torch.zeros(2, dtype=torch.int64),
        **settings(2),
        "draft_ids": torch.arange(3).expand(2, 3, 3).contiguous(),
        "draft_probs": torch.full((2, 3, 3), 1 / 3),
        "token_bitmask": torch.full((2, 4, 2), -1, dtype=torch.int32),
        "logit_bias": torch.zeros(2, 40),
    }
    return to(device, arguments)


def test_opcheck(device: str) -> None:
    arguments = good(device)
    torch.library.opcheck(torch.ops.dflash.verify_block_sampled.default, tuple(arguments.values()), {"rule": "block"})
    outs = {**Verified.empty(2, 4, device)._asdict(), "workspace": ops.verify_workspace(2, 4, device, 40)}
    torch.library.opcheck(torch.ops.dflash.verify_block_sampled.out, tuple(arguments.values()), outs)


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "debug"), [("token", "0"), ("block", "1")])
def test_graph_replay_equals_eager(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, rule: str, debug: str
) -> None:
    """Under DFLASH_DEBUG=1 too: a capture, which cannot wait, goes without the checks."""
    monkeypatch.setenv("DFLASH_DEBUG", debug)
    batch, block_size, vocab = 6, 8, 5003
    arguments: dict[str, Any] = {}

    def fresh() -> dict[str, Any]:
        logits = torch.randn(batch, block_size, vocab, generator=rng) * 2
        prefix = torch.arange(batch)
        return {
            **draw_draft(logits, 6, rng),
            "logits": logits,
            "prefix_lens": prefix,
            **mixed_settings(batch, vocab, rng),
        }

    arguments = to("cuda", fresh())
    out, workspace = poisoned(batch, block_size, "cuda"), poisoned_workspace(batch, block_size, vocab, "cuda")
    ops.verify_block_sampled(**arguments, rule=rule, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.verify_block_sampled(**arguments, rule=rule, out=out, workspace=workspace)
    for _ in range(4):
        for name, value in fresh().items():
            arguments[name].copy_(value)
        graph.replay()
        eager = ops.verify_block_sampled(**arguments, rule=rule)
        for a, e in zip(out, eager, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(2, 3, 40), r"logits must have shape \[2, 4, \*\], got \[2, 3, 40\]"),
        (
            "logits",
            torch.zeros(2, 4, 40).double(),
            r"logits must have dtype bfloat16 or float16 or float32, got float64",
        ),
        ("temperature", torch.ones(2).double(), r"temperature must have dtype float32, got float64"),
        ("temperature", torch.ones(4)[::2], r"temperature must be contiguous, got strided \[2\]"),
        ("top_k", torch.ones(2), r"top_k must have dtype int32 or int64, got float32"),
        ("top_p", torch.ones(3), r"top_p must have shape \[2\], got \[3\]"),
        ("min_p", torch.ones(2, 1), r"min_p must have shape \[2\], got \[2, 1\]"),
        ("seeds", torch.ones(2, dtype=torch.int32), r"seeds must have dtype int64, got int32"),
        ("offsets", torch.ones(2), r"offsets must have dtype int64, got float32"),
        (
            "draft_ids",
            torch.zeros(2, 4, 3, dtype=torch.int64),
            r"draft_ids must have shape \[2, 3, \*\], got \[2, 4, 3\]",
        ),
        ("draft_probs", torch.zeros(2, 3, 2), r"draft_probs must have shape \[2, 3, 3\], got \[2, 3, 2\]"),
        ("draft_probs", None, r"draft_ids and draft_probs must be given together, got draft_ids only"),
        ("token_bitmask", torch.zeros(2, 4, 1, dtype=torch.int32), r"token_bitmask must have shape \[2, 4, 2\], got"),
        ("token_bitmask", torch.zeros(2, 4, 2, dtype=torch.int64), r"token_bitmask must have dtype int32, got int64"),
        ("logit_bias", torch.zeros(2, 39), r"logit_bias must have shape \[2, 40\], got \[2, 39\]"),
        ("rule", "chain", r'rule must be "token" or "block", got "chain"'),
    ],
)
def test_bad_arguments(device: str, name: str, value: Any, message: str) -> None:
    arguments = {**good(device), "rule": "token"}
    arguments[name] = on_device(value, device) if isinstance(value, torch.Tensor) else value
    out = poisoned(2, 4, device)
    with pytest.raises(ValueError, match="dflash::verify_block_sampled: " + message):
        ops.verify_block_sampled(**arguments, out=out, workspace=ops.verify_workspace(2, 4, device, 40))
    assert all((tensor == -77).all() for tensor in out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in good("cpu") if name != "candidates"])
def test_mixed_devices(name: str) -> None:
    arguments, out = good("cuda"), poisoned(2, 4, "cuda")
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"^dflash::verify_block_sampled: {name} must be on cuda:0, got cpu"):
        ops.verify_block_sampled(**arguments, out=out, workspace=ops.verify_workspace(2, 4, "cuda", 40))
    assert all((tensor == -77).all() for tensor in out)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("temperature", 1, -0.5, "temperature must be at least 0, got less or NaN in request 1"),
        ("temperature", 1, float("nan"), "temperature must be at least 0"),
        ("top_p", 0, 1.5, r"top_p must be in \[0, 1\], got another value in request 0"),
        ("min_p", 1, -0.1, r"min_p must be in \[0, 1\]"),
        ("candidates", (1, 2), 40, r"candidates must hold draft tokens in \[0, V\)"),
        ("candidates", (0, 3), -1, r"candidates must hold draft tokens in \[0, V\)"),
        ("draft_probs", (1, 2, 0), float("nan"), "draft_probs must be finite and at least 0"),
        ("draft_probs", (1, 2, 0), -0.1, "draft_probs must be finite and at least 0"),
        ("draft_ids", (0, 0, 1), 40, r"draft_ids must be in \[0, V\) where draft_probs > 0"),
        ("draft_ids", (0, 0, 1), 0, "draft_ids must be distinct in a row where draft_probs > 0"),
    ],
)
def test_bad_values(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, place: Any, value: float, message: str
) -> None:
    arguments = good(device)
    arguments[name][place] = value
    out, workspace = poisoned(2, 4, device), ops.verify_workspace(2, 4, device, 40)
    for debug in ("0", "1") if device == "cpu" else ("1",):  # the CPU always looks
        monkeypatch.setenv("DFLASH_DEBUG", debug)
        with pytest.raises(ValueError, match="dflash::verify_block_sampled: " + message):
            ops.verify_block_sampled(**arguments, out=out, workspace=workspace)
    assert all((tensor == -77).all() for tensor in out)
    if device == "cuda":  # unchecked, a bad value harms nobody's memory, and leaves the workspace fit for use
        monkeypatch.setenv("DFLASH_DEBUG", "0")
        ops.verify_block_sampled(**arguments, out=out, workspace=workspace)
        assert is_clean(workspace, 2, 4, 40)


@pytest.mark.gpu
def test_vocabulary_limit() -> None:
    zeros = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    logits = torch.zeros(1, 1, 450561, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"logits must have at most 450560 columns, got 450561"):
        ops.verify_block_sampled(zeros, logits, zeros[:, 0], **settings(1, "cuda"))
    ops.verify_block_sampled(zeros, logits[..., :-1], zeros[:, 0], **settings(1, "cuda"))
