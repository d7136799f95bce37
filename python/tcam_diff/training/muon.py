"""Muon, an optimiser for weights that are matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Coefficients a, b, c of the polynomial a s + b s^3 + c s^5 that brings singular values s in (0, 1] towards 1 (Jordan).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices U V' of matrices U S V' (N, rows, columns), roughly.

    Singular values are 0.6 to 1.3, but for those of less than about a hundredth of the matrix's norm, which are less. Products
    are in ``dtype``.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices)


class Muon(torch.optim.Optimizer):
    """Steps of about equal size along all singular vectors of a matrix of weights.

    With the gradient G and the momentum M = m M + (1 - m) G, weights W of a matrix with r rows and c columns change by

        W = W - 0.2 lr sqrt(max(r, c)) orthogonalised((1 - m) G + m M)

    so that a step of full rank has a root mean square of about 0.2 lr, like one of Adam. It is torch.optim.Muon without weight
    decay and with ``adjust_lr_fn="match_rms_adamw"``, for weights of convolutions: a weight (O, I, height, width) of ``copies``
    groups is ``copies`` matrices of O / copies rows and I height width columns. Matrices of one size are orthogonalised
    together.

    Args:
        params: weights, or groups of them, of at least two dimensions.
        lr: learning rate, positive.
        momentum: m in [0, 1).
        copies: number of matrices that a weight has along its first dimension.
        products: type of the products of the orthogonalisation.

    Raises:
        ValueError: a weight has fewer than two dimensions, or rows that ``copies`` does not divide.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        copies: int = 1,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "copies": copies})
        self.products = products
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2 or len(p) % group["copies"]:
                    raise ValueError(f"expected weights of {group['copies']} matrices, got one of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            sizes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    sizes.setdefault((len(p) // group["copies"], p[0].numel()), []).append((p, p.grad))
            m = group["momentum"]
            for (rows, columns), weights in sizes.items():
                ahead = []
                for p, gradient in weights:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"].lerp_(gradient, 1 - m)
                    ahead.append(gradient.lerp(momentum, m).reshape(-1, rows, columns))
                steps = orthogonalised(torch.cat(ahead), self.products)
                steps.mul_(-0.2 * group["lr"] * math.sqrt(max(rows, columns)))
                for (p, _), own in zip(weights, steps.split(group["copies"]), strict=True):
                    p.add_(own.reshape(p.shape))
