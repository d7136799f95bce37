"""Losses of decoded slices that depend on neighbourhoods: LPIPS and SSIM."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import SIGMA, WINDOW, gaussian, ssim_map


class Perceptual(nn.Module):
    """Perceptual distance of slices with SqueezeNet from the package lpips: LPIPS (Zhang 2018), or equation 4.

    The channel of slices in [0, 1] is repeated three times. As in MONAI's PerceptualLoss, it is not rescaled to [-1, 1].

    Args:
        weights: a file with torchvision's squeezenet1_1 state_dict; None: torchvision downloads it.
        mode: "lpips"; "eq4": the sum over layers of the mean squared differences of features, without LPIPS's weights.

    Raises:
        UserError: the package lpips or the weights are missing.
    """

    def __init__(self, weights: str | None = None, mode: str = "lpips") -> None:
        super().__init__()
        self.mode = mode
        try:
            import lpips
        except ImportError as error:
            raise UserError(
                f"perceptual_weight: needs the package lpips and a torchvision that fits torch {torch.__version__} ({error}): "
                "pip install lpips; or take perceptual_weight=0"
            ) from error
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"perceptual_weights: {weights}: no such file")
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                self.net = lpips.LPIPS(net="squeeze", verbose=False, pnet_rand=weights is not None)
                if weights is not None:
                    self._load(torch.load(weights, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(
                f"perceptual_weight: SqueezeNet's weights could not be loaded ({error}); download torchvision's squeezenet1_1 "
                "file on a machine with a network and pass it as perceptual_weights=FILE, or take perceptual_weight=0"
            ) from error
        self.net.requires_grad_(False).eval()

    def _load(self, state: dict[str, Tensor]) -> None:
        """Load torchvision's state: lpips names the layers "features.N" "sliceM.N"."""
        network = self.net.net
        network.load_state_dict({key: state["features." + key.split(".", 1)[1]] for key in network.state_dict()})

    def forward(self, got: Tensor, want: Tensor) -> Tensor:
        """Mean distance of slices (n, 1, rows, columns)."""
        a, b = (x.float().expand(-1, 3, -1, -1) for x in (got, want))
        if self.mode == "eq4":
            layers = [self.net.net(self.net.scaling_layer(x)) for x in (a, b)]
            return torch.stack([(p - q).square().mean() for p, q in zip(*layers, strict=True)]).sum()
        value: Tensor = self.net(a, b)
        return value.mean()


def ssim2d(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of slices (n, 1, rows, columns) in [0, 1]. Differentiable.

    The window is Gaussian, 11 x 11 with sigma 1.5, and stays inside the slice. Along an axis shorter than 11 it is the largest
    odd number of pixels that fits.
    """
    kernels = [gaussian(min(WINDOW, n if n % 2 else n - 1), SIGMA).to(a.device) for n in a.shape[2:]]
    return ssim_map(a.float(), b.float(), kernels).mean()
