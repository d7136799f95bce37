"""Copies of models to give away: small files, and a model card."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tcam_diff.diffusion.model import INDEX, TriplaneDiffusion, read_index
from tcam_diff.diffusion.spacing import of_volume
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
        UserError: there is no model, the type is another, or ``out`` exists and is neither empty nor a copy of this model.
    """
    if dtype not in TYPES:
        raise UserError(f"dtype: expected {' or '.join(TYPES)}, got {dtype}")
    model, target = TriplaneDiffusion.load(folder), Path(out)
    if target.exists() and not _is_copy(target, model.identity):
        raise UserError(f"{out}: exists, and is no copy of this model; choose another folder")
    model.provenance["copy_of"] = model.identity
    text = card(model, target.resolve().name, note)
    with locked_folder(target):
        model.save(target, TYPES[dtype])
        write_text(target / CARD, text)
    return sum(p.stat().st_size for p in target.iterdir())


def _is_copy(folder: Path, identity: str) -> bool:
    """Whether a folder is empty, or has a copy of the model with this identity."""
    if not folder.is_dir():
        return False
    if not (folder / INDEX).is_file():
        return not any(folder.iterdir())
    return bool(read_index(folder)["provenance"].get("copy_of") == identity)


def card(model: TriplaneDiffusion, name: str, note: str = "") -> str:
    """Model card in Markdown: what the model draws, how it was trained, how it is used, and ``note``."""
    info, c, s, p = model.geometry.info, model.config, model.stage1, model.provenance
    voxels = " x ".join(f"{n:.3g}" for n in of_volume(info))
    about = [f"of {voxels} mm" if model.spacings is None else f"of sizes as in training, about {voxels} mm (`--spacing`)"]
    about += [f"{info.images} channel(s)"]
    about += [f"classes {', '.join(model.geometry.classes)}"] if model.geometry.classes else []
    about += [f"label maps {', '.join(info.label_maps)} (`--labels`)"] if info.label_maps else []
    planes = ", ".join(size_text(n) for n in model.geometry.sizes)
    parameters = sum(t.numel() for t in model.network.parameters()) / 1e6
    prior = c.prior if c.prior != "gaussian" or model.prior is None else f"{len(model.prior.directions)} principal directions"
    steps = f"{p.get('step', '?')} steps of {c.batch}"
    steps += f", then distilled for {p.get('distilled_steps', '?')} steps" if model.consistency else ""
    how = "--solver consistency --steps 2" if model.consistency else "--steps 25"
    kind = "Consistency model" if model.consistency else "Diffusion model"
    lines = [
        f"# {name}",
        "",
        f"{kind} of triplanes with its decoder (TCAM-Diff, AAAI 2025, as implemented in tcam_ext).",
        "",
        f"* **Draws** volumes of {size_text(info.shape)} voxels, {', '.join(about)}; or of others (`--size`).",
        f"* **Planes** {planes} with {model.channels} channels, of a decoder of widths {', '.join(map(str, s.widths))}.",
        f"* **Network** of {parameters:.2f} M parameters, {c.network.weights} weights, {c.network.cross} cross-attention; "
        f"prior: {prior}.",
        f"* **Trained** on {p.get('volumes', '?')} volumes for {steps}.",
        "",
        "```",
        f"tcam sample {name} --n 4 {how} --out SAMPLES",
        "```",
        "",
        "Drawn volumes may resemble training volumes: `tcam evaluate STORE SAMPLES` lists the nearest. They are for research, "
        "not for diagnosis.",
    ]
    return "\n".join([*lines, *(["", note.strip()] if note.strip() else []), ""])
