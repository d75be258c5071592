"""What a session holds: the plan's bound for every request, and no more after twenty; and the same from the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console

from executor.make_checkpoint import make_random_checkpoint
from executor.prepare import Request
from executor.record import Record
from executor.run import run
from planner import search, workload
from planner.checkpoint import spec
from planner.plan import Plan
from planner.plan.tiles import question_tile
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.screen.report import render
from planner.units import MIB, format_seconds

QUESTIONS = 20
SCRIPT = """
import json, sys
from pathlib import Path
from planner.checkpoint import spec
from planner.plan import Plan
from planner.plan.tiles import question_tile
from executor.prepare import Request
from executor.run import Session

folder, *images = map(Path, sys.argv[1:])
checkpoint = spec.read_checkpoint(folder / "tiny")
plan = Plan.load(folder / "plan.json")
request = Request(
    locations=checkpoint.tensors, images=images[:1], tokenizer=checkpoint.tokenizer_json, stop=()
)
found = []
with Session(plan, request) as session:
    for number in range(%d):
        text = "What is to be seen here, and where?"[: 4 + number * 7 %% 30]
        record = session.ask(text, [images[number // 10]]).record
        found.append((record.reused_tokens, record.peak_bytes, record.context_bytes))
print(json.dumps(found))
"""


class Files:
    """A tiny checkpoint, two images and a plan with everything streamed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_random_checkpoint("tiny", folder / "tiny")
        self.images = [folder / f"{number}.png" for number in (0, 1)]
        for number, path in enumerate(self.images):
            values = np.random.default_rng(number).integers(0, 255, (140, 196, 3), dtype=np.uint8)
            Pillow.fromarray(values).save(path)
        self.checkpoint = checkpoint = spec.read_checkpoint(folder / "tiny")
        bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}
        asked = workload.make_workload(
            [workload.parse_image(str(self.images[0]), **bounds)],
            **bounds,
            n_text_tokens=40,
            tokenizer_json=checkpoint.tokenizer_json,
            max_new_tokens=6,
        )
        request = search.Request(checkpoint, asked, None)
        none = PhaseResidency(0, 0, 0)
        profile = load_profile("cpu")
        choice = Choice(
            order="vision_then_llm",
            images_together=True,
            depth=2,
            vision=none,
            prefill=none,
            decode=none,
            tiles=search.search(request, profile).levers.tiles,
        )
        self.plan = search.build(request, profile, choice)
        self.plan.save(folder / "plan.json")

    def process(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("session_files"))


def test_twenty_questions_hold_what_the_plan_says_and_nothing_grows(files: Files) -> None:
    words = [str(files.folder), *map(str, files.images)]
    done = files.process("-c", SCRIPT % QUESTIONS, *words)
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, int, int]] = json.loads(done.stdout)
    further = files.plan.prediction.further
    assert further is not None
    reused, peaks, contexts = zip(*found, strict=True)
    assert [n for n in range(QUESTIONS) if not reused[n]] == [0, 10]  # the images' first
    assert max(peaks) <= further.bound_peak_bytes
    # the second request meets a few lines of code for the first time; the heap settles within half a MiB
    assert max(contexts[2:]) - min(contexts[2:]) <= MIB
    assert max(peaks[11:]) - max(peaks[1:10]) <= MIB


def test_several_prompts_are_answered_one_after_another(files: Files) -> None:
    texts = ("What is this?", "And that?", "What is this?")
    record = files.folder / "r.json"
    done = files.process(
        *("-m", "executor.cli", str(files.folder / "plan.json")),
        *("--model", str(files.folder / "tiny"), "--image", str(files.images[0])),
        *(word for text in texts for word in ("--prompt", text)),
        *("--record", str(record)),
    )
    assert done.returncode == 0, done.stderr
    request = Request(
        locations=files.checkpoint.tensors,
        images=files.images[:1],
        tokenizer=files.checkpoint.tokenizer_json,
    )
    said = [run(files.plan, replace(request, prompt=text)).text for text in texts]
    assert done.stdout == "".join(f"{text}\n" for text in said)
    records = [Record.load(files.folder / name) for name in ("r.json", "r-2.json", "r-3.json")]
    rows = [r.reused_tokens for r in records]
    assert rows[0] == 0 < rows[1] == rows[2]
    # one table each; of further questions without loading and vision
    assert done.stderr.count("predicted and recorded") == 3
    assert done.stderr.count("vision ") <= done.stderr.count("prefill ") - 2


def test_predictions_tell_a_further_question_from_another_image(files: Files) -> None:
    def plan(images: int, new_tokens: int) -> Plan:
        checkpoint = spec.resolve_model("3b")
        bounds = {"min_pixels": 3136, "max_pixels": 12845056}
        asked = workload.make_workload(
            [workload.parse_image("1024x1024", **bounds)] * images,
            **bounds,
            n_text_tokens=20,
            max_new_tokens=new_tokens,
        )
        return search.search(
            search.Request(checkpoint, asked, 10**10), load_profile("cpu"), compared=False
        )

    seconds: dict[str, Any] = {}
    full = plan(1, 32)
    further = full.prediction.further
    assert further is not None
    for phase in full.prediction.phases:
        seconds[phase.phase] = phase.seconds
    assert further.question_rows == 32
    assert further.question_prefill_seconds < 0.25 * seconds["prefill"]
    assert further.question_seconds == pytest.approx(
        further.question_prefill_seconds + seconds["decode"]
    )
    # another image: the whole again, without the start
    whole = full.prediction.seconds - seconds["load"]
    assert further.request_seconds == pytest.approx(whole, rel=0.2)
    assert further.request_seconds > further.question_seconds + 0.9 * seconds["vision"]
    # a few MiB of code for products of 32 rows, within the budget
    assert 2**20 < further.kept_bytes < 8 * 2**20
    assert further.bound_peak_bytes <= 10**10
    # without an image, or with one token of answer, nothing is kept
    for other in (plan(0, 32), plan(1, 1)):
        none = other.prediction.further
        assert none is not None
        assert none.question_rows is None
        assert none.question_seconds == none.request_seconds


def test_a_questions_tiles_end_within_the_room_behind_the_prompt() -> None:
    # (at most so many rows, before, prompt, behind) -> rows at once
    assert question_tile(32, 1000, 1030, 127) == 32
    assert question_tile(64, 1000, 1037, 3) == 37  # no room for 64
    assert question_tile(128, 1000, 1997, 127) == 128
    assert question_tile(128, 1000, 1997, 1) == 2  # 997 is a prime
    assert (
        question_tile(64, 5, 42, 60) == 37
    )  # the residual stream has no more rows than the prompt
    for left in range(1, 300):
        for more in (0, 1, 7, 100):
            for most in (1, 7, 32, 128):
                tile = question_tile(most, 400, 400 + left, more)
                assert 1 <= tile <= most
                assert -(-left // tile) * tile <= left + more


def test_the_screen_says_what_more_takes(files: Files) -> None:
    further = files.plan.prediction.further
    assert further is not None

    def screen(plan: Plan) -> str:
        console = Console(width=80, file=io.StringIO())
        console.print(render(plan))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    lines = screen(files.plan).splitlines()
    found = [line.rstrip() for line in lines if line.startswith("  again ")]
    question, request = map(format_seconds, (further.question_seconds, further.request_seconds))
    assert found == [
        f"  again    a further question about the same image {question}, another {request}"
    ]
    none = further.model_copy(update={"question_rows": None})
    prediction = files.plan.prediction.model_copy(update={"further": none})
    plan = files.plan.model_copy(update={"prediction": prediction})
    assert "  again " not in screen(plan)
