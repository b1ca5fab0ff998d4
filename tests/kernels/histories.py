"""Null spaces and covariances for the tests of the streaming solvers."""

from __future__ import annotations

import torch
from cases import randn

from sphere_kernels.streaming import NullSpace

D = 24
FORMS = ("auto", "dual", "full")


def null_space(m, d=D):
    if m is None:
        return None
    basis = torch.linalg.qr(randn(d, d, seed=90)).Q
    return NullSpace(basis[:, :m], basis[:, m:])


def covariance(d, keys=200):
    samples = randn(keys, d, seed=70) * (1 / (1 + 20 * torch.arange(d) / d))
    return samples.T @ samples / keys
