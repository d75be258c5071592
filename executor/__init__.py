"""Runs the model exactly by a plan: torch on the CPU or on a card."""

import os

# read by torch's thread pool (libgomp) when it is loaded, so before torch. A thread that waits for the others burns its
# core for some 0.2 ms, not for 15: the core is wanted by the thread that reads weights, and by other programs
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
