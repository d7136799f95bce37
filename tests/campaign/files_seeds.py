"""Small sound files from which the damaged ones are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from files_mutate import Files, files_of, pack
from shards import ROOT

#: Files that earlier versions wrote.
KEPT = ROOT / "tests" / "tcam_diff" / "data"


def make_seeds(kind: str, folder: Path) -> None:
    """Write the sound cases of a kind to ``folder``, with what its oracle needs beside them."""
    folder.mkdir(parents=True)
    for number, files in enumerate({
        "nifti": nifti, "dicom": dicom, "yaml": yaml, "safetensors": safetensors, "checkpoint": checkpoint, "store": store
    }[kind](folder)):  # fmt: skip
        (folder / f"{number:02d}.case").write_bytes(pack(files))


def nifti(folder: Path) -> Iterator[Files]:
    import nibabel as nib

    rng, work = np.random.default_rng(0), folder / "nifti"
    work.mkdir()
    oblique = np.array([[0.9, 0.1, 0.3, -20.0], [-0.1, 1.8, 0.2, 7.0], [-0.2, 0.3, 2.9, 3.0], [0, 0, 0, 1]])

    def save(name: str, data: np.ndarray, slope: float | None = None, units: str = "mm", kind: Any = nib.Nifti1Image) -> Files:
        image = kind(data, oblique)
        image.header.set_xyzt_units(units, "sec")
        image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), 1)
        image.set_sform(oblique, 2)
        image.header.set_slope_inter(slope, None if slope is None else -3)
        nib.save(image, work / name)
        return {name: (work / name).read_bytes()}

    integers = rng.integers(-500, 500, (4, 5, 6)).astype(np.int16)
    image, label = (
        save("a.nii", rng.random((4, 5, 6), np.float32)),
        save("l.nii", rng.integers(0, 3, (4, 5, 6)).astype(np.uint8)),
    )
    yield image
    yield save("a.nii.gz", integers, 0.5)
    yield save("a.nii", rng.random((3, 4, 5, 2), np.float32), units="micron")
    yield save("a.nii", integers.astype(">i2"), 2.0, "meter")
    yield save("a.nii", rng.random((4, 3, 2)), kind=nib.Nifti2Image)
    both = image | label | save("b.nii.gz", rng.random((4, 5, 6), np.float32))
    listed = {"training": [{"image": ["a.nii", "b.nii.gz"], "label": "l.nii"}], "validation": [{"image": "a.nii", "name": "v"}]}
    yield {"list.json": json.dumps(listed).encode(), **both}
    yield {
        "dataset.json": json.dumps(listed | {"test": ["a.nii"]})
        .replace('"v"', '"w"')
        .replace('["a.nii"]', '["b.nii.gz"]')
        .encode()
    } | both
    yield {"table.csv": b"name,image,label,split\nc,a.nii;b.nii.gz,l.nii,train\nd,b.nii.gz,,test\n", **both}


def dicom(folder: Path) -> Iterator[Files]:
    import pydicom
    import test_dicom as made

    data = made.VOXELS[:4, :3, :3]
    made.write_series(folder / "ct", data)
    yield files_of(folder / "ct")
    made.write_series(folder / "tilted", data, step=(0.0, 0.4, 3.0), names="{:d}", RescaleSlope=lambda k: 1.0 + k)
    yield {f"{name}.dcm": content for name, content in files_of(folder / "tilted").items()}

    def packed(s: Any) -> None:
        s.compress(pydicom.uid.RLELossless)

    for k in range(2):
        made.write_slice(folder / "rle" / f"{k}.dcm", data[:, :, k].T, (0, 0, 3.0 * k), change=packed)
    yield files_of(folder / "rle")
    made.write_enhanced(folder / "enhanced" / "e.dcm", data)
    yield files_of(folder / "enhanced")


def yaml(folder: Path) -> Iterator[Files]:
    for path in sorted((ROOT / "python/tcam_diff/configs").glob("*.yaml")):
        kind, text = path.name.split("-")[0], path.read_text()
        needed = {"train": "\ndata: store\n", "diffusion": "\nlatents: set\n"}.get(kind, "")
        yield {f"{kind}.yaml": (text + needed).encode()}
    yield {"sample.yaml": b"solver: ab2\nsteps: 7\nhot_k: 1\nfinal: x\nguidance_scale: 1.5\nseed: 3\n"}


def safetensors(folder: Path) -> Iterator[Files]:
    for name in ("fitted", "latents", "model"):
        yield files_of(KEPT / name)
    yield files_of(fitted(folder / "fitted"))
    yield files_of(latents(folder / "latents"))


def fitted(folder: Path) -> Path:
    from runs import blobs
    from tcam_diff.autodecoder import artefact
    from tcam_diff.autodecoder.config import FitConfig
    from tcam_diff.autodecoder.fit import fit_volume
    from tcam_diff.data.volume import Volume, VolumeInfo

    volume = Volume(blobs(0, (6, 5, 4)), VolumeInfo(channels=1, shape=(6, 5, 4), affine=np.diag([1.0, 2.0, 3.0, 1.0])))
    config = FitConfig.load("fast", ["channels=2", "widths=[4]", "steps=2", "voxels_per_step=8"])
    artefact.save(folder, *fit_volume(volume, config))
    return folder


def latents(folder: Path) -> Path:
    from runs import make_latents

    return make_latents(folder, 3, (4, 3, 4))


def checkpoint(folder: Path) -> Iterator[Files]:
    """Runs of both stages, stopped after two steps. The oracle resumes them with the same data."""
    from files_folders import diffusion_config, train_config
    from runs import make_store
    from tcam_diff.autodecoder.train import train_autodecoder
    from tcam_diff.diffusion.train import train_diffusion

    make_store(folder / "store", 2, 0, (6, 5, 4))
    latents(folder / "latents")
    for name, train, config in (
        ("stage1", train_autodecoder, train_config(folder)),
        ("stage2", train_diffusion, diffusion_config(folder)),
    ):
        asked = iter(range(3))
        train(config, folder / name, stop=lambda asked=asked: next(asked) == 2)  # type: ignore[operator]
        for path in (folder / name).iterdir():
            if path.name not in ("config.yaml", "checkpoints", "metrics.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield files_of(folder / name)


def store(folder: Path) -> Iterator[Files]:
    from runs import make_store

    make_store(folder / "store", 2, 1, (4, 5, 3))
    yield files_of(folder / "store")
    yield files_of(KEPT / "store")
    yield files_of(KEPT / "store-3")
