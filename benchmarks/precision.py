"""Errors of the streaming engine over 200 batches (20,000 edits), beside the published dense algorithm in fp64.

``python -m benchmarks.precision`` → ``results/precision.json``; about ten minutes on two cores, ``--batches`` for
fewer (only printed, not stored). The weight is SmolLM2's, of layer 6. The keys belong to the first 2,000 facts of
MultiCounterFact (the file of ``SPHERE_EDIT_DATA``), the same twenty batches again and again. The residuals are noise.
Three streams run side by side: the published algorithm in fp64 (the yardstick), the engine, and the published
algorithm in fp32.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import directions, streaming
from benchmarks.baselines.energy import chunked_triangle, unit_rows
from benchmarks.baselines.energy import exact as exact_energy
from benchmarks.collect import store
from benchmarks.layer import EDITS, MOVE, RATIO, RIDGE
from sphere_edit.data import load_requests
from sphere_edit.methods.covariance import key_covariances
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import cache_dir, load_model
from sphere_edit.model.structure import find_structure
from sphere_edit.runs.run_folder import environment
from sphere_edit.targets.keys import LayerPass
from sphere_edit.targets.presets import preset
from sphere_kernels import env
from sphere_kernels.streaming import FactoredCovariance, HypersphereState, NullSpace, RecursiveLeastSquares

MODEL, LAYER, FACTS, DATA = "smollm2-135m", 6, 2000, "counterfact_all.jsonl.gz"
THRESHOLD, COVARIANCE_WEIGHT = 2e-2, 15000.0
ALPHAS = {"AlphaEdit": 0.5, "MEMIT": 0.8}
BATCHES, THREADS = 200, 2
KEEP_EVERY = 20  # batches between two rows
WAYS = ("ours", "dense fp32")
ERRORS = ("solve", "projector", "projector, Frobenius", "projection", "energy", "energy of the run", "weight")


@dataclass(frozen=True)
class Inputs:
    """Inputs of one layer: weight ``[n, d]`` fp32, second moment of keys ``[d, d]`` fp64, batches of keys fp32."""

    weight: Tensor
    covariance: Tensor
    keys: list[Tensor]


def inputs(data: Path) -> Inputs:
    model, tokenizer = load_model(MODEL)
    structure, config = find_structure(model), preset(MODEL)
    requests = load_requests(data, limit=FACTS, order="mcf_index")
    covariance = key_covariances(model, tokenizer, structure, (LAYER,), config, cache_dir() / "covariance")[LAYER]
    with frozen(model):
        parts = [requests[i : i + EDITS] for i in range(0, FACTS, EDITS)]
        keys = [LayerPass(model, tokenizer, structure, part, ["{}"], (LAYER,)).keys() for part in parts]
    return Inputs(structure.down[LAYER].weight.detach().clone(), covariance, keys)


class Run:
    """One method's three streams on the same batches, each with a history and a weight."""

    def __init__(self, method: str, given: Inputs) -> None:
        self.method, self.given, alpha = method, given, ALPHAS[method]
        values, vectors = torch.linalg.eigh(given.covariance)
        small = values < THRESHOLD
        kept, removed = vectors[:, small], vectors[:, ~small]
        d = len(values)
        self.solver: RecursiveLeastSquares | FactoredCovariance
        if method == "AlphaEdit":
            self.solver = RecursiveLeastSquares(RIDGE, d, NullSpace(kept, removed))
        else:
            self.solver = FactoredCovariance(given.covariance, COVARIANCE_WEIGHT)

        def dense(dtype: torch.dtype) -> streaming.Published:
            solver = (
                streaming.AlphaEdit((kept @ kept.T).to(dtype), torch.zeros(d, d, dtype=dtype), RIDGE)
                if method == "AlphaEdit"
                else streaming.Memit((COVARIANCE_WEIGHT * given.covariance).to(dtype))
            )
            return streaming.Published(given.weight.to(dtype, copy=True), solver, RATIO, alpha)

        self.exact, self.single = dense(torch.float64), dense(torch.float32)
        self.state = HypersphereState(given.weight.clone(), energy_ratio=RATIO, alpha=alpha)
        self.generator = torch.Generator().manual_seed(0)
        self.scale = 1.0
        update = self.exact.solver.solve(given.keys[0].double(), self.residuals().double())
        self.scale = MOVE * float(given.weight.norm() / update.norm())

    def residuals(self) -> Tensor:
        """Residuals ``[n, b]``; the first batch moves the weight by `MOVE` of the weight's norm."""
        return self.scale * torch.randn(len(self.given.weight), EDITS, generator=self.generator)

    def batch(self, number: int) -> dict[str, Any]:
        """Errors of one batch: of solve and directions before the write, of both weights' energies after the write."""
        keys, left = self.given.keys[number % len(self.given.keys)], self.residuals()
        wanted = self.exact.solver.solve(keys.double(), left.double())

        right = self.solver.solve(keys)
        edge = _Edge(self.state.master)
        projected = self.state.project(right)
        ours = {"solve": _off(left.double() @ right.double(), wanted)} | edge.errors(self.state.directions.basis)
        basis = edge.basis(ours["rank"])
        ours["projection"] = _off(projected, right - self.state.alpha * (right.double() @ basis) @ basis.T)
        self.state.update_(left, projected)

        update, before = self.single.solver.solve(keys, left), self.single.weight
        fp32 = {"solve": _off(update, wanted)} | _Edge(before).errors(directions.published(before, RATIO))
        self.single.write(update)

        self.exact.write(wanted)
        if isinstance(self.solver, RecursiveLeastSquares):
            self.solver.commit()
        for way in (self.exact, self.single):
            way.solver.commit(keys)
        ours |= self._compare(self.state.master, float(self.state.energy))
        fp32 |= self._compare(self.single.weight, float(chunked_triangle(self.single.weight)))
        moved = _off(self.exact.weight, self.given.weight)
        return {"method": self.method, "batch": number + 1, "moved": moved, "ours": ours, "dense fp32": fp32}

    def _compare(self, weight: Tensor, energy: float) -> dict[str, float]:
        """Errors of the energy against fp64 on the same weight and against the fp64 run, and of the weight against the
        fp64 run's."""
        own, run = (float(exact_energy(w)) for w in (weight, self.exact.weight))
        return {
            "energy": abs(energy / own - 1),
            "energy of the run": abs(energy / run - 1),
            "weight": _off(weight, self.exact.weight),
        }


