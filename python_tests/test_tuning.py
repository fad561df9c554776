"""What was tuned is read where it belongs, and nothing else is; how it is measured, checked and chosen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import tune
from bench.shapes import DrafterShape
from bench.tune import Question, answer, block_candidates, choose, lazy_limit
from dflash_kernels import doctor, ops, tuning
from dflash_kernels.formats import WeightFormat
from dflash_kernels.reference import verify as reference

SMALL = DrafterShape("small", L=2, K=2, H=128, I=192, Hq=2, Hkv=1, D=64, T=8, V=500)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> str:
    """A made-up GPU; its machine's name in the file."""
    properties = SimpleNamespace(name="Some Card", multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(tuning, "library_digest", lambda: "0123456789ab")
    return "Some Card, 148 SMs, library 0123456789ab"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    where = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(where))
    tuning.forget()
    return where


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "OFF")
    assert tuning.path() is None
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.path() == tmp_path / "dflash-kernels" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, "/some/file.json")
    assert tuning.path() == Path("/some/file.json")


def test_values_are_found_by_machine_and_shape(card: str, file: Path) -> None:
    fp8 = WeightFormat("fp8")
    bf16_shape = tuning.draft_shape(5, 4096, 12288, (32, 8), 128, None)
    fp8_shape = tuning.draft_shape(5, 4096, 12288, (32, 8), 128, fp8)
    assert bf16_shape == "L5 H4096 I12288 32/8x128 bf16" and fp8_shape != bf16_shape
    assert tuning.stream_blocks("draft", bf16_shape, GPU) == 148, "no file: one a multiprocessor"
    tuning.save(file, card, {"draft": {bf16_shape: {"blocks": 74}, "chain": {"blocks": 0}}})
    assert tuning.stream_blocks("draft", bf16_shape, GPU) == 74
    assert tuning.stream_blocks("draft", "chain", GPU) == 0
    for kind, shape in (("draft", fp8_shape), ("head", bf16_shape), ("inject", tuning.inject_shape(5, 4096, 80, 128))):
        assert tuning.stream_blocks(kind, shape, GPU) == 148
    assert (
        tuning.stream_blocks("draft", fp8_shape, GPU, 37) == 37
        and tuning.stream_blocks("draft", bf16_shape, GPU, 37) == 74
    )
    assert tuning.stream_blocks("draft", bf16_shape, CPU) == 1
    # Another machine's values are kept and not used.
    tuning.save(file, "Another Card, 132 SMs, library 0", {"draft": {fp8_shape: {"blocks": 3}}})
    tuning.save(file, card, {"head": {tuning.head_shape(500, 64, None): {"blocks": 111}}})
    assert tuning.stream_blocks("draft", bf16_shape, GPU) == 74 and tuning.stream_blocks("draft", fp8_shape, GPU) == 148
    assert tuning.stream_blocks("head", "V500 H64 bf16", GPU) == 111
    assert len(json.loads(file.read_text())) == 2 and not list(file.parent.glob("*.part"))


@pytest.mark.parametrize("value", [149, -1, "many", 7.5, True, None])
def test_a_value_that_cannot_be_used_is_left_out(value: Any, card: str, file: Path) -> None:
    tuning.save(file, card, {"draft": {"x": {"blocks": value}}, "head": {"x": {"blocks": 0}}, "verify_block": 3})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tuning.stream_blocks("draft", "x", GPU) == 148
        assert tuning.stream_blocks("head", "x", GPU) == 148, "only a drafter has a chain to fall back to"
    assert len(said) == (1 if value is None else 2) and "tuning left out" in str(said[-1].message)
    assert tuning.lazy(SimpleNamespace(device=GPU, nbytes=1)) == -1  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_a_broken_file_is_left_out(content: str, card: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="tuning left out"):
        assert tuning.stream_blocks("head", "x", GPU) == 148
    with pytest.raises(ValueError, match="JSON|object"):
        tuning.save(file, card, {})
    assert file.read_text() == content


def test_doctor_says_what_is_tuned(card: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "defaults" in doctor._check_tuning().what
    tuning.save(file, "Another Card", {})
    finding = doctor._check_tuning()
    assert finding.status == "note" and "none for this card" in finding.what and finding.fix
    tuning.save(file, card, {})
    assert doctor._check_tuning().what == f"{file} has values for this card and library"
    file.write_text("{")
    assert doctor._check_tuning().status == "note" and "no JSON" in doctor._check_tuning().what
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert "switched off" in doctor._check_tuning().what


def test_lazy_by_bytes(card: str, file: Path) -> None:
    logits: Any = SimpleNamespace(device=GPU, nbytes=1000)
    assert tuning.lazy(logits) == -1, "the kernel's own limit"
    tuning.save(file, card, {"verify_block": {"lazy_bytes": 1001}})
    assert tuning.lazy(logits) == 0
    tuning.save(file, card, {"verify_block": {"lazy_bytes": 1000}})
    assert tuning.lazy(logits) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, tune.NEVER])
