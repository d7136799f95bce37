"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcam_ext import checks, reference
from tcam_ext.autograd import DecodeGrid

IMPLS = ("auto", "native", "reference")


def decode_grid(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    *,
    box: Sequence[Sequence[int]] | None = None,
    activation: str = "relu",
    output_activation: str = "none",
    align_corners: bool = False,
    padding_mode: str = "border",
    compute_dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Decode a dense grid of voxels from three feature planes and an MLP.

    .. math::
        f(x, y, z) &= [F_{xy}(x, y),\; F_{yz}(y, z),\; F_{xz}(x, z)] \in \mathbb{R}^{3C} \\
        h_0 = f, \quad h_l &= a(W_l h_{l-1} + b_l), \quad l = 1 \dots L-1 \\
        \mathrm{volume}(x, y, z) &= o(W_L h_{L-1} + b_L)

    with bilinear sampling of the planes, the hidden activation :math:`a` and the output activation :math:`o`
    (TCAM-Diff, AAAI 2025, stage 1). Since sampling and the first layer are linear, the kernel projects each plane through
    its block of :math:`W_1` once and adds three resampled vectors a voxel; nothing of size voxels x width is stored, in
    forward or in backward, which recomputes the hidden layers.

    Args:
        planes: three tensors ``(B, C, h, w)``, ``(B, C, w, d)``, ``(B, C, h, d)``, in the order xy, yz, xz, or one tensor
            ``(B, 3, C, R, R)``. C is 1 to 256. Need not be contiguous. B may be 0.
        weights: 1 to 6 tensors ``(n_l, n_(l-1))`` with ``n_0 = 3C``; hidden widths to 256, ``n_L = C_out`` to 16.
        biases: for each weight a tensor ``(n_l,)`` or None.
        size: ``(H, W, D)``, the voxels of the whole volume along x, y, z. Voxel i of n has its centre at
            ``(i + 1/2)/n * 2 - 1`` in the coordinates of ``grid_sample``.
        box: ``((x0, x1), (y0, y1), (z0, z1))``, half-open ranges of voxels: decode this part alone. It equals the same
            part of the whole volume bit for bit. None: all of it.
        activation: of the hidden layers: relu, leaky_relu (0.01), silu, softplus, tanh.
        output_activation: none, sigmoid or clamp (to [0, 1]).
        align_corners: as in ``grid_sample``: -1 and 1 are the centres (True) or the outer edges (False) of the outer texels.
        padding_mode: "border" or "zeros", as in ``grid_sample``.
        compute_dtype: of the hidden layers' products: a floating dtype or "tf32". None: autocast's dtype under autocast,
            else the dtype of the planes. Sums are always float32 or better. On a CPU, bfloat16 uses bfloat16 dot products
            where the machine has them (AVX512_BF16); elsewhere it, float16 and "tf32" are computed in float32.
        out_dtype: of the volume; None: that of the planes.
        impl: "auto" and "native" run the kernel and raise where it does not serve the arguments; "reference" runs
            :func:`tcam_ext.reference.decode_grid`, plain PyTorch on any device, differentiable any number of times.

    Returns:
        ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D). Differentiable once with respect to planes,
        weights and biases. Results are the same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what was expected and what was got.
        NotImplementedError: there is no kernel for the device; the message names ``impl="reference"``.
        RuntimeError: in backward under ``create_graph=True``; the message names ``impl="reference"``.

    planes, weights and biases share one dtype (float32, float64, float16, bfloat16) and one device; gradients have that
    dtype. Under autocast they may differ and are promoted.
    """
    checks.choice("impl", impl, IMPLS)
    if impl == "reference":
        return reference.decode_grid(
            planes,
            weights,
            biases,
            size,
            box=box,
            activation=activation,
            output_activation=output_activation,
            align_corners=align_corners,
            padding_mode=padding_mode,
            compute_dtype=compute_dtype,
            out_dtype=out_dtype,
        )
    call = checks.decode_grid(
        planes,
        weights,
        biases,
        size,
        box,
        activation,
        output_activation,
        align_corners,
        padding_mode,
        compute_dtype,
        out_dtype,
    )
    checks.native_limits(call)
    (x0, x1), (y0, y1), (z0, z1) = call.box
    options = (
        list(call.size),
        [x0, x1, y0, y1, z0, z1],
        activation,
        output_activation,
        align_corners,
        padding_mode,
        call.compute,
        call.out_dtype,
    )
    volume: Tensor = DecodeGrid.apply(len(call.weights), options, *call.planes, *call.weights, *call.biases)
    return volume
