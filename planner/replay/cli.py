"""`plan replay`: a torch memory snapshot, and what the allocator's rules say beside each of its events."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.arguments import Parser
from planner.files import reaching_stdout
from planner.lines import print_report, wrapped
from planner.units import format_gib, format_mib

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.replay.recording import Outcome, Replay
    from planner.replay.snapshot import DeviceRecord, Snapshot

EPILOG = """\
FILE is what torch.cuda.memory._dump_snapshot wrote after torch.cuda.memory._record_memory_history, or its JSON;
either may be gzipped. The trace is replayed event by event through the caching allocator's rules; what they say is
compared with what was recorded, and the recording is followed where they differ.

exit codes: 0 replayed or summarised, 2 usage or not a snapshot
"""


def main(arguments: list[str]) -> int:
    """The exit code of one `plan replay`; raises the errors that `plan` prints."""
    from planner.replay.recording import replay
    from planner.replay.snapshot import read_snapshot

    parser = Parser(
        prog="plan replay",
        description="Replay a torch memory snapshot through the allocator's rules.",
        epilog=EPILOG,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the snapshot")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    snapshot = read_snapshot(options.file)
    result = replay(snapshot)
    with reaching_stdout():
        _print(result, snapshot, as_json=options.json)
    return 0


def _print(result: Replay, snapshot: Snapshot, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(as_dict(result, snapshot)) + "\n")
        return
    from rich.console import Group

    print_report(Group(*render(result, snapshot)))


# --- JSON ---------------------------------------------------------------------------------------------------------

_SUMS = (
    "allocs",
    "frees",
    "segment_allocs_recorded",
    "segment_allocs_predicted",
    "segment_allocs_extra",
)
_PEAKS = ("peak_reserved_recorded_bytes", "peak_reserved_predicted_bytes")
_FINAL = ("final_blocks_recorded", "final_blocks_equal")
_MORE = (
    "addresses_equal",
    "frees_requested",
    "frees_completed",
    "frees_deferred",
    "segment_maps_recorded",
    "segment_maps_predicted",
    "segment_maps_extra",
    "segment_frees_recorded",
    "segment_frees_predicted",
    "releases",
    "retries",
    "ooms_recorded",
    "ooms_predicted",
    "snapshots_recorded",
    "snapshots_equal",
    "start_reserved_bytes",
    "start_blocks",
    "guessed_sizes",
    "contradictions",
    "peak_allocated_predicted_bytes",
)


def as_dict(result: Replay, snapshot: Snapshot) -> dict[str, Any]:
    """One object: sums over the devices with a trace, then each device. None: nothing was replayed."""
    traced = bool(result.devices)
    found: dict[str, Any] = {name: result.total(name) for name in _SUMS}
    found.update({name: result.total(name) if traced else None for name in _PEAKS})
    blocks = sum(len(s.blocks) for device in snapshot.devices for s in device.segments)
    found["final_blocks_recorded"] = result.total("final_blocks_recorded") if traced else blocks
    found["final_blocks_equal"] = result.total("final_blocks_equal") if traced else None
    found.update({name: result.total(name) for name in _MORE})
    found["final_reserved_bytes"] = sum(
        s.size_bytes for device in snapshot.devices for s in device.segments
    )
    found["devices"] = [_device(device) for device in result.devices]
    found["notes"] = list(result.notes)
    return found


def _device(device: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device.device, "events": device.events}
    found.update({name: getattr(device, name) for name in (*_SUMS, *_PEAKS, *_FINAL, *_MORE)})
    if device.free_running is not None:
        names = device.free_running.__slots__
        found["free_running"] = {name: getattr(device.free_running, name) for name in names}
    found["statistics"] = device.statistics
    return found


# --- text ---------------------------------------------------------------------------------------------------------


def render(result: Replay, snapshot: Snapshot) -> list[RenderableType]:
    """The report: one table by device, then what cannot be known."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for device in result.devices:
        parts += [Text(_verdict(device), style="bold"), _table(device)]
        parts += [Text(wrapped(_state(device))), Text("")]
    traced = {device.device for device in result.devices}
    parts += [Text(wrapped(_summary(d))) for d in snapshot.devices if d.device not in traced]
    if not snapshot.devices:
        parts.append(Text("nothing was allocated and nothing recorded"))
    parts += [Text(wrapped(f"note: {note}", "", "  ")) for note in result.notes]
    return parts


def _verdict(device: Outcome) -> str:
    free = device.free_running
    exact = (
        device.addresses_equal == device.allocs
        and device.segment_allocs_predicted == device.segment_allocs_recorded
        and device.segment_maps_predicted == device.segment_maps_recorded
        and not (device.segment_allocs_extra or device.segment_maps_extra)
        and device.final_blocks_equal == device.final_blocks_recorded
    )
    if not exact:
        return f"device {device.device}: the rules differ from the recording"
    if free is not None and free.peak_reserved_bytes == device.peak_reserved_recorded_bytes:
        return f"device {device.device}: every address and every peak as recorded"
    return f"device {device.device}: every address as recorded"


def _table(device: Outcome) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("recorded", "predicted", "extra"):
        table.add_column(column, justify="right")
    free = device.free_running
    rows: list[Sequence[str | int]] = [
        ("allocations, at that address", device.allocs, device.addresses_equal, ""),
        (
            "segments asked of the driver",
            device.segment_allocs_recorded,
            device.segment_allocs_predicted,
            device.segment_allocs_extra,
        ),
    ]
    if device.segment_maps_recorded or device.segment_maps_extra:
        rows.append(
            (
                "pages mapped",
                device.segment_maps_recorded,
                device.segment_maps_predicted,
                device.segment_maps_extra,
            )
        )
    if device.segment_frees_recorded:
        rows.append(
            ("given back", device.segment_frees_recorded, device.segment_frees_predicted, "")
        )
    if device.ooms_recorded:
        rows.append(("refused: out of memory", device.ooms_recorded, device.ooms_predicted, ""))
    rows.append(
        (
            "peak reserved",
            format_gib(device.peak_reserved_recorded_bytes),
            format_gib(device.peak_reserved_predicted_bytes),
            "",
        )
    )
    if free is not None:
        rows += [
            (
                "  with made-up addresses",
                "",
                format_gib(free.peak_reserved_bytes),
                "",
            ),
            (
                "  segments and pages then",
                "",
                free.segment_allocs_predicted + free.segment_maps_predicted,
                free.segment_allocs_extra + free.segment_maps_extra,
            ),
        ]
    rows.append(("blocks at the end", device.final_blocks_recorded, device.final_blocks_equal, ""))
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in row))
    return table


def _state(device: Outcome) -> str:
    return (
        f"{device.events:,} events after a start with {device.start_blocks:,} blocks in "
        f"{format_gib(device.start_reserved_bytes)} reserved; "
        f"allocated at most {format_gib(device.peak_allocated_predicted_bytes)} since"
    )


def _summary(record: DeviceRecord) -> str:
    blocks = [block for segment in record.segments for block in segment.blocks]
    reserved = sum(segment.size_bytes for segment in record.segments)
    live = sum(block.size_bytes for block in blocks if block.state == "allocated")
    largest = max((block.size_bytes for block in blocks if block.state == "free"), default=0)
    return (
        f"device {record.device}: segments: {len(record.segments):,}, blocks: {len(blocks):,}, "
        f"reserved {format_gib(reserved)}, allocated {format_gib(live)}, largest free block {format_mib(largest)}"
    )
