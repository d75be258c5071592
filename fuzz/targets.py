"""What is fuzzed: readers of files and words that others wrote. Each either succeeds or raises an error of planner.errors."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzz.mutate import as_json, spoil_bytes, spoil_png, spoil_value

ROOT = Path(__file__).parents[1]


class Target(NamedTuple):
    """`make(chance)` is one input, `read(input)` what must be done with it in words."""

    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]


class Place:
    """A folder in memory where inputs become files."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="fuzz-", dir=shared if shared.is_dir() else None
        )
        self.path = Path(self._folder.name)

    def file(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.write_bytes(data)
        return path

    def close(self) -> None:
        self._folder.cleanup()


# --- weights and their JSON files ---------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
    "visual.blocks.0.attn.qkv.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [16, 48]},
    "lm_head.weight": {"dtype": "F16", "shape": [4, 2, 1], "data_offsets": [48, 64]},
    "other": {"dtype": "I64", "shape": [], "data_offsets": [64, 72]},
}


def header_target(place: Place) -> Target:
    from planner.checkpoint.headers import read_entries, read_header

    seed = safetensors(HEADER, bytes(72))

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(seed, chance)
        header = spoil_value(json.loads(json.dumps(HEADER)), chance)
        text = as_json(header, chance)
        length = len(text) if chance.random() < 0.95 else chance.choice((0, 2**63, len(text) + 1))
        return struct.pack("<Q", length) + text + bytes(chance.choice((72, 72, 72, 71, 73, 0)))

    def read(data: bytes) -> None:
        path = place.file("model.safetensors", data)
        read_header(path)
        for entry in read_entries(path).values():
            assert 8 <= entry.start <= entry.stop <= len(data)

    return Target(make, read)


def index_target(place: Place) -> Target:
    from planner.checkpoint.headers import read_checkpoint_tensors

    index = {"metadata": {"total_size": 72}, "weight_map": dict.fromkeys(HEADER, "a.safetensors")}
    index["weight_map"].pop("__metadata__")
    place.file("a.safetensors", safetensors(HEADER, bytes(72)))
    seed = json.dumps(index).encode()

    def make(chance: Random) -> bytes:
        if chance.random() < 0.4:
            return spoil_bytes(seed, chance)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    def read(data: bytes) -> None:
        place.file("model.safetensors.index.json", data)
        read_checkpoint_tensors(place.path)

    return Target(make, read)


