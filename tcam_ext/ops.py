"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcam_ext import activations, checks, library, reference
from tcam_ext.autograd import DecodeGrid, DecodeGridLoss, DecodePoints, ResampleAxis

IMPLS = ("auto", "native", "reference")
PlaneAxes = Sequence[tuple[int, int]]


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
    plane_axes: PlaneAxes = checks.PLANE_AXES,
    reduce: str = "concat",
    align_corners: bool = False,
    padding_mode: str = "border",
    activation: str | Sequence[str] = "relu",
    output_activation: str = "none",
    return_preactivation: bool = False,
    compute_dtype: torch.dtype | str | None = None,
    noise_std: float = 0.0,
    noise_seed: int | None = None,
    noise_mode: str = "point",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Any:
    r"""Decode a dense grid of voxels from feature planes and an MLP.

    .. math::
        f(x, y, z) &= [F_{xy}(x, y),\; F_{yz}(y, z),\; F_{xz}(x, z)] \in \mathbb{R}^{3C} \\
        h_0 = f, \quad h_l &= a(W_l h_{l-1} + b_l), \quad l = 1 \dots L-1 \\
        \mathrm{volume}(x, y, z) &= o(W_L h_{L-1} + b_L)

    with bilinear sampling of the planes, the hidden activation :math:`a` and the output activation :math:`o`
    (TCAM-Diff, AAAI 2025, stage 1). Since sampling and the first layer are linear, the kernel projects each plane through
    its block of :math:`W_1` once and adds resampled vectors a voxel; nothing of size voxels x width is stored, in
    forward or in backward, which recomputes the hidden layers.

    Args:
        planes: a tensor ``(B, C, rows, columns)`` for each pair of ``plane_axes``, sizes free, or one tensor
            ``(B, planes, C, h, w)``. C is 1 to 256, planes 1 to 16. Need not be contiguous. B may be 0.
        weights: 1 to 6 tensors ``(n_l, n_(l-1))`` with ``n_0`` the features (3C of three concatenated planes); hidden widths
            to 256, ``n_L = C_out`` to 64.
        biases: for each weight a tensor ``(n_l,)`` or None.
        size: ``(H, W, D)``, the voxels of the whole volume along x, y, z.
        box: ``((x0, x1), (y0, y1), (z0, z1))``, half-open ranges of voxels: decode this part alone. It equals the same
            part of the whole volume bit for bit. None: all of it.
        grid: "cells": voxel i of n has its centre at ``(i + 1/2)/n * 2 - 1`` in the coordinates of ``grid_sample``;
            "corners": it lies at ``i/(n - 1) * 2 - 1``, as in ``torch.linspace(-1, 1, n)``.
        bounds: numbers ``(3, 2)`` or ``(B, 3, 2)``: the grid runs from bounds[..., 0] to bounds[..., 1] along x, y, z instead
            of from -1 to 1, which are the edges of the planes. It gets no gradient.
        extra: ``(B, E, H, W, D)``, or the box's size in place of (H, W, D): features that the first layer reads after those of
            the planes, such as an encoding of the position. They cost a product with their columns of W_1 a voxel.
        plane_axes: for each plane the coordinate (0: x, 1: y, 2: z) that runs over its rows and the one over its columns.
            Pairs may repeat, also swapped. :mod:`tcam_ext.conventions` has those of other projects.
        reduce: the first layer reads the planes' features one plane after the other ("concat"), one channel after the other
            ("concat_channel_major", feature c P + p), or their "sum", "mean" or product ("prod"). The product does not commute
            with the first layer: each voxel gathers features and multiplies them by W_1, as in :func:`decode_points`.
        align_corners: as in ``grid_sample``: -1 and 1 are the centres (True) or the outer edges (False) of the outer texels.
        padding_mode: "border", "zeros" or "reflection", as in ``grid_sample``.
        activation: of the hidden layers, one for all or one for each: relu, leaky_relu (0.01), silu, softplus, tanh, gelu,
            sine, half_sine ((sin z + 1)/2). ``name(p)`` sets the slope of leaky_relu, beta of softplus (log(1 + exp(p z))/p) or
            the frequency of the sines (sin(p z)).
        output_activation: none, sigmoid, clamp (to [0, 1]), affine_sigmoid (sigmoid(z)(1 + 2p) - p, p = 0.001: EG3D), softplus
            (of z + p, p = 0), trunc_exp (exp(z + p), p = 0, with the gradient of exp(min(z + p, 15))), tanh,
            half_sine ((sin(p z) + 1)/2); ``name(p)``.
        return_preactivation: also return W_L h + b_L: users take a density and a colour from one output.
        compute_dtype: of the hidden layers' products: a floating dtype or "tf32". None: autocast's dtype under autocast,
            else the dtype of the planes. Sums are always float32 or better. On a CPU, bfloat16 uses bfloat16 dot products
            where the machine has them (AVX512_BF16); elsewhere it, float16 and "tf32" are computed in float32. On CUDA
            fused kernels with bfloat16 or float16 products serve relu decoders of 3 to 5 layers, hidden widths to 128 and
            C_out to 4 (gradients of widths above 64 need 216 KB of shared memory a block: Hopper, B200); every other case has
            TensorFloat-32 products, which round as float16 does; :func:`explain` says what a call takes, and why. None with
            float32 tensors on CUDA means what ``torch.backends.cuda.matmul.fp32_precision`` says.
        noise_std: >= 0. The decoder reads f + noise_std eps in place of f, with eps standard normal: TCAM-Diff's regularisation
            of training, equation 7, where it is 0.32.
        noise_seed: 0 to 2^63 - 1, needed with noise_std > 0. Equal seeds give equal noise on every device, for any box and any
            number of threads; take another for each step of a training. (A CUDA graph repeats the seed it was captured with.)
        noise_mode: "point" draws eps for every voxel and feature (equation 7 as it stands), which costs its generation and a
            product of the features with W_1 a voxel, forward and again in backward; "texel" adds noise to the planes' texels,
            which costs nothing, and neighbouring voxels share it. ``extra`` gets no noise.
        out_dtype: of the volume; None: that of the planes.
        impl: "auto" and "native" run the kernel and raise where it does not serve the arguments; "reference" runs
            :func:`tcam_ext.reference.decode_grid`, plain PyTorch on any device, differentiable any number of times.

    Returns:
        ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D); with ``return_preactivation`` a pair. Differentiable
        once with respect to planes, weights, biases and extra. Results are the same bits for any number of threads.

    Calls can be captured into a CUDA graph. Make one call of the same kind before the capture, backward too where it is
    captured: the first call of a kernel loads it, which a capture does not permit.

    Noise is Philox4x32-10 keyed by the seed, with counters of the voxel's number in the whole grid, the object and the
    feature, and Box and Muller's transform in arithmetic that has the same bits everywhere; nothing of it is stored.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what was expected and what was got.
        NotImplementedError: there is no kernel for the device; the message names ``impl="reference"``.
        RuntimeError: in backward under ``create_graph=True``; the message names ``impl="reference"``.

    planes, weights and biases share one dtype (float32, float64, float16, bfloat16) and one device; gradients have that
    dtype. Under autocast they may differ and are promoted.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(
        plane_axes, reduce, align_corners, padding_mode, activation, output_activation, compute_dtype, noise_std, noise_seed,
        noise_mode,
    )  # fmt: skip
    if impl == "reference":
        return reference.decode_grid(
            planes,
            weights,
            biases,
            size,
            box=box,
            grid=grid,
            bounds=bounds,
            extra=extra,
            out_dtype=out_dtype,
            return_preactivation=return_preactivation,
            **options._asdict(),
        )
    sampled, mlp = checks.decoder(
        checks.sampled(planes, options, 3), weights, biases, options, out_dtype, checks.extra_width(extra, 1)
    )
    voxels = checks.grid(sampled, size, box, grid, bounds, extra)
    checks.native_limits(sampled, mlp.weights)
    sampled = reference.with_texel_noise(sampled, mlp.noise, library.normals)
    own = _own(voxels, sampled)

    def run(mlp: checks.Decoder) -> Tensor:
        tensors, counts, sampling = _canonical(sampled, mlp)
        return DecodeGrid.apply(counts, sampling, _grid(voxels), mlp.out_dtype, *tensors, own)

    return _with_preactivation(run, mlp) if return_preactivation else run(mlp)


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
    plane_axes: PlaneAxes = checks.PLANE_AXES,
    reduce: str = "concat",
    align_corners: bool = False,
    padding_mode: str = "border",
    activation: str | Sequence[str] = "relu",
    output_activation: str = "none",
    compute_dtype: torch.dtype | str | None = None,
    noise_std: float = 0.0,
    noise_seed: int | None = None,
    noise_mode: str = "point",
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
        planes, weights, biases, box, grid, bounds, extra, plane_axes, reduce, align_corners, padding_mode, activation,
            output_activation, compute_dtype, noise_std, noise_seed, noise_mode, impl: see :func:`decode_grid`.
        target: ``(B, C_out, H, W, D)``, or the box's size in place of (H, W, D); float32, float64, float16, bfloat16, or uint8,
            which stands for value/255. It gets no gradient.
        size: ``(H, W, D)``, the whole volume. None: that of the target, if there is no box.
        loss: "smooth_l1", "l1" or "mse".
        beta: of smooth_l1, >= 0; TCAM-Diff uses 0.3. 0 gives l1.
        reduction: "mean", "sum", or "none_batch": one mean an object, ``(B,)``.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none_batch"``: float64 for float64 planes, else float32. Differentiable once
        with respect to planes, weights, biases and extra. Losses are summed in float64, gradients in float32 or better and
        divided by N last. The same bits for any number of threads.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`; ValueError also where the target
            requires a gradient.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(
        plane_axes, reduce, align_corners, padding_mode, activation, output_activation, compute_dtype, noise_std, noise_seed,
        noise_mode,
    )  # fmt: skip
    if impl == "reference":
        return reference.decode_grid_loss(
            planes,
            weights,
            biases,
            target,
            size,
            box=box,
            grid=grid,
            bounds=bounds,
            extra=extra,
            loss=loss,
            beta=beta,
            reduction=reduction,
            **options._asdict(),
        )
    target, size = checks.target_and_size(target, size, box)
    sampled, mlp = checks.decoder(
        checks.sampled(planes, options, 3), weights, biases, options, None, checks.extra_width(extra, 1)
    )
    voxels = checks.grid(sampled, size, box, grid, bounds, extra)
    objective = checks.objective(sampled, mlp, voxels, box is None, target, loss, beta, reduction)
    checks.native_limits(sampled, mlp.weights)
    own = _own(voxels, sampled)
    recording = torch.is_grad_enabled()
    grad_planes = recording and any(p.requires_grad for p in sampled.planes)
    grad_decoder = recording and any(t is not None and t.requires_grad for t in (*mlp.weights, *mlp.biases))
    grad_extra = recording and own is not None and own.requires_grad
    sampled = reference.with_texel_noise(sampled, mlp.noise, library.normals)
    tensors, counts, sampling = _canonical(sampled, mlp)
    found: Tensor = DecodeGridLoss.apply(
        counts,
        sampling,
        _grid(voxels),
        (loss, objective.beta, reduction == "none_batch"),
        objective.voxels,
        (grad_planes, grad_decoder, grad_extra),
        target,
        *tensors,
        own,
    )
    return found


def decode_points(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    xyz: Tensor,
    *,
    batch_index: Tensor | None = None,
    extra: Tensor | None = None,
    bounds: Any = None,
    plane_axes: PlaneAxes = checks.PLANE_AXES,
    reduce: str = "concat",
    align_corners: bool = False,
    padding_mode: str = "border",
    activation: str | Sequence[str] = "relu",
    output_activation: str = "none",
    return_preactivation: bool = False,
    compute_dtype: torch.dtype | str | None = None,
    noise_std: float = 0.0,
    noise_seed: int | None = None,
    noise_mode: str = "point",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Any:
    r"""Decode arbitrary points from feature planes and an MLP: :func:`decode_grid` at coordinates of the caller's.

    Points gather texels either of the planes or of the planes projected through the first layer (then that layer costs a sum
    of four texels a plane), whichever takes fewer multiply-adds. Memory beyond inputs and outputs does not depend on the number
    of points, in forward or in backward, which recomputes everything but its inputs. (``bounds``, and another dtype of xyz than
    the kernel's, make a copy of xyz.)

    Args:
        planes, weights, biases, plane_axes, reduce, align_corners, padding_mode, activation, output_activation,
            return_preactivation, compute_dtype, noise_std, noise_seed, noise_mode, out_dtype, impl: see :func:`decode_grid`.
            ``plane_axes`` may count coordinates up to 3, those of points (x, y, z, t). Point n of an object has the noise of
            voxel n of a grid; with batch_index, points are counted all together.
        xyz: ``(B, N, A)``, or any number of dimensions in place of N; A, the coordinates of a point, is 2 to 4. With
            ``batch_index`` (or B = 1) also ``(N, A)``. -1 and 1 are the edges of the planes. Interpolation is in float32 or,
            where ``compute_dtype`` is float64, in float64, whatever the dtype of xyz. NaN counts as -1; any value is safe.
        batch_index: ``(N,)`` int64, the object that each point belongs to. (Out of range: IndexError on a CPU; on CUDA, where
            checking would wait for the device, the result is NaN.)
        extra: ``(B, N, E)``, features that the first layer reads after those of the planes, such as an encoding of xyz or of a
            direction.
        bounds: numbers ``(A, 2)`` or ``(B, A, 2)``: the box, in the units of xyz, whose sides are the edges of the planes, in
            place of -1 and 1. It gets no gradient.

    Returns:
        ``(B, N, C_out)``, or ``(N, C_out)``; with ``return_preactivation`` a pair. Differentiable once with respect to planes,
        weights, biases, xyz and extra. The gradient of a coordinate beyond the planes is 0 with padding "border", as in
        ``grid_sample``. On a CPU results are the same bits for any number of threads.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(
        plane_axes, reduce, align_corners, padding_mode, activation, output_activation, compute_dtype, noise_std, noise_seed,
        noise_mode,
    )  # fmt: skip
    if impl == "reference":
        return reference.decode_points(
            planes,
            weights,
            biases,
            xyz,
            batch_index=batch_index,
            extra=extra,
            bounds=bounds,
            out_dtype=out_dtype,
            return_preactivation=return_preactivation,
            **options._asdict(),
        )
    sampled = checks.sampled(planes, options, checks.coordinates(xyz))
    sampled, mlp = checks.decoder(sampled, weights, biases, options, out_dtype, checks.extra_width(extra, -1))
    where = checks.points(sampled, xyz, batch_index, extra, bounds, library.storage_dtype(mlp.compute))
    checks.native_limits(sampled, mlp.weights)
    sampled = reference.with_texel_noise(sampled, mlp.noise, library.normals)
    own = _own(where, sampled)

    def run(mlp: checks.Decoder) -> Tensor:
        tensors, counts, sampling = _canonical(sampled, mlp)
        out: Tensor = DecodePoints.apply(counts, sampling, where.objects, mlp.out_dtype, *tensors, own, where.points)
        return out.view(*where.leading, out.shape[1])

    return _with_preactivation(run, mlp) if return_preactivation else run(mlp)


def sample_points(
    planes: Tensor | Sequence[Tensor],
    xyz: Tensor,
    *,
    batch_index: Tensor | None = None,
    bounds: Any = None,
    plane_axes: PlaneAxes = checks.PLANE_AXES,
    reduce: str = "concat",
    align_corners: bool = False,
    padding_mode: str = "border",
    impl: str = "auto",
) -> Tensor:
    """The features of the planes at points, for projects with a decoder of their own.

    Args:
        planes, xyz, batch_index, bounds, plane_axes, reduce, align_corners, padding_mode, impl: see :func:`decode_points`.

    Returns:
        ``(B, N, features)``, in the dtype of the planes; features are P C (concat) or C. Differentiable once with respect to
        planes and xyz.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`decode_grid`.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(plane_axes, reduce, align_corners, padding_mode)
    if impl == "reference":
        return reference.sample_points(
            planes,
            xyz,
            batch_index=batch_index,
            bounds=bounds,
            **options._asdict(),
        )
    sampled = checks.sampled(planes, options, checks.coordinates(xyz))
    dtype = sampled.planes[0].dtype
    checks.one_dtype(dtype, sampled.planes[0].device)
    compute = "float64" if dtype == torch.float64 else "float32"
    where = checks.points(sampled, xyz, batch_index, None, bounds, library.storage_dtype(compute))
    checks.native_limits(sampled, [])
    mlp = checks.Decoder([], [], (), "none", compute, dtype)
    tensors, counts, sampling = _canonical(sampled, mlp)
    out: Tensor = DecodePoints.apply(counts, sampling, where.objects, dtype, *tensors, None, where.points)
    if reduce == "concat_channel_major":
        out = out.unflatten(1, (len(sampled.planes), -1)).mT.flatten(1)
    return out.reshape(*where.leading, out.shape[1])


def sample_grid(
    planes: Tensor | Sequence[Tensor],
    size: Sequence[int],
    *,
    box: Sequence[Sequence[int]] | None = None,
    grid: str = "cells",
    bounds: Any = None,
    plane_axes: PlaneAxes = checks.PLANE_AXES,
    reduce: str = "concat",
    align_corners: bool = False,
    padding_mode: str = "border",
    impl: str = "auto",
) -> Tensor:
    """The features of the planes on a dense grid of voxels, for projects with a decoder of their own.

    Each plane is resampled to the grid along its two axes and then spread along the third; no coordinates are made and nothing
    is gathered a voxel.

    Args:
        planes, size, box, grid, bounds, plane_axes, reduce, align_corners, padding_mode, impl: see :func:`decode_grid`.

    Returns:
        ``(B, features, H, W, D)``, or the box's size in place of (H, W, D), in the dtype of the planes; features are P C
        (concat) or C. Differentiable any number of times with respect to planes; deterministic.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`decode_grid`.
    """
    checks.choice("impl", impl, IMPLS)
    options = checks.Options(plane_axes, reduce, align_corners, padding_mode)
    if impl == "reference":
        return reference.sample_grid(planes, size, box=box, grid=grid, bounds=bounds, **options._asdict())
    sampled = checks.sampled(planes, options, 3)
    dtype = sampled.planes[0].dtype
    checks.one_dtype(dtype, sampled.planes[0].device)
    voxels = checks.grid(sampled, size, box, grid, bounds)
    checks.native_limits(sampled, [])
    wide = torch.promote_types(dtype, torch.float32)

    def resample(x: Tensor, dim: int, axis: int, limits: Tensor | None) -> Tensor:
        lo, hi = voxels.box[axis]
        bounds = None if limits is None else limits[axis]
        y: Tensor = ResampleAxis.apply(
            x.reshape(-1, x.shape[dim], x.shape[3] if dim == 2 else 1), False, x.shape[dim], voxels.size[axis], lo, hi,
            align_corners, padding_mode, voxels.corners, bounds,
        )  # fmt: skip
        return y.view(*x.shape[:dim], hi - lo, *x.shape[dim + 1 :])

    samples = []
    for plane, (row, column) in zip(sampled.planes, sampled.plane_axes, strict=True):
        plane = plane.to(wide)
        if voxels.bounds is None:
            sample = resample(resample(plane, 2, row, None), 3, column, None)
        else:
            parts = [
                resample(resample(plane[b : b + 1], 2, row, limits), 3, column, limits)
                for b, limits in enumerate(voxels.bounds)
            ]
            shape = plane.shape[0], plane.shape[1], voxels.shape[row], voxels.shape[column]
            sample = torch.cat(parts) if parts else plane.new_zeros(shape)
        if row > column:
            sample = sample.mT
        missing = ({0, 1, 2} - {row, column}).pop()
        samples.append(sample.unsqueeze(2 + missing).expand(*plane.shape[:2], *voxels.shape))
    if reduce.startswith("concat"):
        return reference.reduce_planes([s.to(dtype) for s in samples], reduce, 1)
    features = samples[0]
    for sample in samples[1:]:  # one volume at a time
        features = features * sample if reduce == "prod" else features + sample
    return (features / len(samples) if reduce == "mean" else features).to(dtype).contiguous()


def _grid(voxels: checks.Grid) -> library.Grid:
    return library.Grid(list(voxels.size), [x for pair in voxels.box for x in pair], voxels.corners, voxels.bounds, None)


def _own(where: checks.Grid | checks.Points, sampled: checks.Sampled) -> Tensor | None:
    return None if where.extra is None else where.extra.to(sampled.planes[0].dtype)


def _with_preactivation(run: Any, mlp: checks.Decoder) -> tuple[Tensor, Tensor]:
    z = run(mlp._replace(output_activation="none", out_dtype=library.storage_dtype(mlp.compute)))
    out = activations.output("output_activation", mlp.output_activation)(z)
    return out.to(mlp.out_dtype), z.to(mlp.out_dtype)


def _canonical(sampled: checks.Sampled, mlp: checks.Decoder) -> tuple[list[Tensor | None], tuple[int, int], library.Sampling]:
    """Planes, weights and biases as the kernels take them, how many there are of the first two, and the options.

    Rows run over the lower axis, and the first layer reads plane by plane.
    """
    planes, axes, weights = [], [], list(mlp.weights)
    for p, (row, column) in zip(sampled.planes, sampled.plane_axes, strict=True):
        planes.append(p if row < column else p.mT)
        axes += sorted((row, column))
    count = len(planes)
    if sampled.reduce == "concat_channel_major" and weights:
        first, own = weights[0][:, : sampled.features], weights[0][:, sampled.features :]
        weights[0] = torch.cat((first.unflatten(1, (-1, count)).mT.flatten(1), own), 1)
    reduce = {"prod": "product", "sum": "sum", "mean": "sum"}.get(sampled.reduce, "concat")
    sampling = library.Sampling(
        axes,
        reduce if count > 1 else "concat",
        1 / count if sampled.reduce == "mean" else 1.0,
        sampled.align_corners,
        sampled.padding_mode,
        list(mlp.activation),
        mlp.output_activation,
        mlp.compute,
        mlp.noise.std if mlp.noise.mode == "point" else 0.0,
        mlp.noise.seed,
    )
    return [*planes, *weights, *mlp.biases], (count, len(weights)), sampling
