"""One lab for all tests, and one thread: products this small gain nothing from more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.hostile.lab import SETTINGS, Lab


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    """Each setting's name in turn."""
    return str(request.param)
