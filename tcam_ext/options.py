"""The options of every op, once: names, types, defaults, meaning.

The ops take them as ``**options: Unpack[Decoding]``, which a type checker reads; :func:`takes` writes them out for ``help()``
and editors, and :func:`resolve` makes the record of a call's.
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
    align_corners: bool
    padding_mode: str


class Decoding(Sampling, total=False):
    """And how their features are decoded."""

    activation: str | Sequence[str]
    output_activation: str
    compute_dtype: torch.dtype | str | None
    noise_std: float
    noise_seed: int | None
    noise_mode: str


class GridOptions(Decoding, total=False):
    """What :func:`tcam_ext.decode_grid` takes by name."""

    box: Sequence[Sequence[int]] | None
    grid: str
    bounds: Any
    extra: torch.Tensor | None
    return_preactivation: bool
    out_dtype: torch.dtype | None
    impl: str


class PointOptions(Decoding, total=False):
    """What :func:`tcam_ext.decode_points` takes by name."""

    batch_index: torch.Tensor | None
    extra: torch.Tensor | None
    bounds: Any
    return_preactivation: bool
    out_dtype: torch.dtype | None
    impl: str


class LossOptions(Decoding, total=False):
    """What :func:`tcam_ext.decode_grid_loss` takes by name."""

    box: Sequence[Sequence[int]] | None
    grid: str
    bounds: Any
    extra: torch.Tensor | None
    loss: str
    beta: float
    reduction: str
    impl: str


class Options(NamedTuple):
    """The options of the ops. :func:`tcam_ext.sample_grid` and :func:`tcam_ext.sample_points` take the first four.

    Args:
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
    """

    plane_axes: Sequence[tuple[int, int]] = PLANE_AXES
    reduce: str = "concat"
    align_corners: bool = False
    padding_mode: str = "border"
    activation: str | Sequence[str] = "relu"
    output_activation: str = "none"
    compute_dtype: torch.dtype | str | None = None
    noise_std: float = 0.0
    noise_seed: int | None = None
    noise_mode: str = "point"


def resolve(known: type[Sampling], given: Any) -> Options:
    """``given`` with the defaults. Raises TypeError where a name is not one of ``known``."""
    if unknown := set(given) - set(known.__annotations__):
        raise TypeError(f"{min(unknown)}: no such option; expected {', '.join(known.__annotations__)}")
    return Options(**given)


def takes(known: type[Sampling], **other_defaults: Any) -> Callable[[F], F]:
    """Give an op that has ``**options`` a signature that names each of ``known``, and its docstring their names for "<options>"
    and, for a line "<meaning of options>", what they mean."""
    names = list(known.__annotations__)
    defaults = Options._field_defaults | other_defaults

    def named(op: F) -> F:
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

    return named


def with_decoder(op: Callable[..., Any]) -> Callable[[F], F]:
    """Give a method of a decoder the signature of ``op`` without the decoder's tensors."""

    def named(method: F) -> F:
        signature = inspect.signature(op)
        mine = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = [p for p in signature.parameters.values() if p.name not in ("weights", "biases")]
        method.__signature__ = signature.replace(parameters=[mine, *others])  # type: ignore[attr-defined]
        return method

    return named


def documented(text: str, names: Sequence[str]) -> str:
    """A docstring with the options in place of "<options>" and "<meaning of options>"."""
    meaning = (Options.__doc__ or "").split("Args:\n", 1)[-1].rstrip()
    text = re.sub(r" *<meaning of options>\n", lambda _: meaning + "\n", text)
    return _wrapped(text.replace("<options>", ", ".join(names)))


def _wrapped(text: str) -> str:
    """Argument lists that have become too long, broken after commas."""

    def fold(line: str) -> str:
        if len(line) <= 128:
            return line
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        at = line.rfind(", ", 0, 127)
        return line if at < 0 else line[: at + 1] + "\n" + fold(indent + line[at + 2 :])

    return "\n".join(fold(line) for line in text.split("\n"))
