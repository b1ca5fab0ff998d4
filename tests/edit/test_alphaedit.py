"""AlphaEdit's recursive solve against the published dense formula in fp64."""

from __future__ import annotations

import plain
import pytest
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.methods import METHODS, make_method, method_class
from sphere_edit.methods.alphaedit import AlphaEdit, null_space

_D, _N = 24, 10


def _covariance(seed: int = 0) -> torch.Tensor:
    """Eigenvalues from 2e-3 to 2, half of them below 0.06."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(_D, _D, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(-2.7, 0.3, _D, dtype=torch.float64)) @ basis.T


def _projector(covariance: torch.Tensor, threshold: float) -> torch.Tensor:
    u, s, _ = torch.linalg.svd(covariance)
    small = u[:, s < threshold]
    return small @ small.T


def _batch(seed: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, _D, generator=generator), torch.randn(b, _N, generator=generator)


def _full(update) -> torch.Tensor:
    return update.left.double() @ update.right.double()


@pytest.mark.parametrize("null", [True, False], ids=["null-space", "no-null-space"])
@pytest.mark.parametrize("ridge", [10.0, 0.1])
def test_equals_the_dense_formula_over_batches(null, ridge):
    covariances = {4: _covariance(0), 7: _covariance(1)}
    config = EditConfig(null_space=null, null_space_threshold=0.06, ridge=ridge)
    method = make_method(config, covariances)
    assert isinstance(method, AlphaEdit)
    eye = torch.eye(_D, dtype=torch.float64)
    projectors = {i: _projector(c, 0.06) if null else eye for i, c in covariances.items()}
    assert method.null_space_rank == {i: round(p.trace().item()) for i, p in projectors.items()}
    history = {i: torch.zeros_like(eye) for i in covariances}
    for step, b in enumerate((3, 1, 6, 30, 2)):  # 30 facts are more than dimensions
        for layer in covariances:
            keys, residuals = _batch(10 * step + layer, b)
            update = method.solve(layer, keys, residuals)
            assert update.left.shape == (_N, b) and update.right.shape == (b, _D)
            assert update.left.dtype == update.right.dtype == torch.float32
            want = plain.alphaedit(projectors[layer], history[layer], ridge, keys, residuals)
            assert want.norm() > 1e-3
            assert (_full(update) - want).norm() < 1e-4 * want.norm()  # the history is fp32
            history[layer] += keys.double().T @ keys.double()
        method.commit()


def test_history_holds_earlier_facts():
    """Without the history the second batch's update would disturb the first batch's keys more."""
    config = EditConfig(null_space=False, ridge=0.01)
    method = AlphaEdit(config, {0: _covariance()})
    first, second = _batch(0, 4), _batch(1, 4)
    method.solve(0, *first)
    method.commit()
    held = _full(method.solve(0, *second)) @ first[0].double().T
    free = _full(AlphaEdit(config, {0: _covariance()}).solve(0, *second)) @ first[0].double().T
    assert held.norm() < 0.1 * free.norm()


def test_update_stays_in_the_null_space():
    covariance = _covariance()
    update = AlphaEdit(EditConfig(null_space_threshold=0.06), {0: covariance}).solve(0, *_batch(0, 3))
    inside = _projector(covariance, 0.06)
    torch.testing.assert_close(update.right.double() @ inside, update.right.double(), atol=1e-6, rtol=1e-5)


def test_rollback_forgets_what_was_not_committed():
    config = EditConfig(null_space_threshold=0.06, ridge=0.1)
    method = AlphaEdit(config, {0: _covariance()})
    first, second, third = _batch(0, 4), _batch(1, 4), _batch(2, 4)
    method.solve(0, *first)
    method.commit()
    want = method.solve(0, *third)
    method.rollback()
    method.solve(0, *second)
    method.rollback()
    method.commit()
    got = method.solve(0, *third)
    assert torch.equal(got.left, want.left) and torch.equal(got.right, want.right)
    method.commit()
    assert not torch.allclose(method.solve(0, *third).right, want.right)


def test_repeated_fact_is_solvable():
    """Equal keys make ``K Kᵀ`` singular; the ridge keeps the solve finite and the dense formula agrees."""
    config = EditConfig(null_space=False, ridge=0.1)
    keys, residuals = _batch(0, 1)
    keys, residuals = keys.repeat(5, 1), residuals.repeat(5, 1)
    got = _full(AlphaEdit(config, {0: _covariance()}).solve(0, keys, residuals))
    eye = torch.eye(_D, dtype=torch.float64)
    torch.testing.assert_close(got, plain.alphaedit(eye, 0 * eye, 0.1, keys, residuals), atol=1e-6, rtol=1e-4)


def test_threshold_that_leaves_nothing():
    with pytest.raises(ValueError, match=r"layer 3: no eigenvalue .* null_space_threshold = 0.0001 \(smallest 0.002"):
        AlphaEdit(EditConfig(null_space_threshold=1e-4), {3: _covariance()})


def test_null_space_basis():
    covariance = _covariance()
    space = null_space({0: covariance}, 0, 0.06)
    basis = space.kept
    m = basis.shape[1]
    assert 0 < m < _D
    torch.testing.assert_close(basis.T @ basis, torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, _projector(covariance, 0.06))
    whole = torch.cat([basis, space.removed], 1)
    torch.testing.assert_close(whole @ whole.T, torch.eye(_D, dtype=torch.float64))
    assert null_space({0: covariance}, 0, 1e9).kept.shape == (_D, _D)


def test_unknown_method():
    config = EditConfig(method="memo")
    for call in (method_class, lambda c: make_method(c, {})):
        with pytest.raises(ConfigError, match=f"method: expected one of {', '.join(METHODS)}, got 'memo'"):
            call(config)
