"""A recorded trace run through the allocator's rules: what they say beside what happened.

Each event of the trace is applied to the state in which the recording was. For an allocation the rules name a block,
or say that the driver is asked and for how much; that is compared with what was recorded, then what was recorded is
taken as the truth, so that one difference does not lead to others. What no recording shows is taken from it: when
work on other streams ended (`free_completed`), when memory was given back (`segment_free`) and which pool was meant.

A second run takes no truth: addresses of new segments are made up and every block lies where the rules put it
(`free_running`), which is what a prediction has.
"""

from __future__ import annotations

from planner.allocator.heap import DEFAULT_POOL
from planner.replay.free_run import FreeRunning
from planner.replay.guided_run import GuidedRun
from planner.replay.outcome import Outcome, Replay
from planner.replay.placed_run import PlacedRun
from planner.replay.rollback import roll_back
from planner.replay.snapshot import DeviceRecord, Snapshot

__all__ = ["Outcome", "Replay", "replay"]


def replay(snapshot: Snapshot) -> Replay:
    """Each device's trace beside what the rules predict."""
    devices = []
    notes = list(snapshot.notes)
    for record in snapshot.devices:
        if not record.events:
            notes.append(f"device {record.device}: no trace, only its final state is known")
            continue
        settings = snapshot.settings
        start = roll_back(record, settings)
        if snapshot.placed:
            outcome = PlacedRun(record, settings, start).run()
        else:
            outcome = GuidedRun(record, settings, start).run()
            outcome.free_running = FreeRunning(record, settings, start).run()
        devices.append(outcome)
        notes += _notes(outcome, record, snapshot)
    return Replay(tuple(devices), tuple(notes))


def _notes(outcome: Outcome, record: DeviceRecord, snapshot: Snapshot) -> list[str]:
    """What cannot be known, and what did not fit."""
    name = f"device {outcome.device}"
    notes = []
    if snapshot.placed:
        notes.append(
            f"{name}: a plan for the CPU, where no allocator chooses: a place is as predicted if nothing else lies "
            "there; reserved is the whole arena, of which the plan's own figures count the pages touched so far"
        )
    elif not snapshot.settings_recorded:
        notes.append(f"{name}: the allocator's settings were not recorded, torch's own are assumed")
    if outcome.guessed_sizes:
        notes.append(
            f"{name}: {_count(outcome.guessed_sizes, 'block')} from before the trace freed in it; "
            "the slack of each (up to 1 MiB) is not recorded and was taken as none"
        )
    if outcome.frees_deferred:
        notes.append(
            f"{name}: {_count(outcome.frees_deferred, 'free')} waiting for other streams; when those ended is as recorded, "
            "a prediction cannot know"
        )
    if outcome.retries:
        notes.append(
            f"{name}: {_count(outcome.retries, 'time')} memory was given back and more was asked for at once: "
            "a retry under pressure or an empty_cache, which the events alone do not tell apart"
        )
    if outcome.contradictions:
        notes.append(
            f"{name}: {_count(outcome.contradictions, 'event')} not fitting what the rules made of those before, put "
            "right; settings that changed during the trace are not recorded"
        )
    if not record.pools_told and record.segments:
        notes.append(
            f"{name}: this torch did not record which pool a segment is of; "
            + (
                f"some came although the default pool had a block that fits, and were taken for those of "
                f"{_count(outcome.pools_inferred, 'private pool')}; which older ones are private cannot be known"
                if outcome.pools_inferred
                else "none came that the default pool had no need of, so that all were taken for its own"
            )
        )
    if all(event.pool_id is None for event in record.events) and any(
        segment.pool_id != DEFAULT_POOL for segment in record.segments
    ):
        notes.append(
            f"{name}: there are private pools, and this torch did not record which pool an event belongs to: "
            "it was taken from the segment that the address lies in"
        )
    if outcome.elsewhere_in_private:
        notes.append(
            f"{name}: {_count(outcome.elsewhere_in_private, 'allocation')} in private pools lying elsewhere than the "
            "rules put them; a pool that was told never to split blocks is one reason, and not recorded"
        )
    return notes


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
