"""Plans and records of runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzz.inputs import picture
from fuzz.mutate import as_json, spoil_bytes, spoil_value
from fuzz.target import Place, Target


class Small(NamedTuple):
    """A plan of a tiny random model for one small image, its checkpoint and the image."""

    plan: dict[str, Any]
    locations: dict[str, Any]
    image: Path
    tokenizer: Path


def small(place: Place) -> Small:
    import contextlib

    import planner.cli
    from executor.make_checkpoint import make_random_checkpoint
    from planner.checkpoint.spec import read_checkpoint

    folder, image, out = place.path / "tiny", place.path / "a.png", place.path / "plan.json"
    make_random_checkpoint("tiny", folder)
    picture("PNG", image, (56, 84))
    words = [
        "--device",
        "cpu",
        "--model",
        str(folder),
        "--image",
        str(image),
        "--max-new-tokens",
        "2",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert planner.cli.main([*words, "--prompt", "a", "--out", str(out)]) == 0
    checkpoint = read_checkpoint(folder)
    return Small(json.loads(out.read_text()), checkpoint.tensors, image, folder)


def plan_target(place: Place) -> Target:
    """As text, and signed anew with other values in it: what reads it may trust no value, nor may the run's checks."""
    from executor.cpu import CpuDevice
    from executor.prepare import Request, check_request, make_runs, read_prompt
    from executor.prompt import load_tokenizer
    from planner.errors import PlanFileError
    from planner.plan import Plan, digest

    made = small(place)
    tokenizer = load_tokenizer(made.tokenizer)
    device = CpuDevice()

    def embeddings(ids: Any, out: Any) -> None:
        """No step is run, so nobody asks."""

    seed = json.dumps(made.plan).encode()
    base = {part: value for part, value in made.plan.items() if part != "digest"}
    parts = {part: json.dumps(value) for part, value in base.items()}
    request = Request(made.locations, (made.image,), "a", made.tokenizer)

    def make(chance: Random) -> bytes:
        if chance.random() < 0.3:
            return spoil_bytes(seed, chance)
        # each part as often as any other, however long
        part = chance.choice(list(parts))
        data = {**base, part: spoil_value(json.loads(parts[part]), chance)}
        if chance.random() < 0.05:
            del data[chance.choice(list(data))]
        data["digest"] = digest(data) if chance.random() < 0.97 else made.plan["digest"]
        return as_json(data, chance)

    def read(data: bytes) -> None:
        try:
            words = data.decode()
        except UnicodeDecodeError as error:
            raise PlanFileError(str(error)) from None
        plan = Plan.loads(words)
        check_request(plan, request)
        prompt = read_prompt(plan, request, tokenizer)
        make_runs(plan, prompt, device, embeddings)

    return Target(make, read)


def record_target(place: Place) -> Target:
    from executor.record import Record

    phase = dict.fromkeys(
        (
            "seconds",
            "waited_seconds",
            "peak_bytes",
            "end_bytes",
            "arena_bytes",
            "host_bytes",
            "file_bytes",
            "copied_bytes",
        ),
        1,
    )
    record = {
        **{
            "schema_version": 1,
            "fingerprint": "f",
            "device": "cpu",
            "device_name": "cpu",
            "threads": 1,
        },
        **{
            "torch_version": "2",
            "check": False,
            "budget_bytes": None,
            "arena_bytes": 1,
            "context_bytes": 1,
        },
        **{
            "prompt_tokens": 1,
            "new_tokens": 1,
            "seconds": 1.0,
            "peak_bytes": 1,
            "passed_budget": False,
        },
        **{
            "notes": ["a"],
            "phases": [{"phase": "load", **phase}],
            "copies": [{"id": "a", "count": 1, "size_bytes": 1, "seconds": 1.0}],
        },
        "steps": [
            {
                "id": "a",
                "phase": "vision",
                "count": 1,
                "seconds": 1,
                "first_seconds": 1,
                "waited_seconds": 0,
                "peak_bytes": None,
                "outside_bytes": None,
            }
        ],
    }
    seed = json.dumps(record).encode()

    def make(chance: Random) -> bytes:
        if chance.random() < 0.4:
            return spoil_bytes(seed, chance)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    return Target(make, lambda data: Record.load(place.file("record.json", data)))
