"""Where each tensor of a safetensors checkpoint lies, read from the files' headers; no tensor data is touched.

A safetensors file is 8 bytes (little-endian length n), n bytes of JSON, then the data:
`{"name": {"dtype": "BF16", "shape": [..], "data_offsets": [start, stop]}, "__metadata__": {..}}`, offsets counted from
the end of the header. The format's own rules are held to: data without holes or overlaps that ends where the file ends,
a header of at most 100 MB, no name twice. Source: https://github.com/huggingface/safetensors#format.
Nothing in a file is trusted; whatever is wrong with it is a CheckpointError.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from planner.errors import CheckpointError
from planner.plan.shapes import TensorLocation
from planner.plan.words import DType

MAX_HEADER_BYTES = 100_000_000  # safetensors: MAX_HEADER_SIZE
MAX_RANK = 16  # far above any model's; keeps products of hostile shapes small

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# the dtypes a plan can hold, then those that are only measured, so that a file with other tensors beside still reads
DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
STORED_DTYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4},
    **{"I64": 8, "U64": 8, "F64": 8, "C64": 8},
}

# tools put these in front of whatever the checkpoint called a tensor
_LEADING = re.compile(r"(?:base_model\.model\.|thinker\.)+")


_REPR = reprlib.Repr()
_REPR.maxstring = 120  # longer than any tensor's name
_REPR.maxlevel = 2


def show(value: object) -> str:
    """`repr`, shortened and never too deep: hostile files must not choose how long a message is."""
    return _REPR.repr(value)


class Entry(NamedTuple):
    """One tensor of a header: the dtype as the file calls it, absolute file offsets `[start, stop)`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class CheckpointTensors(NamedTuple):
    """Tensors by published name; `other_dtypes` holds the dtype of those that no plan can use."""

    tensors: dict[str, TensorLocation]
    other_dtypes: dict[str, str]


def published_name(stored: str) -> str:
    """The name this tensor has in the published checkpoints: `visual.*`, `model.*` or `lm_head.weight`.

    transformers 4.52 and later save `model.visual.*` and `model.language_model.*`; adapters put `base_model.model.`
    and omni models `thinker.` in front.
    """
    name = _LEADING.sub("", stored, count=1) if _LEADING.match(stored) else stored
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Where each tensor of one safetensors file lies, by stored name; tensors of unsupported dtypes are left out."""
    return {
        name: _location(path, entry)
        for name, entry in read_entries(path).items()
        if entry.dtype in DTYPES
    }


def read_checkpoint_tensors(directory: Path) -> CheckpointTensors:
    """Where each tensor of a checkpoint folder lies, by published name: one file, or the shards of an index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        stored = {name: (single, entry) for name, entry in read_entries(single).items()}
    elif index.exists():
        stored = _read_shards(directory, _read_index(index))
    else:
        raise CheckpointError(
            f"{directory}: wanted {SINGLE_FILE} or {INDEX_FILE}, found neither; "
            "give the folder that holds the checkpoint's safetensors files"
        )
    tensors: dict[str, TensorLocation] = {}
    others: dict[str, str] = {}
    for name, (path, entry) in stored.items():
        public = published_name(name)
        if public in tensors or public in others:
            raise CheckpointError(
                f"{path}: tensor {show(public)} is there twice, under two prefixes ({show(name)} is one); "
                "keep one of them"
            )
        if entry.dtype in DTYPES:
            tensors[public] = _location(path, entry)
        else:
            others[public] = entry.dtype
    return CheckpointTensors(tensors, others)


def read_entries(path: Path) -> dict[str, Entry]:
    """All tensors of one safetensors file by stored name, of whatever dtype, checked against the file's size."""
    text, data_start, file_bytes = _read_header_text(path)
    header = load_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "wanted __metadata__ to map text to text")
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_layout(path, entries, data_start, file_bytes)
    return entries


