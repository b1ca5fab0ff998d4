"""The check of the GPU kernels, rehearsed on the CPU; and that it notices what is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import report, stages
from benchmarks.gpu_check.__main__ import parsed
from sphere_kernels import dispatch
from sphere_kernels._backends import gpu

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def check(*arguments, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPHERE_KERNELS_")}
    env |= {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A whole run and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("gpu-check")
    done = check("--rehearse", "--out", out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@needs_triton
@pytest.mark.slow
def test_a_rehearsal_goes_through_everything(rehearsal, monkeypatch):
    found = json.loads((rehearsal / "gpu-rehearsal.json").read_text())
    rows = found["rows"]
    assert all(row["ok"] for row in rows if row.get("kind") != "plain")
    verified = {row["op"] for row in rows if row["stage"] == "verify" and row["impl"] == "triton"}
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    names = {"pair_energy": "energy", "pair_energy_backward": "gradient"}
    for op in dispatch.operations():
        if "triton" in dispatch.available(op, "cpu", torch.float32, (8, 8)):
            assert names.get(op, op) in verified, op
    timed = {row["case"] for row in rows if row.get("kind") == "ours" and row["seconds"] > 0}
    assert {"energy", "energy with gradient", "energy of many small", "gram", "projection", "directions"} <= timed
    assert {row["way"] for row in rows if row.get("kind") == "limit"} == {"torch.mm", "copy"}
    assert {row.get("dot") for row in rows} >= {"tf32", "tf32x3", ""}


@needs_triton
@pytest.mark.slow
def test_a_rehearsal_is_never_mistaken_for_a_measurement(rehearsal):
    path = rehearsal / "gpu-rehearsal.json"
    found = json.loads(path.read_text())
    assert found["rehearsed"] and all(row["rehearsed"] for row in found["rows"])
    for suffix in (".md", ".svg"):
        assert report.REHEARSED in path.with_suffix(suffix).read_text()
    with pytest.raises(ValueError, match="from a rehearsal, not from a GPU"):
        report.load(path)
    found["rehearsed"] = False  # not even with the mark on the file gone
    path.with_name("altered.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="from a rehearsal"):
        report.load(path.with_name("altered.json"))


def test_a_rehearsal_is_not_written_among_measurements():
    before = sorted(report.RESULTS.rglob("*"))
    for folder in (report.RESULTS, report.RESULTS / "plots"):
        with pytest.raises(ValueError, match="a rehearsal must not be written to"):
            report.write({"rehearsed": True, "machine": {}, "rows": []}, "h100", folder)
    assert sorted(report.RESULTS.rglob("*")) == before


def test_what_is_stored_was_measured():
    for path in report.RESULTS.glob("gpu-*.json"):
        assert report.load(path)["machine"]["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_so():
    done = check()
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check needs a CUDA or ROCm device; torch sees none")


BROKEN = """
import itertools, os, signal, time
from types import SimpleNamespace
import sphere_kernels
from sphere_kernels import dispatch

def broken(op, wrap):
    known = dispatch.operation(op).implementations
    found = known["triton"]
    known["triton"] = SimpleNamespace(run=lambda *a: wrap(found.run, *a), supports=found.supports)

def slightly_off(run, weight, normalize):
    gram = run(weight, normalize)
    gram.view(-1)[-1:] *= 1.001
    return gram

turn = itertools.count()
broken("gram", slightly_off)
broken("pair_energy_backward", lambda run, *a: run(*a) * (1 + 1e-15 * next(turn)))
broken("sparse_projection", lambda run, *a: os.kill(os.getpid(), signal.SIGKILL))
broken("gram_update_energy_", lambda run, *a: time.sleep(600) if a[5] == 2 else run(*a))
broken("principal_directions", lambda run, weight, *a: 1 / 0)
"""


@needs_triton
@pytest.mark.slow
def test_what_is_broken_is_reported_and_the_rest_is_kept(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    options = ("--rehearse", "--out", tmp_path, "--stages", "verify", "--only", "float64", "--patience", 15)
    done = check(*options, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr[-4000:]
    rows = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["rows"]
    failures = {op: [row["failed"] for row in rows if row["op"] == op and not row["ok"]] for op in ops(rows)}
    assert any("exceeds its budget" in why for why in failures["gram"])
    assert any("two runs on the same input differ" in why for why in failures["gradient"])
    assert failures["sparse_projection"] == ["the process ended: status -9"]
    assert failures["gram_update_energy_"] == ["no answer in 15 s"]
    assert failures["principal_directions"] == ["ZeroDivisionError: division by zero"] * 2
    assert failures["energy"] == failures["apply_projected_update_"] == failures["products"] == []
    kept = [row["number"] for row in rows]
    assert kept == sorted(set(kept))
    summary = (tmp_path / "gpu-rehearsal.md").read_text()
    assert summary.count("exceeds its budget") == sum("exceeds" in why for why in failures["gram"])


def ops(rows):
    return {row["op"] for row in rows}


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch):
    def interrupted(options, stage, journal, machine, rows):
        rows.append({"op": "gram", "number": 0, "ok": True})
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.run(parsed(["--rehearse"]), tmp_path)
    assert len(json.loads((tmp_path / "gpu-rehearsal.json").read_text())["rows"]) == 1


def timed(way, kind, dot, seconds, **more):
    figures = {"flops": 1e12, "bytes": 1e9, "error": 1e-8, "ok": True, "stage": "benchmark", "rehearsed": False}
    return {"case": "energy", "shape": [8, 8], "dtype": "float32"} | figures | more | {
        "way": way, "kind": kind, "dot": dot, "seconds": seconds
    }  # fmt: skip


def test_like_is_compared_with_like():
    rows = [
        timed("torch.mm", "limit", "tf32", 1.0, tflops=300.0),
        timed("torch.mm", "limit", "ieee", 1.0, tflops=50.0),
        timed("copy", "limit", "", 1.0, gbs=1000.0),
        *(timed("triton", "ours", dot, s) for dot, s in (("ieee", 0.04), ("tf32x3", 0.02), ("tf32", 0.01))),
        *(timed("X @ X.T", "plain", dot, s) for dot, s in (("ieee", 0.06), ("tf32", 0.03))),
        timed("torch.compile", "compile", "ieee", 0.05),
        timed("other", "plain", "ieee", 0.001, ok=False, failed="no"),
    ]
    found = {row["dot"]: row for row in report.compared(rows)}
    assert {dot: row["best"]["plain"]["seconds"] for dot, row in found.items()} == {
        "ieee": 0.06, "tf32x3": 0.06, "tf32": 0.03
    }  # fmt: skip
    assert found["tf32x3"]["share"] == pytest.approx(1e12 / 100e12 / 0.02)
    assert found["tf32"]["best"]["compile"]["seconds"] == 0.05
    page = report.summary({"rehearsed": False, "machine": {"device": "A GPU", "driver": "1.2"}, "rows": rows})
    assert "# gpu-check: A GPU\n" in page and "A GPU; driver 1.2." in page and report.REHEARSED not in page
    assert "| energy | 8×8 | float32 tf32x3 | triton | 20.000 | 50 % | 60.000 (X @ X.T, ieee) | 3.0× |" in page