def _off(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


class _Edge:
    """Principal directions of a weight in fp64, to any rank."""

    def __init__(self, weight: Tensor) -> None:
        self.unit = unit_rows(weight.double())
        values, vectors = torch.linalg.eigh(self.unit @ self.unit.T)
        self.values, self.vectors = values.flip(0), vectors.flip(1)

    def basis(self, r: int) -> Tensor:
        return self.unit.T @ (self.vectors[:, :r] * self.values[:r].rsqrt())

    def errors(self, basis: Tensor) -> dict[str, Any]:
        """Errors of the projector ``U U^T``, at the rank of ``basis``.

        The spectral norm is the sine of the largest angle between the two subspaces; it grows as the gap at the edge
        shrinks.
        """
        r = basis.shape[1]
        q, triangle = torch.linalg.qr(torch.cat([basis.double(), self.basis(r)], 1))
        signs = torch.ones(2 * r, dtype=q.dtype)
        signs[r:] = -1
        difference = torch.linalg.eigvalsh(triangle * signs @ triangle.T)  # U U^T - V V^T = Q (R S R^T) Q^T
        return {
            "projector": float(difference.abs().max()),
            "projector, Frobenius": float(difference.norm()) / r**0.5,  # relative to a norm of 1
            "gap": float((self.values[r - 1] - self.values[r]) / self.values[r - 1]),
            "rank": r,
            "rank in fp64": directions.rank(self.values, RATIO),
        }


def worst(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest errors, smallest gap, and the number of batches with another rank than in fp64."""
    return {
        **{key: max(row[key] for row in seen) for key in ERRORS if key in seen[0]},
        "gap": min(row["gap"] for row in seen),
        "other rank": sum(row["rank"] != row["rank in fp64"] for row in seen),
    }


def main(batches: int) -> None:
    torch.set_num_threads(THREADS)
    if not env.EDIT_DATA.value or not (data := Path(env.EDIT_DATA.value) / DATA).is_file():
        sys.exit(f"{env.EDIT_DATA.name} must name a folder with {DATA}; nothing was measured")
    given, rows = inputs(data), []
    for method in ALPHAS:
        run = Run(method, given)
        seen = [run.batch(number) for number in range(batches)]
        rows += [row for row in seen if row["batch"] % KEEP_EVERY == 0 or row["batch"] in (1, batches)]
        rows.append({"method": method, "batches": batches, **{way: worst([row[way] for row in seen]) for way in WAYS}})
        print(rows[-1], flush=True)
    if batches < BATCHES:
        print(f"fewer than {BATCHES} batches: nothing is stored")
        return
    rows[-1]["environment"] = environment()
    store("precision", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=BATCHES)
    main(parser.parse_args().batches)
