"""Base of trainings of plain networks, on one process: their state is that of modules and of Adam optimisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tcam_diff.errors import UserError
from tcam_diff.training.config import RunConfig
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Task
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.states import load_module, load_optimiser


class NetworksTask(Task):
    """Training of modules, which subclasses put into ``modules`` and ``optimisers`` under the names of their states.

    Args:
        config: configuration of the run.
        group: the processes, of which there must be one.
        data: digest of the data; a run continues only with the same.

    Raises:
        UserError: there are several processes.
    """

    def __init__(self, config: RunConfig, group: Distributed, data: str) -> None:
        if group.world > 1:
            raise UserError(f"torchrun: this training runs on one process, got {group.world}")
        self.run_config, self.group, self.steps, self.data = config, group, config.steps, data
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Adam] = {}

    def adam(self, name: str, module: nn.Module, lr: float, beta1: float = 0.9, weight_decay: float = 0.0) -> torch.optim.Adam:
        """Adam of a module, kept under a name."""
        c = self.run_config
        self.optimisers[name] = torch.optim.Adam(
            module.parameters(), lr=lr, betas=(beta1, c.beta2), eps=c.adam_eps, weight_decay=weight_decay, fused=True
        )
        return self.optimisers[name]

    def update(self, name: str, loss: torch.Tensor, lr: float, step: int, clip: float | None = None) -> None:
        """One step of an optimiser, at the schedule's rate, with gradients of norm ``clip`` at most."""
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_((p for g in optimiser.param_groups for p in g["params"]), clip)
        for parameters in optimiser.param_groups:
            parameters["lr"] = lr * lr_scale(self.run_config, step)
        optimiser.step()

    def shared_state(self) -> dict[str, Any]:
        return {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "data": self.data,
        }

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        if shared["data"] != self.data:
            raise UserError("data: not the volumes with which the run began")
        for name, module in self.modules.items():
            load_module(module, shared["modules"][name])
        for name, optimiser in self.optimisers.items():
            load_optimiser(optimiser, shared["optimisers"][name])

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for m in self.modules.values() for p in m.parameters())
