"""What every test needs: a quiet profiler, whichever test uses it first."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
