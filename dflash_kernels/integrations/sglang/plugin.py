"""The plugin's entry point, the hook on SGLang's choice of a worker, and the worker with this package's seams.

`activate` hooks ``speculative/spec_info.py`` SpeculativeAlgorithm.create_worker through ``plugins/hook_registry.py``.
SGLang logs and swallows what a plugin or the application of a hook raises, but not what a hook raises when it runs: so
settings are read, and refused, in the hook.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dflash_kernels.integrations.sglang.accept import AcceptSeam
from dflash_kernels.integrations.sglang.forward import ForwardSeam
from dflash_kernels.integrations.sglang.head import HeadSeam
from dflash_kernels.integrations.sglang.inject import InjectSeam
from dflash_kernels.integrations.sglang.inputs import InputsSeam
from dflash_kernels.integrations.sglang.logits import LogitsSeam
from dflash_kernels.integrations.sglang.metadata import MetadataSeam
from dflash_kernels.integrations.sglang.prepare import PrepareSeam
from dflash_kernels.integrations.sglang.ranks import Ranks, ranks_of
from dflash_kernels.integrations.sglang.reserve import ReserveSeam
from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, Declined, Refused, Seam, logger
from dflash_kernels.integrations.sglang.settings import Settings, read_settings

HOOK_TARGET = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
SEAMS: tuple[type[Seam], ...] = (
    InjectSeam,
    AcceptSeam,
    LogitsSeam,
    PrepareSeam,
    InputsSeam,
    MetadataSeam,
    HeadSeam,
    ForwardSeam,
    ReserveSeam,
)

_current: dict[type, Seams] = {}  # of each of our worker classes, the seams of its next worker


def activate() -> None:
    """Entry point of the group `sglang.srt.plugins`: registers the hook, nothing else."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(HOOK_TARGET, create_worker, HookType.AROUND)