def load_json(text: bytes, path: Path) -> dict[str, object]:
    """The JSON object in `text`; a repeated key, another JSON value or no JSON at all is a CheckpointError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise _damaged(path, f"wanted JSON, found something else ({reason})") from None
    if not isinstance(value, dict):
        raise _damaged(path, f"wanted a JSON object, found {type(value).__name__}")
    return value


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {show(repeated)} is there twice")
    return mapping


def _read_header_text(path: Path) -> tuple[bytes, int, int]:
    """The header's JSON bytes, the offset of the data, the size of the file."""
    try:
        file = open(path, "rb", opener=_open_without_waiting)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: wanted a file, found something else under this name")
        file_bytes = status.st_size
        try:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > file_bytes - 8:
                raise _damaged(
                    path,
                    f"wanted a header of {length} bytes behind the first 8, found {file_bytes} bytes in all"
                    if file_bytes >= 8
                    else f"wanted at least 8 bytes, found {file_bytes}",
                )
            if length > MAX_HEADER_BYTES:
                raise _damaged(
                    path, f"wanted a header of at most {MAX_HEADER_BYTES} bytes, found {length}"
                )
            text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if len(text) != length:
        raise _damaged(path, f"wanted a header of {length} bytes, found {len(text)}")
    return text, 8 + length, file_bytes


def _open_without_waiting(path: str, flags: int) -> int:
    # a pipe under this name must not hang the planner; the flag is absent on Windows
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _entry(path: Path, name: str, value: object, data_start: int) -> Entry:
    """One header entry with absolute offsets, its size checked against its shape and dtype."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            path, f"tensor {show(name)}: wanted dtype, shape and data_offsets, found {show(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_DTYPE_BYTES:
        raise _damaged(
            path,
            f"tensor {show(name)}: wanted a dtype of safetensors such as BF16, found {show(dtype)}",
        )
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _damaged(path, f"tensor {show(name)}: wanted a shape of sizes, found {show(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {show(name)}: wanted two data_offsets, found {show(offsets)}")
    wanted = STORED_DTYPE_BYTES[dtype]
    for size in shape:
        wanted *= size
    start, stop = offsets
    if stop - start != wanted:
        raise _damaged(
            path,
            f"tensor {show(name)}: wanted {wanted} bytes for {dtype} {list(shape)}, found {stop - start}",
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: object) -> bool:
    # `type(..) is int`: True is an int to isinstance
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_layout(path: Path, entries: dict[str, Entry], data_start: int, file_bytes: int) -> None:
    """Refuse holes, overlaps, and data that ends before or after the file does."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlap the tensor before" if entry.start < end else "leave a hole before"
            raise _damaged(
                path,
                f"tensor {show(name)}: its data_offsets {what}: wanted {end}, found {entry.start}",
            )
        end = entry.stop
    if end > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: wanted {end} bytes as its header says, found {file_bytes}; fetch this file again"
        )
    if end < file_bytes:
        raise _damaged(path, f"wanted {end} bytes as its header says, found {file_bytes}")


def _read_index(path: Path) -> dict[str, str]:
    """Stored tensor name -> shard, checked to be a plain file name in the same folder."""
    weight_map = load_json(read_small(path), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "wanted a weight_map from tensor names to files, found none")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise _damaged(
                path,
                f"tensor {show(name)}: wanted the plain name of a file in the same folder, found {show(shard)}",
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def _read_shards(directory: Path, index: dict[str, str]) -> dict[str, tuple[Path, Entry]]:
    """File and entry of each tensor the index names."""
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not os.path.exists(directory / shard)]
    if missing:
        raise CheckpointError(
            f"{directory}: wanted {len(shards)} shards, {len(missing)} of them missing: {listed(missing)}; "
            "fetch the checkpoint again"
        )
    entries = {shard: read_entries(directory / shard) for shard in shards}
    lost = [name for name, shard in index.items() if name not in entries[shard]]
    if lost:
        shard = directory / index[lost[0]]
        raise CheckpointError(
            f"{shard}: wanted tensor {show(lost[0])} as {INDEX_FILE} says, the shard does not have it "
            f"({len(lost)} such in all); fetch the checkpoint again"
        )
    return {name: (directory / shard, entries[shard][name]) for name, shard in index.items()}


def read_small(path: Path) -> bytes:
    """The bytes of a JSON file beside the weights, at most MAX_HEADER_BYTES of them."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: wanted a file, found none")
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise _damaged(path, f"wanted at most {MAX_HEADER_BYTES} bytes of JSON, found more")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def listed(names: Iterable[str], *, at_most: int = 3) -> str:
    """The first few names and how many more there are: `'a', 'b' and 7 more`."""
    all_names = list(names)
    shown = ", ".join(show(name) for name in all_names[:at_most])
    rest = len(all_names) - at_most
    return f"{shown} and {rest} more" if rest > 0 else shown


def _location(path: Path, entry: Entry) -> TensorLocation:
    return TensorLocation(
        path, entry.start, entry.stop - entry.start, entry.shape, DTYPES[entry.dtype]
    )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}; the file is damaged or of another format: fetch it again"
    )
