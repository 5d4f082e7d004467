"""Exact Hessian products against dense Hessians."""

from __future__ import annotations

import torch
from torch import nn

from safe_lr.operators import exact_hessian


def test_product_is_the_dense_hessian() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.sin().sum() * y.exp()).sum() + (x[0] * y[1, 2]) ** 3

    (xx, xy), (yx, yy) = torch.autograd.functional.hessian(loss, (x, y))  # type: ignore[no-untyped-call]
    curvature = exact_hessian(loss(x, y), [x, y])
    u, v = torch.randn_like(x), torch.randn_like(y)
    hu, hv = curvature.product([u, v])
    torch.testing.assert_close(hu, xx @ u + torch.tensordot(xy, v, 2))
    torch.testing.assert_close(hv, torch.tensordot(yx, u, 1) + torch.tensordot(yy, v, 2))


def test_unused_and_linear_parameters_have_zero_rows() -> None:
    a, b, c = (torch.randn(3, requires_grad=True) for _ in range(3))
    curvature = exact_hessian((a**2).sum() + b.sum(), [a, b, c])
    assert curvature.used == [True, True, False]
    assert torch.equal(curvature.gradient[1], torch.ones(3))
    ha, hb, hc = curvature.product([torch.ones(3)] * 3)
    torch.testing.assert_close(ha, torch.full((3,), 2.0))
    assert not hb.any()
    assert not hc.any()


def test_loss_that_is_linear_has_a_zero_hessian() -> None:
    a = torch.randn(3, requires_grad=True)
    assert not exact_hessian((2 * a).sum(), [a]).product([torch.ones(3)])[0].any()


def test_dropout_mask_is_frozen() -> None:
    """On one retained graph the operator is symmetric; with a mask drawn anew it would not be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1)).double()
    params = list(model.parameters())
    curvature = exact_hessian(model(torch.randn(8, 5).double()).square().mean(), params)
    u, v = ([torch.randn_like(p) for p in params] for _ in range(2))

    def dot(x: list[torch.Tensor], y: list[torch.Tensor]) -> torch.Tensor:
        return sum(((a * b).sum() for a, b in zip(x, y, strict=True)), torch.zeros((), dtype=torch.float64))

    torch.testing.assert_close(dot(u, curvature.product(v)), dot(v, curvature.product(u)))
