"""The public ops. Each checks its arguments, and passes the request to the kernels or to the reference in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcam_ext import activations, arguments, checks, native, reference
from tcam_ext.options import Decoding, Sampling, resolve, takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMPLS = ("auto", "native", "reference")


@takes(Decoding)
def decode_grid(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    *,
    box: Sequence[Sequence[int]] | None = None,
    grid: str = "cells",
    bounds: Any = None,
    extra: Tensor | None = None,
    return_preactivation: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    **options: Unpack[Decoding],
) -> Any:
    r"""Decode a dense grid of voxels from feature planes and an MLP.

    .. math::
        f(x, y, z) &= [F_{xy}(x, y),\; F_{yz}(y, z),\; F_{xz}(x, z)] \in \mathbb{R}^{3C} \\
        h_0 = f, \quad h_l &= a(W_l h_{l-1} + b_l), \quad l = 1 \dots L-1 \\
        \mathrm{volume}(x, y, z) &= o(W_L h_{L-1} + b_L)

    with bilinear sampling of the planes, the hidden activation :math:`a` and the output activation :math:`o`
    (TCAM-Diff, AAAI 2025, stage 1). As sampling and the first layer are linear, the kernel projects each plane through its
    block of :math:`W_1` once, and adds resampled vectors at each voxel. It stores nothing of size voxels x width; backward
    recomputes the hidden layers.

    Args:
        planes: a tensor ``(B, C, rows, columns)`` of any size for each pair of ``plane_axes``, or one tensor
            ``(B, planes, C, h, w)``, with 1 to 512 channels and 1 to 48 planes. B may be 0. Any strides are allowed.
        weights: 1 to 16 tensors ``(n_l, n_(l-1))``; ``n_0`` is the number of features (3C for three concatenated planes).
            Hidden widths are up to 512, ``n_L = C_out`` is up to 256.
        biases: a tensor ``(n_l,)`` or None for each weight.
        size: ``(H, W, D)``, the number of voxels in the whole volume along x, y, z.
        box: ``((x0, x1), (y0, y1), (z0, z1))``, half-open ranges of voxels: decode only this part, which equals the same part
            of the whole volume bit for bit. None: decode all.
        grid: "cells": voxel i of n has its centre at ``(i + 1/2)/n * 2 - 1`` in the coordinates of ``grid_sample``;
            "corners": it lies at ``i/(n - 1) * 2 - 1``, as in ``torch.linspace(-1, 1, n)``.
        bounds: numbers ``(3, 2)`` or ``(B, 3, 2)``: the grid runs from bounds[..., 0] to bounds[..., 1] along x, y, z instead
            of from -1 to 1, the edges of the planes. It gets no gradient.
        extra: ``(B, E, H, W, D)``, or the box's size in place of (H, W, D): extra features, which the first layer reads after
            those of the planes, such as an encoding of the position. Each voxel costs their product with their columns of W_1.
        return_preactivation: also return W_L h + b_L, for example to take a density and a colour from one output.
        out_dtype: of the volume; None: the dtype of the planes.
        <meaning of options>
        impl: "auto" and "native" run the kernel, and raise if it does not support the arguments; "reference" runs
            :func:`tcam_ext.reference.decode_grid`, plain PyTorch on any device, differentiable any number of times.

    Returns:
        ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D); with ``return_preactivation`` a pair. Differentiable
        once with respect to planes, weights, biases and extra. Results have the same bits for any number of threads.

    Calls can be captured into a CUDA graph. Make one call of the same kind before the capture, with backward if the capture
    has it: the first call of a kernel loads it, which a capture does not permit.

    Noise comes from Philox4x32-10, keyed by the seed and counting by object, feature, and index of the voxel in the whole grid,
    and from the Box-Muller transform in arithmetic that gives the same bits on every machine. It is not stored.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was given.
        NotImplementedError: there is no kernel for the device; the message names ``impl="reference"``.
        RuntimeError: in backward under ``create_graph=True``; the message names ``impl="reference"``.

    planes, weights and biases have one dtype (float32, float64, float16 or bfloat16) and one device; gradients have that
    dtype. Under autocast dtypes may differ, and are promoted.
    """
    arguments.choice("impl", impl, IMPLS)
    request = checks.grid_request(
        planes, weights, biases, size, box, grid, bounds, extra, resolve(Decoding, options), out_dtype
    )
    return _decode(request, return_preactivation, impl)


@takes(Decoding)
def decode_grid_loss(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    size: Sequence[int] | None = None,
    *,
    box: Sequence[Sequence[int]] | None = None,
    grid: str = "cells",
    bounds: Any = None,
    extra: Tensor | None = None,
    loss: str = "smooth_l1",
    beta: float = 0.3,
    reduction: str = "mean",
    impl: str = "auto",
    **options: Unpack[Decoding],
) -> Tensor:
    r"""The mean loss of a decoded grid of voxels against a target, with its gradients computed in the same pass.

    .. math::
        \ell = \frac{1}{N} \sum_{b, c, x, y, z} l\big(\mathrm{volume}_{b,c}(x, y, z) - \mathrm{target}_{b,c}(x, y, z)\big)

    with the volume of :func:`decode_grid` and a pointwise loss :math:`l` of the difference :math:`d`: ``smooth_l1``
    (:math:`d^2/2\beta` where :math:`|d| < \beta`, else :math:`|d| - \beta/2`), ``l1`` (:math:`|d|`) or ``mse`` (:math:`d^2`).
    The volume is never written: forward, loss and backward are one pass over the voxels, with three products a hidden layer in
    place of the four of :func:`decode_grid` and its backward. ``loss.backward()`` only scales the stored gradients. If no input
    requires a gradient, or under ``torch.no_grad()``, only the loss is computed; a frozen decoder costs no gradients.

    Args:
        planes, weights, biases, box, grid, bounds, extra, <options>, impl: see :func:`decode_grid`.
        target: ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D); float32, float64, float16, bfloat16, or uint8,
            which means value/255. It gets no gradient.
        size: ``(H, W, D)``, the size of the whole volume. None: the size of the target, allowed without box.
        loss: "smooth_l1", "l1" or "mse".
        beta: of smooth_l1, >= 0; TCAM-Diff uses 0.3. 0 gives l1.
        reduction: "mean", "sum", or "none_batch": the mean for each object, ``(B,)``.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none_batch"``: float64 for float64 planes, else float32. Differentiable once
        with respect to planes, weights, biases and extra. Losses are summed in float64, gradients in float32 or float64, and
        divided by N last. Results have the same bits for any number of threads.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`; ValueError also if the target
            requires a gradient.
    """
    arguments.choice("impl", impl, IMPLS)
    target, size = checks.target_and_size(target, size, box)
    request = checks.grid_request(planes, weights, biases, size, box, grid, bounds, extra, resolve(Decoding, options), None)
    objective = checks.objective(*request, box is None, target, loss, beta, reduction)
    return _backend(request, impl).loss(request, target, objective)


@takes(Decoding)
def decode_points(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    xyz: Tensor,
    *,
    batch_index: Tensor | None = None,
    extra: Tensor | None = None,
    bounds: Any = None,
    return_preactivation: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    **options: Unpack[Decoding],
) -> Any:
    r"""Decode arbitrary points from feature planes and an MLP: :func:`decode_grid` at given coordinates.

    Points gather texels from the planes, or from the planes projected through the first layer (which then costs a sum of four
    texels a plane), whichever takes fewer multiply-adds. Memory beyond inputs and outputs does not depend on the number of
    points; backward recomputes everything but its inputs. (``bounds``, or an xyz in another dtype than the kernel's, make a
    copy of xyz.)

    Args:
        planes, weights, biases, <options>, return_preactivation, out_dtype, impl: see :func:`decode_grid`.
            ``plane_axes`` may name coordinates 0 to 3, for points (x, y, z, t). Point n of an object has the noise of voxel n
            of a grid; with batch_index, n counts the points of all objects.
        xyz: ``(B, N, A)``, or any number of dimensions in place of N; A, the number of coordinates, is 2 to 4. With
            ``batch_index``, or if B = 1, also ``(N, A)``. -1 and 1 are the edges of the planes. Interpolation is in float64 if
            ``compute_dtype`` is float64, else in float32, whatever the dtype of xyz. NaN counts as -1; any value is safe.
        batch_index: ``(N,)`` int64, the object of each point. (Out of range: IndexError on a CPU; on CUDA, where a check would
            wait for the device, the result is NaN.)
        extra: ``(B, N, E)``, extra features, which the first layer reads after those of the planes, such as an encoding of xyz
            or of a direction.
        bounds: numbers ``(A, 2)`` or ``(B, A, 2)``, in the units of xyz: the coordinates of the planes' edges, in place of -1
            and 1. It gets no gradient.

    Returns:
        ``(B, N, C_out)``, or ``(N, C_out)``; with ``return_preactivation`` a pair. Differentiable once with respect to planes,
        weights, biases, xyz and extra. The gradient of a coordinate outside the planes is 0 with padding "border", as in
        ``grid_sample``. On a CPU results have the same bits for any number of threads.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`.
    """
    arguments.choice("impl", impl, IMPLS)
    request = checks.points_request(
        planes, weights, biases, xyz, batch_index, bounds, extra, resolve(Decoding, options), out_dtype
    )
    return _decode(request, return_preactivation, impl)


@takes(Sampling)
def sample_points(
    planes: Tensor | Sequence[Tensor],
    xyz: Tensor,
    *,
    batch_index: Tensor | None = None,
    bounds: Any = None,
    impl: str = "auto",
    **options: Unpack[Sampling],
) -> Tensor:
    """The features of the planes at points, for projects that have their own decoder.

    Args:
        planes, xyz, batch_index, bounds, <options>, impl: see :func:`decode_points`.

    Returns:
        ``(B, N, features)``, in the dtype of the planes; features are P C (concat) or C. Differentiable once with respect to
        planes and xyz.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`.
    """
    arguments.choice("impl", impl, IMPLS)
    request = checks.points_request(planes, (), (), xyz, batch_index, bounds, None, resolve(Sampling, options), None)
    return _backend(request, impl).sample(request)


@takes(Sampling)
def sample_grid(
    planes: Tensor | Sequence[Tensor],
    size: Sequence[int],
    *,
    box: Sequence[Sequence[int]] | None = None,
    grid: str = "cells",
    bounds: Any = None,
    impl: str = "auto",
    **options: Unpack[Sampling],
) -> Tensor:
    """The features of the planes on a dense grid of voxels, for projects that have their own decoder.

    Each plane is resampled to the grid along its two axes and then expanded along the third, without coordinates or gathers.

    Args:
        planes, size, box, grid, bounds, <options>, impl: see :func:`decode_grid`.

    Returns:
        ``(B, features, H, W, D)``, or the box's size in place of (H, W, D), in the dtype of the planes; features are P C
        (concat) or C. Differentiable any number of times with respect to planes; deterministic.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`decode_grid`.
    """
    arguments.choice("impl", impl, IMPLS)
    request = checks.grid_request(planes, (), (), size, box, grid, bounds, None, resolve(Sampling, options), None)
    return _backend(request, impl).sample(request)


def _backend(request: checks.Request, impl: str) -> Any:
    """The module that runs a request, native or reference: each has decode, loss and sample."""
    if impl == "reference":
        return reference
    checks.native_limits(request.planes, request.mlp)
    return native


def _decode(request: checks.Request, return_preactivation: bool, impl: str) -> Any:
    backend, mlp = _backend(request, impl), request.mlp
    if not return_preactivation:
        return backend.decode(request)
    z = backend.decode(request._replace(mlp=mlp._replace(output_activation="none", out_dtype=mlp.storage)))
    return activations.output("output_activation", mlp.output_activation)(z).to(mlp.out_dtype), z.to(mlp.out_dtype)
