"""Every error a user can meet, in one tree.

StowplanError                 exit code 1
├── RunFailed                 1   the run failed: memory, disk, a kernel refused
│   ├── OutOfMemory           1   the system or the device gave no memory
│   ├── KernelRefused         1   the kernel that the plan names does not take the plan's shapes here
│   └── NotFinite             1   a weight or a computed value is not a number
├── InputError                2   usage or bad input: option, image, prompt, checkpoint, plan file
│   ├── UnitsError            2   a size that cannot be read
│   ├── ImageError            2   an image that cannot be read or must not be
│   ├── CheckpointError       2   a checkpoint that is missing, damaged or of another architecture
│   └── PlanFileError         2   a plan of another schema, for another checkpoint or another workload
└── DoesNotFit                3   a plan does not fit the budget, or not any more
    ├── BudgetTooSmall        3   no plan fits; carries the certificate
    └── LessIsFree            3   something else holds what the plan needs; carries what is left

A message says what was wanted, what was found and what to do. `exit_code` is what the command line ends with.
"""

from __future__ import annotations


class StowplanError(Exception):
    """Base of all; its text is one line for the user, further lines are indented details."""

    exit_code = 1


class RunFailed(StowplanError):
    """The run began and could not go on."""


class OutOfMemory(RunFailed):
    """Memory was refused by the system or the device."""


class KernelRefused(RunFailed):
    """The device would not run the kernel that the plan names for the plan's shapes."""


class NotFinite(RunFailed):
    """A value is not a number or infinite, so that no token can be chosen."""


class InputError(StowplanError):
    """What the user gave cannot be used."""

    exit_code = 2


class UnitsError(InputError):
    """A size that is not a number with one of the accepted units."""


class ImageError(InputError):
    """An image file that cannot be read, or that no plan should be made for."""


class CheckpointError(InputError):
    """A checkpoint that is missing something, is damaged, or is not a Qwen2.5-VL."""


class PlanFileError(InputError):
    """A plan file that this version, checkpoint or workload cannot use."""


class DoesNotFit(StowplanError):
    """The plan needs more than the budget, or more than is free now."""

    exit_code = 3


class BudgetTooSmall(DoesNotFit):
    """No plan fits. `smallest_bytes` is the smallest budget that would, where one is known."""

    def __init__(self, message: str, *, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class LessIsFree(DoesNotFit):
    """Something else on the device holds what the plan needs. `budget_bytes` is what this process may hold in all now."""

    def __init__(self, message: str, *, budget_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
