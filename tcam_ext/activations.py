"""The activations, by name. csrc/maths/activation.h is the same table for the kernels; the two are compared here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcam_ext import _C

#: Hidden activations and what they compute.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below zero
    "silu": F.silu,
    "softplus": F.softplus,  # beta 1, threshold 20
    "tanh": torch.tanh,
}

#: Output activations.
OUTPUT_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "sigmoid": torch.sigmoid,
    "clamp": lambda z: z.clamp(0.0, 1.0),
}

#: The modules that nn.Sequential holds for each hidden activation.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}

if tuple(ACTIVATIONS) != _C.activations or tuple(OUTPUT_ACTIVATIONS) != _C.output_activations:
    raise ImportError("tcam_ext: the compiled part has another table of activations; install again with `pip install .`")
