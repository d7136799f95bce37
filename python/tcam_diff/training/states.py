"""States of modules and of optimisers in checkpoints. Those of modules are not converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tcam_diff.training.muon import Muon


def load_module(module: nn.Module, state: dict[str, Any]) -> None:
    """Load the state of a module of the same types. Raises ValueError or RuntimeError if it does not fit."""
    for key, own in module.state_dict().items():
        if state[key].dtype != own.dtype:
            raise ValueError(f"{key}: expected {own.dtype}, got {state[key].dtype}")
    module.load_state_dict(state)


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an Adam or a Muon with the same settings. Raises ValueError if it does not fit the parameters."""
    before = optimiser.state_dict()["param_groups"]
    for own, given in zip(before, state["param_groups"], strict=True):
        for key in (own.keys() & given.keys()) - {"lr"}:  # set before every step
            if given[key] != own[key]:
                raise ValueError(f"{key} of the optimiser is {given[key]}, expected {own[key]}")
    optimiser.load_state_dict(state)
    for group, own in zip(optimiser.param_groups, before, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})
        for parameter in group["params"]:
            if isinstance(optimiser, Muon):
                shapes = {"momentum_buffer": parameter.shape}
            else:
                shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            moments = optimiser.state.get(parameter)
            if moments and (
                moments.keys() != shapes.keys()
                or any(moments[k].shape != shape or not moments[k].isfinite().all() for k, shape in shapes.items())
            ):
                raise ValueError("the moments of the optimiser are not those of its parameters")
