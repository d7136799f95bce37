"""Figures printed in the paper (Zhang, Ehinger, Drummond, AAAI 2025), to stand beside measured ones and apart from them."""

from __future__ import annotations

from typing import Any

from tcam_diff.evaluation.metrics import psnr_of_mse

#: Headings and rows of each table, as printed, on the data sets of the paper.
TABLES: dict[int, tuple[str, list[str], list[list[str]]]] = {
    1: (
        "Reconstruction, BraTS 128³, FLAIR; whether of training or other volumes is not said",
        ["model", "MSE", "SSIM", "training"],
        [
            ["TCAM-Diff, latents 3 x (42, 64, 64)", "0.0008", "0.9311", "1 GPU, 8 h"],
            ["VAE-GAN*, latents 2 x (8, 32, 32, 32)", "0.0014", "0.8818", "4 GPUs, 38.5 h"],
            ["VQ-GAN*, latents (16, 32, 32, 32)", "0.0045", "0.8785", "36 h"],
        ],
    ),
    2: (
        "F1 of the segmentation of reconstructions, BraTS of 4 channels; the reference is not said",
        ["model", "ED", "NCR/NET", "ET"],
        [["TCAM-Diff", "0.950", "0.927", "0.935"], ["VQ-GAN", "0.782", "0.668", "0.733"]],
    ),
    3: (
        "Distance by a critic for each pair of generators; values of different pairs are not comparable",
        ["pair", "TCAM-Diff", "rival"],
        [["VAE-GAN + 3D LDM", "36 ± 4", "120 ± 20"], ["VQ-GAN + 3D LDM", "16 ± 5", "160 ± 20"]],
    ),
    4: (
        "Latents against quality, BraTS 128³",
        ["latents", "MSE", "SSIM"],
        [["245,760", "0.0014", "0.8985"], ["516,096", "0.0008", "0.9311"], ["524,288, VAE-GAN*", "0.0014", "0.8818"]],
    ),
}

#: Points of rate against quality that others published, for table 4: latents and voxels of a volume, and PSNR in dB.
#: Those of the paper are 10 log10(1 / MSE) of its printed MSE.
PUBLISHED: list[dict[str, Any]] = [
    {"model": "MAISI VAE", "data": "BraTS18, 128³", "latents": 131_000, "voxels": 128**3, "psnr": 39.0},
    *(
        {"model": f"{model} (paper)", "data": "BraTS, FLAIR, 128³", "latents": n, "voxels": 128**3, "psnr": psnr_of_mse(mse)}
        for model, n, mse in (
            ("TCAM-Diff, C = 20", 245_760, 0.0014),
            ("TCAM-Diff, C = 42", 516_096, 0.0008),
            ("VAE-GAN*", 524_288, 0.0014),
            ("VQ-GAN*", 524_288, 0.0045),
        )
    ),
]
