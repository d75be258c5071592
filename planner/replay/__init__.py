"""torch's memory snapshots, read and written; imports nothing by itself.

`plan replay` is `cli`: `snapshot_file` and `snapshot` read one, `rollback` finds the state it began in, `recording` runs
it forward (`guided_run`, `free_run`: each a `trace_run`) and an `outcome` says what was found. `plan_snapshot` writes a
plan as one, by way of `heap_snapshot`.
"""
