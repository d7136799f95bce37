"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcam_ext import checks, reference
from tcam_ext.autograd import DecodeGrid, DecodeGridLoss

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
            where the machine has them (AVX512_BF16); elsewhere it, float16 and "tf32" are computed in float32. On CUDA
            fused kernels with bfloat16 or float16 products serve relu decoders of 3 to 5 layers, hidden widths to 128 and
            C_out to 4 (gradients of widths above 64 need 216 KB of shared memory a block: Hopper, B200); every other case has
            TensorFloat-32 products, which round as float16 does. None with float32 tensors on CUDA means what
            ``torch.backends.cuda.matmul.fp32_precision`` says.
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
    options = checks.Options(activation, output_activation, align_corners, padding_mode, compute_dtype)
    if impl == "reference":
        return reference.decode_grid(planes, weights, biases, size, box=box, out_dtype=out_dtype, **options._asdict())
    call = checks.decode_grid(planes, weights, biases, size, box, options, out_dtype)
    checks.native_limits(call)
    volume: Tensor = DecodeGrid.apply(len(call.weights), _flat(call), call.out_dtype, *call.planes, *call.weights, *call.biases)
    return volume


def _flat(call: checks.DecodeGrid) -> tuple[Any, ...]:
    """The options of library.py."""
    (x0, x1), (y0, y1), (z0, z1) = call.box
    return list(call.size), [x0, x1, y0, y1, z0, z1], *call.options[:4], call.compute


def decode_grid_loss(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    size: Sequence[int] | None = None,
    *,
    box: Sequence[Sequence[int]] | None = None,
    loss: str = "smooth_l1",
    beta: float = 0.3,
    reduction: str = "mean",
    activation: str = "relu",
    output_activation: str = "none",
    align_corners: bool = False,
    padding_mode: str = "border",
    compute_dtype: torch.dtype | str | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""The mean loss of a decoded grid of voxels against a target, and in the same pass its gradients.

    .. math::
        \ell = \frac{1}{N} \sum_{b, c, x, y, z} l\big(\mathrm{volume}_{b,c}(x, y, z) - \mathrm{target}_{b,c}(x, y, z)\big)

    with the volume of :func:`decode_grid` and a pointwise loss :math:`l` of the difference :math:`d`: ``smooth_l1``
    (:math:`d^2/2\beta` where :math:`|d| < \beta`, else :math:`|d| - \beta/2`), ``l1`` (:math:`|d|`) or ``mse`` (:math:`d^2`).
    The volume is never written, and nothing is computed twice: forward, loss and backward are one walk over the voxels, three
    products a hidden layer instead of the four that :func:`decode_grid` and its backward take. ``loss.backward()`` only scales
    the stored gradients. Where no input requires a gradient, or under ``torch.no_grad()``, only the loss is computed; a frozen
    decoder's gradients are not.

    Args:
        planes, weights, biases, box, activation, output_activation, align_corners, padding_mode, compute_dtype, impl: see
            :func:`decode_grid`.
        target: ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D); float32, float64, float16, bfloat16, or uint8,
            which stands for value/255. It gets no gradient.
        size: ``(H, W, D)``, the whole volume. None: that of the target, if there is no box.
        loss: "smooth_l1", "l1" or "mse".
        beta: of smooth_l1, >= 0; TCAM-Diff uses 0.3. 0 gives l1.
        reduction: "mean", "sum", or "none_batch": one mean an object, ``(B,)``.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none_batch"``: float64 for float64 planes, else float32. Differentiable once
        with respect to planes, weights and biases. Losses are summed in float64, gradients in float32 or better and divided
        by N last. The same bits for any number of threads.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`; ValueError also where the target
            requires a gradient.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(activation, output_activation, align_corners, padding_mode, compute_dtype)
    if impl == "reference":
        return reference.decode_grid_loss(
            planes,
            weights,
            biases,
            target,
            size,
            box=box,
            loss=loss,
            beta=beta,
            reduction=reduction,
            **options._asdict(),
        )
    call, objective = checks.decode_grid_loss(planes, weights, biases, target, size, box, loss, beta, reduction, options)
    checks.native_limits(call)
    recording = torch.is_grad_enabled()
    grad_planes = recording and any(p.requires_grad for p in call.planes)
    grad_decoder = recording and any(t is not None and t.requires_grad for t in (*call.weights, *call.biases))
    found: Tensor = DecodeGridLoss.apply(
        len(call.weights),
        (*_flat(call), loss, objective.beta, reduction == "none_batch"),
        objective.voxels,
        grad_planes,
        grad_decoder,
        target,
        *call.planes,
        *call.weights,
        *call.biases,
    )
    return found