def config_target(place: Place) -> Target:
    from planner.checkpoint.config import (
        normalise_config,
        normalise_generation,
        normalise_pixel_bounds,
    )
    from planner.checkpoint.headers import load_json

    flat = json.loads((ROOT / "tests/data/tiny_config.json").read_text())
    text_keys = [
        k for k in flat if k.startswith(("hidden", "num_", "rope", "rms", "vocab", "inter"))
    ]
    nested = {k: v for k, v in flat.items() if k not in text_keys}
    nested["text_config"] = {k: flat[k] for k in text_keys}
    others = [
        {"repetition_penalty": 1.05, "eos_token_id": [1, 2], "pad_token_id": 3, "temperature": 0.1},
        {
            **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
            **{"temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
            **{"image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 3136}},
        },
    ]
    seeds = [json.dumps(data).encode() for data in (flat, nested, *others)]
    name = place.path / "config.json"
    vision = normalise_config(flat, name).vision

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if chance.random() < 0.4:
            return spoil_bytes(seed, chance, seeds)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    def read(data: bytes) -> None:
        from planner.errors import StowplanError

        value = load_json(data, name)
        failed = None
        for one in (
            lambda: normalise_config(value, name),
            lambda: normalise_generation(value, name),
            lambda: normalise_pixel_bounds(value, vision, name),
        ):
            try:
                one()
            except StowplanError as error:
                failed = error
        if failed is not None:
            raise failed

    return Target(make, read)


def profile_target(place: Place) -> Target:
    from planner.profile import load_profile

    seeds = [
        json.dumps(json.loads((ROOT / "profiles/devices" / name).read_text())).encode()
        for name in ("cpu.json", "rtx-5080-16gb.json")
    ]

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if chance.random() < 0.3:
            return spoil_bytes(seed, chance, seeds)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    return Target(make, lambda data: load_profile(str(place.file("mine.json", data))))


# --- plans and records --------------------------------------------------------------------------------------------


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
    _picture("PNG", image, (56, 84))
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


# --- pictures, words ----------------------------------------------------------------------------------------------


def _picture(kind: str, to: Any, size: tuple[int, int], mode: str = "RGB") -> None:
    from PIL import Image as Pillow

    width, height = size
    values = bytes(range(256)) * (width * height * 4 // 256 + 1)
    made = Pillow.frombytes("RGB", size, values[: width * height * 3]).convert(mode)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    made.save(to, kind, exif=exif.tobytes()) if kind in ("JPEG", "PNG", "WEBP") else made.save(
        to, kind
    )


def image_target(place: Place) -> Target:
    """Its size as the planner reads it, then decoded and resized as the executor does."""
    from executor.image import open_image
    from planner.workload import image_size, plan_image

    seeds: list[bytes] = []
    modes = {"PNG": ("RGB", "RGBA", "P", "L", "1"), "JPEG": ("RGB", "CMYK"), "GIF": ("P",)}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "ICO"):
        for mode in modes.get(kind, ("RGB",)):
            file = io.BytesIO()
            _picture(kind, file, (33, 30), mode)
            seeds.append(file.getvalue())
    wanted = plan_image("a", 33, 30, min_pixels=784, max_pixels=3136)
    turned = plan_image("a", 30, 33, min_pixels=784, max_pixels=3136)

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if seed[1:4] == b"PNG" and chance.random() < 0.6:
            return spoil_png(seed, chance)
        return spoil_bytes(seed, chance, seeds)

    def read(data: bytes) -> None:
        path = place.file("a.png", data)
        width, height = image_size(path)
        plan_image("a", width, height, min_pixels=784, max_pixels=3136)
        open_image(path, turned if (width, height) == (30, 33) else wanted)

    return Target(make, read)


def units_target(place: Place) -> Target:
    """Sizes of memory and of images as people type them."""
    from planner.units import MOST_BYTES, format_gb_up, format_gib, parse_bytes
    from planner.workload import parse_image

    seeds = [
        b"16GB",
        b"6.5GiB",
        b"1024 MiB",
        b"0.000001TB",
        b"1B",
        b"3840x2160",
        b"1x1",
        b"999999999x1",
    ]
    alphabet = "0123456789..xX kKMGTiB-+e_\u0661\u00b2\u2003\n\0"

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(chance.choice(seeds), chance, seeds)
        return "".join(chance.choices(alphabet, k=chance.randrange(12))).encode()

    def read(data: bytes) -> None:
        from planner.errors import StowplanError

        text = data.decode(errors="surrogateescape")
        try:
            size = parse_bytes(text)
            assert 0 < size <= MOST_BYTES
            assert parse_bytes(format_gb_up(size)) >= size
            format_gib(size)
        except StowplanError:
            image = parse_image(text, min_pixels=3136, max_pixels=12845056)
            assert image.patches * 196 == image.width_px * image.height_px <= 12845056

    return Target(make, read)


def tokenizer_target(place: Place) -> Target:
    from executor.make_checkpoint import make_random_checkpoint
    from executor.prompt import build_prompt, load_tokenizer
    from planner.plan.shapes import TokenIds
    from planner.workload import prompt_tokens

    make_random_checkpoint("tiny", place.path / "tiny")
    data = json.loads((place.path / "tiny/tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {  # a shorter one: bytes, and what is added comes by itself
        word: number for word, number in vocabulary.items() if len(word) == 1
    }
    data["model"]["merges"] = []
    seed = json.dumps(data).encode()
    ids = TokenIds(image=1, video=2, vision_start=3, vision_end=4, stop=(5,))

    def make(chance: Random) -> bytes:
        if chance.random() < 0.3:
            return spoil_bytes(seed, chance)
        data = json.loads(seed)
        if chance.random() < 0.5:
            part = chance.choice(list(data))
            data[part] = spoil_value(data[part], chance)
            return as_json(data, chance)
        return as_json(spoil_value(data, chance), chance)

    def read(data: bytes) -> None:
        path = place.file("tokenizer.json", data)
        prompt_tokens("What is this?", None, path, [])
        build_prompt(load_tokenizer(path), "What is this?", [], ids)

    return Target(make, read)


# --- memory snapshots and tables of buffers -----------------------------------------------------------------------


def snapshot_target(place: Place) -> Target:
    from planner.replay.snapshot import parse_snapshot
    from planner.replay.snapshot_file import loads

    block = {
        "size": 512,
        "requested_size": 100,
        "address": 4096,
        "state": "active_allocated",
        "frames": [],
    }
    free = {"size": 1536, "requested_size": 0, "address": 4608, "state": "inactive", "frames": []}
    segment = {
        **{"device": 0, "address": 4096, "total_size": 2048, "stream": 0, "segment_type": "small"},
        **{
            "allocated_size": 512,
            "active_size": 512,
            "segment_pool_id": [0, 0],
            "is_expandable": False,
        },
        "blocks": [block, free],
    }
    event = {
        "action": "alloc",
        "addr": 4096,
        "size": 512,
        "stream": 0,
        "time_us": 1,
        "frames": [],
        "device": 0,
    }
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False}
    events = [
        {**event, "action": name}
        for name in ("segment_alloc", "alloc", "free_requested", "free_completed")
    ]
    data = {"segments": [segment], "device_traces": [events], "allocator_settings": settings}
    text = json.dumps(data)
    pickles = [pickle.dumps(data, protocol=number) for number in range(6)]
    seeds = [
        text.encode(),
        *pickles,
        gzip.compress(text.encode(), mtime=0),
        gzip.compress(pickles[4], mtime=0),
    ]

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(chance.choice(seeds), chance, seeds)
        value = spoil_value(json.loads(text), chance)
        made = as_json(value, chance)
        if chance.random() < 0.6:
            made = pickle.dumps(value, protocol=chance.randrange(6))
        return gzip.compress(made, mtime=0, compresslevel=1) if chance.random() < 0.1 else made

    def read(data: bytes) -> None:
        value, size_bytes = loads(data)
        parse_snapshot(value, most_entries=size_bytes)

    return Target(make, read)


def pack_target(place: Place) -> Target:
    from planner.layout.cli import read as read_table

    rows = "".join(f"{i},{i},{i + 3},{512 * (i + 1)},x\n" for i in range(8))
    seeds = [
        f"id,lower,upper,size,note\n{rows}".encode(),
        b'\xef\xbb\xbf"id","lower","upper","size"\r\n"a ""b""",0,1,1\r\n',
    ]

    def make(chance: Random) -> bytes:
        return spoil_bytes(chance.choice(seeds), chance, seeds)

    def read(data: bytes) -> None:
        for span in read_table(place.file("a.csv", data))[2]:
            assert 0 <= span.lower < span.upper
            assert span.size > 0

    return Target(make, read)


TARGETS: dict[str, Callable[[Place], Target]] = {
    "safetensors": header_target,
    "index": index_target,
    "config": config_target,
    "profile": profile_target,
    "plan": plan_target,
    "record": record_target,
    "image": image_target,
    "units": units_target,
    "tokenizer": tokenizer_target,
    "snapshot": snapshot_target,
    "pack": pack_target,
}
