"""Copies of models to give away: small files, and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from tcam_diff.diffusion.model import INDEX, TriplaneDiffusion, find_model
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder, write_text
from tcam_diff.pretrained import CARD
from tcam_diff.text import size_text

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_model(folder: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str = "bfloat16", note: str = "") -> int:
    """Write a model with weights of a type, and a model card.

    Args:
        folder: run of stage 2 or of a distillation, or a model's folder.
        out: folder of the copy, from which ``TriplaneDiffusion.load`` reads.
        dtype: float32, or bfloat16, with half of the size. Weights are rounded; statistics and the decoder stay in float32.
        note: text of the card about data, training and licence, in Markdown.

    Returns:
        Bytes of the copy.

    Raises:
        UserError: there is no model, the type is another, or ``out`` is the model's own folder or has another model.
    """
    if dtype not in TYPES:
        raise UserError(f"dtype: expected {' or '.join(TYPES)}, got {dtype}")
    source, target = find_model(Path(folder)), Path(out)
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{out}: is the model's own folder; choose another one")
    model = TriplaneDiffusion.load(source)
    with locked_folder(target):
        index = target / INDEX
        if index.is_file() and json.loads(index.read_text())["provenance"].get("copy_of") != model.identity:
            raise UserError(f"{out}: has another model; choose another folder")
        model.provenance["copy_of"] = model.identity
        model.save(target, TYPES[dtype])
        write_text(target / CARD, card(model, target, note))
    return sum(p.stat().st_size for p in target.iterdir())


def card(model: TriplaneDiffusion, folder: Path, note: str = "") -> str:
    """Model card in Markdown: what the model draws, how it was trained, how it is used, and ``note``."""
    info, c, s, p = model.geometry.info, model.config, model.stage1, model.provenance
    spacing = np.linalg.norm(info.affine[:3, :3], axis=0)
    classes = f", classes {', '.join(model.geometry.classes)}" if model.geometry.classes else ""
    maps = f", label maps {', '.join(info.label_maps)}" if info.label_maps else ""
    planes = ", ".join(size_text(n) for n in model.geometry.sizes)
    parameters = sum(t.numel() for t in model.network.parameters()) / 1e6
    prior = "none" if model.prior is None else f"{c.prior}, {len(model.prior.directions)} principal directions"
    how = "--solver consistency --steps 2" if model.consistency else "--steps 25"
    kind = "Consistency model" if model.consistency else "Diffusion model"
    lines = [
        f"# {folder.resolve().name}",
        "",
        f"{kind} of triplanes with its decoder (TCAM-Diff, AAAI 2025, as implemented in tcam_ext).",
        "",
        f"* **Draws** volumes of {size_text(info.shape)} voxels of {' x '.join(f'{n:.3g}' for n in spacing)} mm, "
        f"{info.channels} channel(s){classes}{maps}, or of any other number of voxels (`--size`).",
        f"* **Planes** {planes} with {model.channels} channels, of a decoder of widths {', '.join(map(str, s.widths))}.",
        f"* **Network** of {parameters:.2f} M parameters; prior: {prior}.",
        f"* **Trained** on {p['volumes']} volumes for {p['step']} steps of {c.batch}; {c.network.weights} weights, "
        f"{c.network.cross} cross-attention.",
        "",
        "```",
        f"tcam sample {folder.name} --n 4 {how} --out SAMPLES",
        "```",
        "",
        "Drawn volumes may resemble training volumes: `tcam evaluate STORE SAMPLES` lists the nearest. They are for research, "
        "not for diagnosis.",
    ]
    return "\n".join([*lines, *(["", note.strip()] if note.strip() else []), ""])
