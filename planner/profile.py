"""What the planner knows of a device: memory, rates, overheads, each with its source; one JSON file per device.

Rates are sustained ones, tabulated by the rows of a product (or the query rows of an attention call) and read by
`rate`, linear in log2(rows) between the points. Bandwidth bounds few-row products, so the table need only be right
where arithmetic is the bound.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from planner.errors import InputError
from planner.plan.words import DTYPE_BYTES, Frozen
from planner.rates import PASSES as PASSES
from planner.rates import Curve as Curve
from planner.rates import Grid as Grid
from planner.rates import HeadDim as HeadDim
from planner.rates import Kernels as Kernels
from planner.rates import Measured as Measured

Points = tuple[tuple[PositiveInt, PositiveInt], ...]  # (rows, FLOP/s), rows ascending


class Rates(Frozen):
    """FLOP/s by rows, for the 16-bit dtypes and for float32."""

    bits16: Points = Field(min_length=1)
    float32: Points = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Rates:
        for points in (self.bits16, self.float32):
            rows = [point[0] for point in points]
            if rows != sorted(set(rows)):
                raise ValueError(f"wanted ascending rows, found {rows}")
        return self

    def at(self, dtype: str, rows: int) -> float:
        """FLOP/s of a call over `rows` rows in that dtype."""
        return rate(self.bits16 if DTYPE_BYTES[dtype] == 2 else self.float32, rows)


class DeviceProfile(Frozen):
    """One device. Every figure has an entry in `sources`; what a CPU does not have is 0 or empty."""

    id: str = Field(pattern=r"[a-z0-9]+(-[a-z0-9]+)*")
    name: str
    kind: Literal["cpu", "cuda"]
    compute_capability: str | None  # "8.9"; None on a CPU
    bf16: bool  # has 16-bit brain floats in hardware
    note: str

    memory_total_bytes: PositiveInt  # as nvidia-smi shows it
    usable_bytes: (
        PositiveInt  # as the driver offers it to a process; a desktop's share is not taken off
    )
    max_tensor_bytes: PositiveInt
    sm_count: PositiveInt | None
    threads: PositiveInt | None  # that the CPU's kernels run on; None on a card
    amx: bool  # a CPU whose 16-bit kernels use tile units: attention repacks keys and values

    bandwidth_bytes_per_s: PositiveInt  # device memory, sustained
    matmul_flops_per_s: Rates
    attention_flops_per_s: Rates
    launch_s: PositiveFloat  # one kernel's call from Python
    measured: Measured | None = None  # tables of `execute --probe`; they replace the four above
    start_s: PositiveFloat  # from process start until the first weight is read

    host_to_device_bytes_per_s: PositiveInt  # pinned; on a CPU: page cache into the arena
    disk_bytes_per_s: PositiveInt  # cold
    page_cache_bytes_per_s: PositiveInt
    pin_bytes_per_s: int = Field(ge=0)  # taking pinned memory; 0 where the host is the device
    default_ram_bytes: int = Field(
        ge=0
    )  # --ram where it is not given; 0 where the host is the device

    context_bytes: PositiveInt
    context_error_bytes: int = Field(ge=0)
    context_block_bytes: int = Field(ge=0)  # more for each block: its steps, headers, buffers
    tokenizer_bytes_per_file_byte: float = Field(ge=0)  # 0 where the host is not the device
    tokenizer_bytes_per_token: int = Field(ge=0)  # of the vocabulary, beside the file's bytes
    workspace_bytes: int = Field(ge=0)  # cuBLAS, once per stream
    lt_workspace_bytes: int = Field(ge=0)  # cuBLASLt, once per stream
    allocator: Literal["native", "expandable"]

    sources: dict[str, str]

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> DeviceProfile:
        unknown = sorted(set(self.sources) - set(type(self).model_fields))
        missing = sorted(name for name in FIGURES if not self.sources.get(name))
        if unknown or missing:
            raise ValueError(
                f"sources: wanted one for each figure, missing {missing}, unknown {unknown}"
            )
        if self.usable_bytes > self.memory_total_bytes:
            raise ValueError(
                f"usable_bytes: wanted at most {self.memory_total_bytes}, found {self.usable_bytes}"
            )
        return self

    def matmul_rate(self, dtype: str, rows: int) -> float:
        """FLOP/s of a product over `rows` rows."""
        return self.matmul_flops_per_s.at(dtype, rows)

    def attention_rate(self, dtype: str, rows: int) -> float:
        """FLOP/s of an attention call over `rows` query rows."""
        return self.attention_flops_per_s.at(dtype, rows)


# not figures: what names the device, and what another figure's source covers
_COVERED = {
    *("threads", "amx"),
    *("id", "name", "kind", "compute_capability", "bf16", "note", "allocator", "sources"),
    "measured",
    *("context_error_bytes", "context_block_bytes", "tokenizer_bytes_per_token"),
}
FIGURES = tuple(name for name in DeviceProfile.model_fields if name not in _COVERED)


def rate(points: Sequence[tuple[int, int]], rows: int) -> float:
    """The rate at `rows`, linear in log2(rows) between the points and constant beyond the first and the last."""
    first, last = points[0], points[-1]
    if rows <= first[0]:
        return float(first[1])
    if rows >= last[0]:
        return float(last[1])
    right = next(i for i, point in enumerate(points) if point[0] >= rows)
    (low_rows, low), (high_rows, high) = points[right - 1], points[right]
    share = math.log2(rows / low_rows) / math.log2(high_rows / low_rows)
    return low + share * (high - low)


def list_profiles() -> tuple[str, ...]:
    """The ids of all profiles that come with the package, sorted."""
    files = (resources.files("profiles") / "devices").iterdir()
    return tuple(
        sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))
    )


def load_profile(name: str) -> DeviceProfile:
    """The profile of that id or name (`rtx-5080-16gb`, `RTX 5080 16GB`, `NVIDIA GeForce RTX 5080`), or of a .json file.

    A name without its memory size is enough where one profile has it.
    """
    if name.lower().endswith(".json"):
        return _read_file(Path(name))
    ids = list_profiles()
    wanted = _slug(name)
    # the memory size is the last part of an id
    matches = (
        [wanted]
        if wanted in ids
        else [known for known in ids if wanted and known.rpartition("-")[0] == wanted]
    )
    if len(matches) == 1:
        return _load(matches[0])
    close = matches or _closest(wanted, ids)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(ids)}"
    raise InputError(f"device: wanted the name of a profile, found {name!r}; {hint}")


def _closest(wanted: str, ids: Sequence[str]) -> list[str]:
    """At most four ids like that one: first those that share its number (`a100`), then its other words, then its letters."""
    words = set(wanted.split("-"))

    def shared(known: str) -> tuple[int, int]:
        both = words.intersection(known.split("-"))
        numbers = [word for word in both if re.search("[0-9]", word) and not word.endswith("gb")]
        return len(numbers), len(both)

    alike = difflib.get_close_matches(wanted, ids, n=len(ids), cutoff=0.4)
    alike += [known for known in ids if known not in alike and shared(known)[0]]
    return sorted(alike, key=shared, reverse=True)[:4]


_MAKERS_WORDS = ("nvidia", "geforce", "tesla", "generation", "gpu")


def _slug(name: str) -> str:
    """The id a name would have: lower case, hyphens, without the maker's words."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in _MAKERS_WORDS)


@lru_cache(maxsize=64)
def _load(profile_id: str) -> DeviceProfile:
    file = resources.files("profiles") / "devices" / f"{profile_id}.json"
    return _parse(file.read_text(encoding="utf-8"), f"profiles/devices/{profile_id}.json")


def _read_file(path: Path) -> DeviceProfile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"device: {path}: cannot be read as a profile: {error}") from None
    return _parse(text, str(path))


def _parse(text: str, where: str) -> DeviceProfile:
    try:
        return DeviceProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"device: {where}: {field}: {first['msg']} ({error.error_count()} in all); "
            "write a profile anew with: execute --probe --out FILE"
        ) from None


def dumps(profile: DeviceProfile) -> str:
    """The profile as the text of its JSON file, the same bytes for the same profile; a point of a table per line."""
    text = json.dumps(profile.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
