"""The activations, by name. csrc/maths/activation.h has the same table for the kernels; an import compares their names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcam_ext import _C


class _TruncExp(torch.autograd.Function):
    """exp(x) with the gradient of exp(min(x, 15)), so that one overshooting step does not make the next explode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.clamp(max=15.0).exp()


class Formula(NamedTuple):
    """An activation as a function of z and a parameter."""

    function: Callable[[Tensor, float], Tensor]
    parameter: float | None = None  # the default; None: no parameter
    least: float | None = None  # least value of the parameter


#: Hidden activations. ``name(p)`` sets the parameter.
ACTIVATIONS: dict[str, Formula] = {
    "relu": Formula(lambda z, p: torch.relu(z)),
    "leaky_relu": Formula(F.leaky_relu, 0.01, 0.0),  # slope below zero
    "silu": Formula(lambda z, p: F.silu(z)),
    "softplus": Formula(F.softplus, 1.0, 1e-6),  # log(1 + exp(p z))/p
    "tanh": Formula(lambda z, p: torch.tanh(z)),
    "gelu": Formula(lambda z, p: F.gelu(z)),
    "sine": Formula(lambda z, p: torch.sin(p * z), 1.0),
    "half_sine": Formula(lambda z, p: (torch.sin(p * z) + 1) / 2, 1.0),
}

#: Output activations.
OUTPUT_ACTIVATIONS: dict[str, Formula] = {
    "none": Formula(lambda z, p: z),
    "sigmoid": Formula(lambda z, p: torch.sigmoid(z)),
    "clamp": Formula(lambda z, p: z.clamp(0.0, 1.0)),
    "affine_sigmoid": Formula(lambda z, p: torch.sigmoid(z) * (1 + 2 * p) - p, 0.001),  # EG3D's colours
    "softplus": Formula(lambda z, p: F.softplus(z + p), 0.0),
    "trunc_exp": Formula(lambda z, p: _TruncExp.apply(z + p), 0.0),  # gradient of exp(min(z + p, 15))
    "tanh": Formula(lambda z, p: torch.tanh(z)),
    "half_sine": Formula(lambda z, p: (torch.sin(p * z) + 1) / 2, 1.0),
}


class Activation(NamedTuple):
    """An activation of a table with its parameter; ``kind`` is its index there."""

    kind: int
    parameter: float
    function: Callable[[Tensor, float], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z, self.parameter)


def parse(argument: str, value: Any, table: dict[str, Formula]) -> Activation:
    """Parse "name" or "name(parameter)"; ``argument`` is its name in an error message."""
    name, given = value, None
    if not isinstance(value, str) or value not in table:
        match = re.fullmatch(r"(\w+)\((.+)\)", value) if isinstance(value, str) else None
        if match is None or match[1] not in table:
            raise ValueError(f"{argument}: expected one of {', '.join(table)}, got {value!r}")
        name, given = match.groups()
    formula = table[name]
    parameter = formula.parameter
    if given is not None:
        if parameter is None:
            raise ValueError(f"{argument}: {name} takes no parameter, got {value!r}")
        try:
            parameter = float(given)
        except ValueError:
            parameter = math.nan
        if not math.isfinite(parameter) or (formula.least is not None and parameter < formula.least):
            least = "" if formula.least is None else f" of at least {formula.least:g}"
            raise ValueError(f"{argument}: expected {name}(p) with a number p{least}, got {value!r}")
    return Activation(list(table).index(name), 0.0 if parameter is None else parameter, formula.function)


def hidden(argument: str, value: str) -> Activation:
    return parse(argument, value, ACTIVATIONS)


def output(argument: str, value: str) -> Activation:
    return parse(argument, value, OUTPUT_ACTIVATIONS)


def hidden_layers(activation: Any, layers: int) -> tuple[str, ...]:
    """The activation of each hidden layer, checked, from one name for all or one for each."""
    if isinstance(activation, str):
        hidden("activation", activation)
        return (activation,) * layers
    if not isinstance(activation, Sequence) or len(activation) != layers:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, or one for each of {layers} hidden layers, got {activation!r}")
    for i, name in enumerate(activation):
        hidden(f"activation[{i}]", name)
    return tuple(activation)


class Elementwise(nn.Module):
    """A hidden activation as a module, for ``nn.Sequential``."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self._apply_to = hidden("activation", activation)

    def forward(self, z: Tensor) -> Tensor:
        return self._apply_to(z)

    def extra_repr(self) -> str:
        return self.activation


if tuple(ACTIVATIONS) != _C.activations or tuple(OUTPUT_ACTIVATIONS) != _C.output_activations:
    raise ImportError("tcam_ext: the compiled module has a different table of activations; install again with `pip install .`")