def create_worker(original: Callable[..., Any], algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Around SpeculativeAlgorithm.create_worker: for DFLASH, a subclass of the class it chose."""
    if not algorithm.is_dflash():
        return original(algorithm, *args, **kwargs)
    settings = read_settings([seam.name for seam in SEAMS])
    if not settings.seams:
        return original(algorithm, *args, **kwargs)
    seams = Seams(settings)
    # Before `original`: other plugins that wrap the worker's functions from their own hook then wrap ours.
    seams.install(importlib.import_module(WORKER_MODULE))
    chosen = original(algorithm, *args, **kwargs)
    if chosen in _current:  # the entry point was found twice, in a source tree and in an installed copy
        return chosen
    if chosen.__module__ != WORKER_MODULE:
        seams.decline_all(f"SGLang chose the worker {chosen.__module__}.{chosen.__qualname__}")
        logger.warning("%s", seams.table())
        return chosen
    return worker_class(chosen, seams)


class Seams:
    """The seams of one worker, each active or stock for a reason."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.all: dict[str, Seam] = {seam.name: seam() for seam in SEAMS}
        self._open = [self.all[name] for name in settings.seams]
        for seam in self._open:
            seam.settings = settings
            seam.reason = "not bound yet"
        self._switch_read = -1
        self._worker_module: Any = None
        self.ranks = Ranks()

    def __getitem__(self, name: str) -> Seam:
        return self.all[name]

    def each(self, act: Callable[[Seam], None]) -> None:
        """Run one phase on the seams that are still in, which are the same on all ranks, before and after it; in
        strict mode a decline is refused."""
        self.agree({seam.name: _reason(partial(act, seam)) for seam in tuple(self._open)})

    def agree(self, reasons: dict[str, str]) -> None:
        """Decline, for the first rank's reason, the seams that any rank has a reason against."""
        every = self.ranks.gather(reasons)
        for name in reasons:
            for rank, given in enumerate(every):
                if given[name]:
                    on = f" (rank {rank})" if any(other[name] != given[name] for other in every) else ""
                    self.decline(self.all[name], given[name] + on)
                    break

    def decline(self, seam: Seam, reason: str) -> None:
        if seam in self._open:
            self._open.remove(seam)
        seam.active, seam.bound, seam.reason = False, False, reason
        if self.settings.strict:
            raise Refused(f"dflash-kernels: seam {seam.name} declined: {reason}")

    def decline_all(self, reason: str) -> None:
        for seam in tuple(self._open):
            self.decline(seam, reason)

    def _shared_settings(self) -> tuple[object, ...]:
        """What has to be the same on all ranks, with the seams that are still in."""
        named = (replace(self.settings, switch=""), sorted(self.settings.rows.items()))
        return (*named, [seam.name for seam in self._open])

    def install(self, worker_module: Any) -> None:
        self._worker_module = worker_module
        self.each(lambda seam: seam.install(worker_module))

    def prepare(self, worker: Any) -> None:
        ranks = ranks_of(self._worker_module, worker)
        if ranks is None:
            self.decline_all("tensor parallelism, and no group of its ranks")
            return
        self.ranks = ranks
        for seam in self._open:
            seam.ranks = ranks
        if len(set(map(repr, ranks.gather(self._shared_settings())))) > 1:
            self.decline_all("ranks with different settings")
            return
        self.each(_require_device(worker))
        self.each(lambda seam: seam.prepare(worker))
        for seam in self._open:
            seam.agreed = True

    def bind(self, worker: Any) -> None:
        def bind(seam: Seam) -> None:
            seam.bind(worker)
            seam.active = seam.bound = True
            seam.reason = ""

        self.each(bind)
        if self.ranks.world > 1:
            self.each(lambda seam: seam.meet(worker))

    def captured(self, worker: Any) -> None:
        self.each(lambda seam: seam.captured(worker))

    def start_step(self, batch: Any) -> None:
        self.follow_switch()
        for seam in self._open:
            seam.start_step(batch)

    def end_step(self) -> None:
        """Raise what a replacement raised inside a function whose errors SGLang swallows."""
        for seam in self._open:
            seam.end_step()
            if seam.error is not None:
                raise Refused(f"dflash-kernels: seam {seam.name} failed: {seam.error}") from seam.error

    def follow_switch(self) -> None:
        """Use the seams that the switch file names, if it has changed."""
        if not self.settings.switch:
            return
        try:
            changed = os.stat(self.settings.switch).st_mtime_ns
        except OSError:
            return
        if changed == self._switch_read:
            return
        self._switch_read = changed
        named = Path(self.settings.switch).read_text(encoding="utf-8").replace(",", " ").split()
        for seam in self.all.values():
            if seam.bound and seam.switchable:
                seam.active = seam.name in named
                seam.reason = "" if seam.active else "switched off"
        logger.warning("%s", self.table())

    def table(self) -> str:
        """One line a seam: its name, active or stock, why."""
        width = max(map(len, self.all))
        lines = []
        for name, seam in self.all.items():
            state, why = ("active", seam.note) if seam.active else ("stock ", seam.reason)
            lines.append(f"  {name:<{width}}  {state}  {why}".rstrip())
        return "\n".join(["dflash-kernels seams in SGLang's DFLASH worker:", *lines])


def _reason(act: Callable[[], object]) -> str:
    """Why a phase of a seam ended without success; empty if it did not."""
    try:
        act()
    except Declined as declined:
        return str(declined) or "declined"
    except Refused:
        raise
    except Exception as error:
        # Whatever an engine that changed may do here: stock is the answer, and the table says so.
        return f"{type(error).__name__}: {error}"
    return ""


def _require_device(worker: Any) -> Callable[[Seam], None]:
    device = torch.device(worker.device)
    reason = ""
    if device.type not in ("cuda", "cpu"):
        reason = f"device {device.type}"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability[0] not in (9, 10):
            reason = f"compute capability {capability[0]}.{capability[1]}"
        elif not torch._C._dispatch_has_kernel_for_dispatch_key("dflash::inject_kv", "CUDA"):
            reason = "a library without CUDA kernels"

    def check(seam: Seam) -> None:
        if reason:
            raise Declined(reason)

    return check


def worker_class(base: type, seams: Seams) -> type:
    """The subclass of SGLang's worker with these seams; one a base class, whatever the number of calls."""
    cls = _subclass(base)
    _current[cls] = seams
    return cls


@cache
def _subclass(base: type) -> type:
    class DFlashKernelsWorker(base):  # type: ignore[misc, valid-type]
        """SGLang's worker, with replacements where a seam is active. Arguments pass through: they differ by version."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._dflash_seams = _current[type(self)]
            super().__init__(*args, **kwargs)
            self._dflash_seams.prepare(self)

        def init_cuda_graphs(self, *args: Any, **kwargs: Any) -> Any:
            self._dflash_seams.bind(self)
            result = super().init_cuda_graphs(*args, **kwargs)
            head = self._dflash_seams["head"]
            if head.active and not _has_our_sampler(self):
                self._dflash_seams.decline(head, "no draft graph was captured with a sampler")
            self._dflash_seams.captured(self)
            if getattr(self.model_runner, "tp_rank", 0) == 0:
                logger.warning("%s", self._dflash_seams.table())
            return result

        def _maybe_build_draft_sampler(self, *args: Any, **kwargs: Any) -> Any:
            stock = super()._maybe_build_draft_sampler(*args, **kwargs)
            head = self._dflash_seams["head"]
            if not head.active:
                return stock
            found: list[Any] = []
            reason = _reason(lambda: found.append(head.replace(stock)))  # type: ignore[attr-defined]
            self._dflash_seams.agree({head.name: reason})
            return head.meet_with(found[0]) if head.active else stock  # type: ignore[attr-defined]

        def _append_target_hidden_to_draft_kv_by_loc(self, **kwargs: Any) -> None:
            inject = self._dflash_seams["inject"]
            if inject.active:
                try:
                    if inject.run(**kwargs):  # type: ignore[attr-defined]
                        return
                except Exception as error:
                    inject.failed(error)
            super()._append_target_hidden_to_draft_kv_by_loc(**kwargs)

        def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._dflash_seams.start_step(batch)
            result = super().forward_batch_generation(batch, *args, **kwargs)
            self._dflash_seams.end_step()
            return result

    DFlashKernelsWorker.__qualname__ = DFlashKernelsWorker.__name__ = f"DFlashKernels{base.__name__}"
    return DFlashKernelsWorker


def _has_our_sampler(worker: Any) -> bool:
    from dflash_kernels.integrations.sglang.head import DraftSampler

    return isinstance(getattr(worker, "_draft_sampler", None), DraftSampler)
