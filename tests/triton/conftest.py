"""The Triton lanes: ``interpreter/`` runs in processes of its own, see test_interpreter.py; the rest only compiles."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "kernels"), str(Path(__file__).parent)]  # oracle, cases; aot, record

# Triton decides when a kernel is defined, so one process has either interpreted kernels or compiled ones.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_aot.py", "test_interpreter.py", "test_triton_backend.py"] if INTERPRETED else ["interpreter"]
