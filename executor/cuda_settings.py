"""Settings that change what a card's allocator and libraries hold: those in effect against those the plan counts with."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from planner.errors import PlanFileError
from planner.plan import DeviceTerms

# torch 2.9 renamed the first; where both are set it is the one that counts
CONF_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# c10/core/AllocatorConfig.h, CUDAAllocatorConfig.h: these leave the card's bytes as they are
HARMLESS = re.compile(
    r"pinned_|release_lock_on_(cuda|hip)?malloc|throw_on_cudamalloc_oom|graph_capture_"
)
DEFAULTS = {"expandable_segments": "false", "backend": "native"}
# of variables whose mere presence changes it: what the plan counts with instead
UNSET = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "the caching allocator",
    "CUBLAS_WORKSPACE_CONFIG": "cuBLAS's workspace as torch chooses it",
    "CUBLASLT_WORKSPACE_SIZE": "cuBLASLt's workspace as torch chooses it",
}


def check_settings(terms: DeviceTerms, environment: Mapping[str, str]) -> None:
    """Nothing, if the environment sets what the plan counts with and nothing else that counts; PlanFileError if not."""
    for variable, counted in UNSET.items():
        if variable in environment:
            raise PlanFileError(
                f"the plan counts with {counted}, found {variable}={environment[variable]}; unset it"
            )
    name = next((name for name in CONF_NAMES if environment.get(name, "").strip()), CONF_NAMES[0])
    found = environment.get(name, "")
    if _settings(found) != _settings(terms.alloc_conf):
        wanted = f"{name}={terms.alloc_conf}" if terms.alloc_conf else f"no {name}"
        other = "native" if terms.allocator == "expandable" else "expandable"
        raise PlanFileError(
            f"the plan counts with the {terms.allocator} allocator, so it wants {wanted}, found {found or 'nothing'}; "
            f"set it so, or plan with --allocator {other}"
        )


def _settings(text: str) -> dict[str, str]:
    """The settings that count of a string such as `expandable_segments:True,pinned_num_register_threads:8`."""
    found = {}
    # commas inside brackets belong to one setting's value
    for entry in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text).lower()):
        key, _, value = entry.partition(":")
        if key and not HARMLESS.match(key) and DEFAULTS.get(key) != value:
            found[key] = value
    return found


def check_effective(terms: DeviceTerms) -> None:
    """Nothing, if torch itself, which a program may have set otherwise than the environment, says the same."""
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        raise PlanFileError(
            f"the plan counts with torch's own allocator, found the backend {backend}; "
            f"take backend: out of {CONF_NAMES[0]}"
        )
    # torch/csrc/cuda/memory_snapshot.cpp, config_metadata; older versions tell less
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    expandable = settings.get("expandable_segments")
    if expandable is not None and expandable != (terms.allocator == "expandable"):
        raise PlanFileError(
            f"the plan counts with the {terms.allocator} allocator, found expandable_segments:{expandable}; "
            f"set it before torch starts: {CONF_NAMES[0]}={terms.alloc_conf or 'expandable_segments:False'}"
        )
    ask = getattr(torch.backends.cuda, "cublas_workspace_size", None)  # torch 2.13
    planned = [block.size_bytes for block in terms.kept if block.name == "cublas_workspace"]
    if ask is not None and planned and ask() > planned[0]:
        raise PlanFileError(
            f"the plan counts with a cuBLAS workspace of {planned[0]} bytes, torch takes {ask()} here; "
            "plan with --device for this card, or measure it: execute --probe --out FILE"
        )
