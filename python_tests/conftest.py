"""Fixtures shared by all tests: the device under test and a generator seeded by the test's name."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from sglang_source import VERSIONS, Source, unpack_wheel

os.environ["DFLASH_TUNING"] = "off"  # what was tuned on this machine is not what is tested

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def on_device(value: torch.Tensor, device: str) -> torch.Tensor:
    """``value`` on a device with the strides it has: ``Tensor.to`` makes a tensor with gaps contiguous on the way."""
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return out.copy_(value)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """CPU generator; the same test draws the same numbers in every run."""
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    return generator


@pytest.fixture(scope="session", params=VERSIONS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """SGLang's source, of each version that the plugin is checked against."""
    return Source(unpack_wheel(request.param, tmp_path_factory.mktemp("sglang")), request.param)
