"""Losses of decoded slices that look at more than one voxel: LPIPS and SSIM."""

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
    """LPIPS with SqueezeNet (equation 4; Zhang 2018), the package lpips' own. Slices in [0, 1], one channel, become three; like
    MONAI's PerceptualLoss, and so the paper's lineage, they are not stretched to [-1, 1].

    weights: a file with torchvision's squeezenet1_1 state_dict; None: torchvision fetches it. Raises UserError where there are
    none, or where the package lpips is missing.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
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
                f"perceptual_weight: SqueezeNet's weights could not be had ({error}); fetch torchvision's squeezenet1_1 file "
                "where there is a network and name it with perceptual_weights=FILE, or take perceptual_weight=0"
            ) from error
        self.net.requires_grad_(False).eval()

    def _load(self, state: dict[str, Tensor]) -> None:
        """lpips keeps the layers "features.N" in slices, under their numbers."""
        own = self.net.net.state_dict()
        renamed = {key: state["features." + key.split(".", 1)[1]] for key in own}
        self.net.net.load_state_dict(renamed)

    def forward(self, got: Tensor, want: Tensor) -> Tensor:
        """The mean over (n, 1, rows, columns)."""
        value: Tensor = self.net(got.float().expand(-1, 3, -1, -1), want.float().expand(-1, 3, -1, -1))
        return value.mean()


def ssim2d(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of slices (n, 1, rows, columns) in [0, 1], with a gradient: Gaussian window 11 x 11, sigma 1.5, inside only.

    A slice smaller than the window has one that is cut to fit.
    """
    kernels = [gaussian(min(WINDOW, n if n % 2 else n - 1), SIGMA).to(a.device) for n in a.shape[2:]]
    return ssim_map(a.float(), b.float(), kernels).mean()
