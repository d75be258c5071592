"""Requests on built-in models, `plan` as a user calls it, and plans to draw."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from planner.checkpoint.spec import resolve_model
from planner.cli import main
from planner.plan import Plan
from planner.problem import Request
from planner.profile import load_profile
from planner.search import search
from planner.units import parse_bytes
from planner.workload import make_workload, parse_image


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Kit:
    """What tests of the screen share."""

    root = Path(__file__).parents[2]

    @staticmethod
    @lru_cache(maxsize=64)
    def request(
        model: str = "7b",
        vram: str | None = None,
        images: tuple[str, ...] = ("3840x2160",),
        new_tokens: int = 128,
    ) -> Request:
        checkpoint = resolve_model(model)
        bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}
        workload = make_workload(
            [parse_image(image, **bounds) for image in images],
            **bounds,
            max_new_tokens=new_tokens,
        )
        return Request(checkpoint, workload, None if vram is None else parse_bytes(vram))

    @classmethod
    @lru_cache(maxsize=64)
    def plan(
        cls,
        model: str = "7b",
        vram: str | None = None,
        device: str = "rtx-5080-16gb",
        images: tuple[str, ...] = ("3840x2160",),
        new_tokens: int = 128,
    ) -> Plan:
        return search(cls.request(model, vram, images, new_tokens), load_profile(device))

    @staticmethod
    @lru_cache(maxsize=64)
    def screen(*words: str) -> str:
        """What `plan` prints with these words, which must do without a word on stderr."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
        assert (code, err.getvalue()) == (0, "")
        return out.getvalue()


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`plan` with these words: exit code, stdout, stderr."""

    def call(*words: str) -> Outcome:
        code = main(words)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call