def test_verify_block_follows_the_file(limit: int, file: Path, rng: torch.Generator) -> None:
    """With rows skipped and with all read the outputs are the reference's."""
    device = torch.device("cuda", torch.cuda.current_device())
    logits = torch.randn(3, 8, 2000, generator=rng).bfloat16()
    candidates = torch.randint(0, 2000, (3, 8), generator=rng)
    candidates[0, 1:6] = logits[0, :5].argmax(-1)
    prefix_lens = torch.tensor([4, 5, 6])
    tuning.save(file, tuning.machine(device), {"verify_block": {"lazy_bytes": limit}})
    assert tuning.lazy(logits.cuda()) == (0 if limit else 1)
    found = ops.verify_block(candidates.cuda(), logits.cuda(), prefix_lens.cuda())
    for one, expected in zip(found, reference.verify_block(candidates, logits, prefix_lens), strict=True):
        assert torch.equal(one.cpu(), expected)
    tuning.forget()


def test_candidates_and_choice() -> None:
    assert block_candidates(148, chain=True) == [148, 111, 74, 37, 0]
    assert block_candidates(1, chain=False) == [1]
    times = {148: {"B1": 100.0, "B4": 200.0}, 74: {"B1": 90.0, "B4": 190.0}, 0: {"B1": 60.0, "B4": 600.0}}
    assert choose(times, 148) == 74, "over all loads, not the best of one"
    assert choose({148: {"B1": 100.0}, 74: {"B1": 98.5}}, 148) == 148, "within the margin the default stays"
    assert lazy_limit([(1, 10.0, 20.0), (4, 40.0, 30.0), (9, 90.0, 60.0)]) == 4
    assert lazy_limit([(1, 10.0, 5.0), (4, 40.0, 41.0), (9, 90.0, 60.0)]) == 9, "it must win at every larger size"
    assert lazy_limit([(1, 10.0, 10.0)]) == tune.NEVER


def fake_timer(us: dict[int, float]) -> Callable[..., list[float]]:
    """Times by the value that a call returns; the calls run."""
    return lambda players, rounds: [us[fns[0]()] for fns in players]  # type: ignore[index]


def test_a_wrong_candidate_is_never_chosen() -> None:
    def ask(wrong: dict[int, str]) -> Question:
        return Question("draft", "x", [4, 2, 1], 4, lambda v: {"B1": [lambda: v]}, wrong.get)

    us = {4: 10.0, 2: 5.0, 1: 8.0}
    found = answer(ask({2: "off by one"}), timer=fake_timer(us))
    assert found.chosen == 1 and found.wrong == {2: "off by one"} and set(found.times) == {4, 1}
    assert found.gain == pytest.approx(10 / 8)
    answers, failures = tune.tune(iter([lambda: ask({4: "bad"}), lambda: ask({})]), 1, timer=fake_timer(us))
    assert [a.chosen for a in answers] == [2] and len(failures) == 1 and "the default is wrong" in failures[0]
    assert tune.parameters(answers) == {"draft": {"x": {"blocks": 2}}}
    answers, failures = tune.tune(iter([lambda: ask({})] * 3), 1, seconds=-1, timer=fake_timer(us))
    assert not answers and failures == ["time limit: the other questions were not asked"]


MAKERS = {
    "draft": lambda device: tune.draft_question(SMALL, device),
    "head": lambda device: tune.head_question(SMALL, device),
    "inject": lambda device: tune.inject_question(SMALL, device),
    "verify": lambda device: tune.verify_question(SMALL, 3, device),
}


@pytest.mark.parametrize("name", MAKERS)
def test_candidates_run_the_real_ops(name: str, device: str) -> None:
    """Every candidate of a small shape passes its rule and is timed; on the CPU the streaming ops run too."""
    torch.manual_seed(1)
    found = answer(MAKERS[name](torch.device(device)), rounds=1)
    assert not found.wrong and found.chosen in found.times and len(found.times) > 1
    assert all(us > 0 for loads in found.times.values() for us in loads.values())
    json.dumps(found.as_json())


@pytest.mark.parametrize("name", MAKERS)
def test_wrong_results_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that does something else fails the rule of every question."""
    torch.manual_seed(1)
    question = MAKERS[name](CPU)

    def other(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            for tensor in _tensors(result if result is not None else (args[10], args[11])):
                tensor.add_(1)
            return result

        return run

    for op in ("draft_forward", "draft_forward_packed", "lm_head_argmax_packed", "inject_kv", "verify_block"):
        monkeypatch.setattr(ops, op, other(getattr(ops, op)))
    assert all(question.wrong(value) is not None for value in question.candidates)


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def test_questions_cover_the_shapes() -> None:
    assert len(list(tune.questions(CPU, quick=False))) == 6 + 3 * 3 > len(list(tune.questions(CPU, quick=True)))


def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "a CUDA GPU is needed" in capsys.readouterr().err
