"""What importing needs, and the environment report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import sphere_kernels
from sphere_kernels import collect_env, dispatch, env


def run(code, *blocked):
    """Run code in a fresh interpreter where some packages are missing."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n" + code
    root = Path(sphere_kernels.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_only():
    code = "import torch, sphere_kernels as k; print(k.hyperspherical_energy(torch.eye(3)).item())"
    assert abs(float(run(code, "numpy", "transformers", "triton", "scipy", "pybind11")) - 6 * 2**-0.5) < 1e-6


def test_first_calls_do_not_import_the_compiler():
    code = """
import sys, torch, sphere_kernels as k
weight, basis = torch.eye(3).requires_grad_(), torch.eye(3)[:, :1]
k.hyperspherical_energy(weight).backward()
k.apply_projected_update_(weight, k.sparse_projection(k.gram(weight.detach()), basis), basis)
print("torch._dynamo" in sys.modules)
"""
    assert run(code).strip() == "False"


def test_everything_exported_exists():
    assert all(hasattr(sphere_kernels, name) for name in sphere_kernels.__all__)


def test_report_is_complete():
    sections = collect_env.collect()
    assert not any("failed" in section for section in sections.values()), sections
    assert set(sections["implementations"]) == set(dispatch.operations())
    assert set(sections["environment"]) == {v.name for v in env.VARIABLES}
    text = collect_env.report(sections)
    assert all(name in text for name in (*sections, "torch", "SPHERE_KERNELS_IMPL"))


def test_report_survives_a_missing_torch():
    code = "from runpy import run_path; run_path('sphere_kernels/collect_env.py', run_name='__main__')"
    sections = json.loads(run("sys.argv.append('--json');" + code, "torch"))
    assert "import of torch halted" in sections["torch"]["failed"]
    assert sections["machine"]["cores"]
