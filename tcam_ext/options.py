"""The options of the ops: names, types, defaults, meaning.

The ops take them as ``**options: Unpack[Decoding]``, which a type checker reads. :func:`takes` writes them into an op's
signature for ``help()`` and editors. :func:`resolve` adds the defaults to the options of a call.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

PLANE_AXES = ((0, 1), (1, 2), (0, 2))


class Sampling(TypedDict, total=False):
    """How planes are sampled; see :class:`Options`."""

    plane_axes: Sequence[tuple[int, int]]
    reduce: str
    groups: Sequence[int] | None
    align_corners: bool
    padding_mode: str


class Decoding(Sampling, total=False):
    """How planes are sampled and their features decoded; see :class:`Options`."""

    skips: Sequence[int]
    activation: str | Sequence[str]
    output_activation: str
    compute_dtype: torch.dtype | str | None
    noise_std: float
    noise_seed: int | None
    noise_mode: str


class GridOptions(Decoding, total=False):
    """The keyword arguments of :func:`tcam_ext.decode_grid`."""

    box: Sequence[Sequence[int]] | None
    grid: str
    bounds: Any
    extra: torch.Tensor | None
    return_preactivation: bool
    out_dtype: torch.dtype | None
    impl: str


class PointOptions(Decoding, total=False):
    """The keyword arguments of :func:`tcam_ext.decode_points`."""

    batch_index: torch.Tensor | None
    extra: torch.Tensor | None
    bounds: Any
    return_preactivation: bool
    out_dtype: torch.dtype | None
    impl: str


class LossOptions(Decoding, total=False):
    """The keyword arguments of :func:`tcam_ext.decode_grid_loss`."""

    box: Sequence[Sequence[int]] | None
    grid: str
    bounds: Any
    extra: torch.Tensor | None
    loss: str
    beta: float
    reduction: str
    impl: str


class Options(NamedTuple):
    """The options of the ops. :func:`tcam_ext.sample_grid` and :func:`tcam_ext.sample_points` take the first five.

    Args:
        plane_axes: for each plane the coordinate (0: x, 1: y, 2: z) that runs over its rows and the one over its columns.
            Pairs may repeat, also swapped. :mod:`tcam_ext.conventions` has the pairs of other projects.
        reduce: the first layer reads the planes' features one plane after the other ("concat"), one channel after the other
            ("concat_channel_major", feature c P + p), or their "sum", "mean" or product ("prod"). The product does not commute
            with the first layer: each point's or voxel's product is multiplied by W_1.
        groups: numbers of planes, which follow one another, to be added or multiplied ("sum", "mean", "prod") apart: the first
            layer reads the features of one group after the other. None: all planes are one group. K-Planes at two scales are
            six planes with reduce="prod" and groups=(3, 3). Planes may differ in size, not in channels.
        align_corners: as in ``grid_sample``: -1 and 1 are the centres (True) or the outer edges (False) of the outer texels.
        padding_mode: "border", "zeros" or "reflection", as in ``grid_sample``.
        skips: indices of weights, ascending from 1, of hidden layers that read the features (with ``extra`` and noise) before
            the hidden layer below, h_(i+1) = a(W_i [f, h_i] + b_i), with weights[i] of shape (n_(i+1), features + n_i). The
            kernels project the features once for all layers that read them; these have up to 512 outputs together, where
            those of each but the last count as a multiple of 32.
        activation: of the hidden layers, one name for all or one for each: relu, leaky_relu (0.01), silu, softplus, tanh, gelu,
            sine, half_sine ((sin z + 1)/2). ``name(p)`` sets the slope of leaky_relu, beta of softplus (log(1 + exp(p z))/p) or
            the frequency of the sines (sin(p z)).
        output_activation: none, sigmoid, clamp (to [0, 1]), affine_sigmoid (sigmoid(z)(1 + 2p) - p, p = 0.001: EG3D), softplus
            (of z + p, p = 0), trunc_exp (exp(z + p), p = 0, with the gradient of exp(min(z + p, 15))), tanh,
            half_sine ((sin(p z) + 1)/2); ``name(p)``.
        compute_dtype: of the products above the first layer: a floating dtype or "tf32". None: autocast's dtype under autocast,
            else the dtype of the planes. Sums are always in float32 or float64. On a CPU, bfloat16 uses bfloat16 products if
            the machine has them (AMX or AVX512_BF16), else float32; float16 and "tf32" use float32. On a CPU it also holds for
            the first layer of a grid whose planes are multiplied, unless :func:`explain` says that the grid is decoded voxel by
            voxel. On CUDA, fused kernels
            with bfloat16 or float16 products serve relu decoders with 3 to 5 layers, hidden widths up to 128 and C_out up to 4
            (gradients with widths above 64 need up to 216 KB of shared memory a block: Hopper, B200). Other decoders use
            TensorFloat-32 products, which round as float16 does; :func:`explain` tells which kernels a call uses, and why. None
            with float32 tensors on CUDA follows ``torch.backends.cuda.matmul.fp32_precision``.
        noise_std: >= 0. The decoder reads f + noise_std eps in place of the features f, with eps standard normal. TCAM-Diff
            regularises training with it (equation 7; noise_std = 0.32).
        noise_seed: 0 to 2^63 - 1, required with noise_std > 0. Equal seeds give equal noise on every device, for any box and
            any number of threads; use a new seed for each training step. (A CUDA graph repeats the seed of its capture.)
        noise_mode: "point" draws eps for each voxel and feature, as in equation 7; each voxel then costs the generation of eps
            and a product of its features with W_1, in forward and again in backward. "texel" adds noise to the texels of the
            planes, up to 31, at no cost a voxel; neighbouring voxels share it. Extra features get no noise.
    """

    plane_axes: Sequence[tuple[int, int]] = PLANE_AXES
    reduce: str = "concat"
    groups: Sequence[int] | None = None
    align_corners: bool = False
    padding_mode: str = "border"
    skips: Sequence[int] = ()
    activation: str | Sequence[str] = "relu"
    output_activation: str = "none"
    compute_dtype: torch.dtype | str | None = None
    noise_std: float = 0.0
    noise_seed: int | None = None
    noise_mode: str = "point"


def resolve(known: type[Sampling], given: Any) -> Options:
    """The options ``given``, with defaults for the others. Raises TypeError if a name is not in ``known``."""
    if unknown := set(given) - set(known.__annotations__):
        raise TypeError(f"{min(unknown)}: no such option; expected {', '.join(known.__annotations__)}")
    return Options(**given)


def takes(known: type[Sampling], **other_defaults: Any) -> Callable[[F], F]:
    """A decorator for an op with ``**options``: its signature names each option of ``known``, and its docstring has their names
    for "<options>" and their meaning for a line "<meaning of options>"."""
    names = list(known.__annotations__)
    defaults = Options._field_defaults | other_defaults

    def decorate(op: F) -> F:
        signature = inspect.signature(op)
        types = Options.__annotations__
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                n,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults[n],
                annotation=getattr(types[n], "__forward_arg__", types[n]),
            )
            for n in names
        ]
        op.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        op.__doc__ = documented(op.__doc__ or "", names)
        return op

    return decorate


def with_decoder(op: Callable[..., Any]) -> Callable[[F], F]:
    """A decorator for a method of a decoder: the signature of ``op`` without weights and biases."""

    def decorate(method: F) -> F:
        signature = inspect.signature(op)
        mine = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = [p for p in signature.parameters.values() if p.name not in ("weights", "biases")]
        method.__signature__ = signature.replace(parameters=[mine, *others])  # type: ignore[attr-defined]
        return method

    return decorate


def documented(text: str, names: Sequence[str]) -> str:
    """A docstring in which the options replace "<options>" and "<meaning of options>"."""
    meaning = (Options.__doc__ or "").split("Args:\n", 1)[-1].rstrip()
    text = re.sub(r" *<meaning of options>\n", lambda _: meaning + "\n", text)
    return _wrapped(text.replace("<options>", ", ".join(names)))


def _wrapped(text: str) -> str:
    """The text with lists of arguments longer than a line broken after commas."""

    def fold(line: str) -> str:
        if len(line) <= 128:
            return line
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        at = line.rfind(", ", 0, 127)
        return line if at < 0 else line[: at + 1] + "\n" + fold(indent + line[at + 2 :])

    return "\n".join(fold(line) for line in text.split("\n"))
