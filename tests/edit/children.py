"""The command in processes of its own, which can be killed.

They are forked from a server that has imported everything and computed nothing, and so start in a moment; after a
parallel region in the parent, the OpenMP of a child would hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401, as all of these: imported once in the server, for all children
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.models.llama.tokenization_llama  # noqa: F401

import sphere_edit.cli.app
import sphere_edit.data
import sphere_edit.editing.batch
import sphere_edit.experiments.run
import sphere_edit.model.loading


def _command(arguments: list[str], log: str, drawing: bool) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    if drawing:
        optimise = sphere_edit.editing.batch.optimise_values

        def drawn(*args):
            """As if the optimisation drew something: the random state matters then."""
            values = optimise(*args)
            values.target.add_(1e-2 * torch.randn_like(values.target))
            return values

        sphere_edit.editing.batch.optimise_values = drawn
    sys.argv = ["sphere-edit", *arguments]
    sphere_edit.cli.app.app(arguments)


def start(log: Path, *arguments: object, drawing: bool = False) -> multiprocessing.Process:
    """Start ``sphere-edit`` with the arguments; what it prints is added to ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    with_paths = os.pathsep.join(path for path in (str(Path(__file__).parent), os.environ.get("PYTHONPATH")) if path)
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), with_paths
    try:
        child = context.Process(target=_command, args=([str(a) for a in arguments], str(log), drawing), daemon=True)
        child.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return child


def finish(child: multiprocessing.Process, timeout: float = 120) -> int:
    """Its exit status."""
    child.join(timeout)
    assert child.exitcode is not None, f"still at work after {timeout} s"
    return child.exitcode


def kill_after(child: multiprocessing.Process, seconds: float) -> bool:
    """SIGKILL after so many seconds; whether it was still at work."""
    child.join(max(0.0, seconds))
    if child.exitcode is not None:
        return False
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return True


def wait_for(path: Path, child: multiprocessing.Process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert child.is_alive() and time.monotonic() < end, path
        time.sleep(0.005)
