"""Synthetic cohort of brains with lesions, made from the MNI152 template and its tissue maps.

Each case is the template under a random affine map and a random smooth deformation, with one or two lesions, skull-stripped.
Its four modalities have random contrasts, bias fields and noise. Layout, channels and labels are those of the Medical
Segmentation Decathlon's Task01. The cohort is a test bed: it shows no patient's anatomy.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tcam_diff.data.nifti import Quantiser, write_volume
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder, write_text
from tcam_diff.processes import map_on_processes

Array = NDArray[np.float32]

#: Channels and labels of Task01.
MODALITIES = ("FLAIR", "T1w", "T1gd", "T2w")
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")

FIELD_OF_VIEW = 192.0  # edge of the cube in mm
UNIT = 1000.0  # value in the files of an intensity of 1

#: Mean intensities of the tissues and lesion labels in FLAIR, T1w, T1gd, T2w.
TISSUES = {
    "fluid": (0.10, 0.18, 0.18, 1.00),
    "grey": (0.62, 0.50, 0.52, 0.62),
    "white": (0.50, 0.78, 0.80, 0.42),
}
LESION = {
    1: (0.98, 0.42, 0.44, 0.92),  # oedema
    2: (0.40, 0.25, 0.27, 0.85),  # necrotic and non-enhancing
    3: (0.80, 0.45, 1.05, 0.68),  # enhancing
}


@dataclass(frozen=True)
class Cohort:
    """Settings of a cohort. Equal settings give equal files, byte for byte. Raises UserError if one is out of range."""

    n: int = 64  # cases
    size: int = 96  # voxels along each axis
    seed: int = 0
    held_out: int = 12  # of the n cases, the last ones
    noise: float = 0.01  # largest standard deviation; that of a case is uniform from 0 to this

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("size", 16), ("seed", 0), ("held_out", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        if self.held_out > self.n:
            raise UserError(f"--held-out: expected at most the {self.n} cases of --n, got {self.held_out}")
        if not 0 <= self.noise < 1:
            raise UserError(f"--noise: expected 0 to 1, got {self.noise}")

    def name(self, index: int) -> str:
        return f"cohort_{index:04d}"

    def is_held_out(self, index: int) -> bool:
        return index >= self.n - self.held_out


class Brain(NamedTuple):
    """Image and labels of one case."""

    image: Array  # (4, size, size, size), brain from 0 to about 1, background 0
    labels: NDArray[np.uint8]  # (size, size, size)


class Template(NamedTuple):
    """MNI152 template at 1 mm with its tissue maps, all in [0, 1]."""

    t1: Array
    grey: Array
    white: Array
    centre: tuple[float, float, float]  # of the brain, in voxels


@functools.cache
def template() -> Template:
    """Load the template from nilearn. Raises UserError if nilearn is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from nilearn import datasets
        except ModuleNotFoundError as missing:
            raise UserError("make-cohort: needs the package 'nilearn': pip install 'tcam-ext[train]'") from missing
        loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
        maps = [np.asarray(load(resolution=1).dataobj, np.float32) for load in loaders]
    t1, grey, white = (np.clip(m / m.max(), 0, 1) for m in maps)
    x, y, z = (0.5 * (float(at.min()) + float(at.max())) for at in np.nonzero(t1 > 0.05))
    return Template(t1, grey, white, (x, y, z))


# ---- one case --------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: int, knots: int) -> Array:
    """Smooth random field (size, size, size) of about unit variance: normals at knots^3 points, cubic splines between them."""
    coarse = rng.standard_normal((knots + 3,) * 3).astype(np.float32)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (knots - 1) + 1.5
    for axis in range(3):
        coarse = _cubic(coarse, at, axis)
    return coarse / max(float(coarse.std()), 1e-6)


def _cubic(field: Array, at: NDArray[np.floating], axis: int) -> Array:
    """Uniform cubic B-splines along an axis, evaluated at positions ``at``."""
    i = np.floor(at).astype(int) - 1
    t = at - np.floor(at)
    weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
    shape = [1, 1, 1]
    shape[axis] = -1
    last = field.shape[axis] - 1
    parts = (w.reshape(shape) * field.take(np.clip(i + k, 0, last), axis) for k, w in enumerate(weights))
    return np.asarray(sum(parts, np.float32(0)), np.float32)


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _deformed(cohort: Cohort, rng: np.random.Generator) -> list[Array]:
    """T1, grey and white matter of the template at the voxels of a case."""
    source, size = template(), cohort.size
    linear = _rotation(rng.uniform(-0.12, 0.12, 3)) @ np.diag(rng.uniform(0.95, 1.12, 3))
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.uniform(-0.05, 0.05, 3)
    linear = linear @ shear
    shift = np.asarray(source.centre) + rng.uniform(-4, 4, 3)
    along = ((np.arange(size) + 0.5) / size - 0.5) * FIELD_OF_VIEW
    x, y, z = np.meshgrid(along, along, along, indexing="ij", sparse=True)
    at = np.empty((3, size, size, size), np.float32)
    for axis in range(3):
        warp = 2.2 * smooth_noise(rng, size, 5) + 0.8 * smooth_noise(rng, size, 9)  # mm
        at[axis] = linear[axis, 0] * x + linear[axis, 1] * y + linear[axis, 2] * z + shift[axis] + warp
    step = FIELD_OF_VIEW / size  # mm per voxel
    blur = 0.5 * max(step - 1, 0)  # averages away detail finer than a voxel, as a scanner does
    return [
        ndimage.map_coordinates(ndimage.gaussian_filter(m, blur) if blur else m, at, order=1, mode="constant")
        for m in (source.t1, source.grey, source.white)
    ]


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, count = ndimage.label(mask)
    return parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:])) if count else mask


def _lesion(rng: np.random.Generator, brain: NDArray[np.bool_], white: Array) -> NDArray[np.uint8]:
    """Labels of a lesion: a necrotic core, an enhancing rim, and oedema around it along the white matter."""
    size = brain.shape[0]
    inside = ndimage.distance_transform_edt(brain) * (FIELD_OF_VIEW / size)
    centres = np.argwhere((inside > 14) & (white > 0.5))
    labels = np.zeros(brain.shape, np.uint8)
    if not len(centres):
        return labels
    centre = centres[rng.integers(len(centres))]
    along = [(np.arange(size) - c) * (FIELD_OF_VIEW / size) for c in centre]
    x, y, z = np.meshgrid(*along, indexing="ij", sparse=True)
    axes = rng.uniform(0.75, 1.3, 3)
    radius = rng.uniform(9, 20)  # of the tumour, in mm
    distance = np.sqrt((x / axes[0]) ** 2 + (y / axes[1]) ** 2 + (z / axes[2]) ** 2)
    rough = 0.14 * smooth_noise(rng, size, 10) + 0.06 * smooth_noise(rng, size, 20)
    tumour = distance / radius + rough  # 1 at its surface
    spread = rng.uniform(1.4, 2.1)
    oedema = distance / (radius * spread) + 1.8 * rough - 0.25 * (white - 0.5)
    labels[(oedema < 1) & (white + 0.3 > rng.uniform(0.3, 0.5))] = 1
    labels[tumour < 1] = 3
    labels[tumour < rng.uniform(0.55, 0.8)] = 2
    labels[~brain] = 0
    return labels


def make_case(cohort: Cohort, index: int) -> Brain:
    """Make case ``index`` of a cohort. The result depends on the cohort's seed, size and noise and on ``index`` alone."""
    rng = np.random.default_rng([cohort.seed, index])
    t1, grey, white = _deformed(cohort, rng)
    brain = _largest(ndimage.binary_fill_holes(ndimage.binary_opening(t1 > 0.12)))
    labels = np.zeros(brain.shape, np.uint8)
    for _ in range(rng.integers(1, 3)):
        lesion = _lesion(rng, brain, white)
        labels = np.where(lesion, lesion, labels)

    fluid = np.clip(1 - grey - white, 0, 1)
    weight = np.maximum(grey + white + fluid, 1e-6)
    fine = np.clip(t1 - ndimage.gaussian_filter(t1, 1.5), -0.2, 0.2)  # detail that the tissue maps lack
    texture = 0.03 * smooth_noise(rng, cohort.size, max(4, cohort.size // 6))
    soft = {label: ndimage.gaussian_filter((labels == label).astype(np.float32), 0.6) for label in LESION}
    healthy = np.clip(1 - sum(soft.values()), 0, 1)
    std = rng.uniform(0, cohort.noise)
    image = np.zeros((len(MODALITIES), *brain.shape), np.float32)
    for m in range(len(MODALITIES)):
        tissue = {name: np.float32(mean[m] * rng.uniform(0.93, 1.07)) for name, mean in TISSUES.items()}
        signal = (fluid * tissue["fluid"] + grey * tissue["grey"] + white * tissue["white"]) / weight
        signal = signal + (0.5 if m in (1, 2) else -0.2) * fine + texture
        signal = signal * healthy
        for label, mean in LESION.items():
            rough = 1 + 0.08 * smooth_noise(rng, cohort.size, max(4, cohort.size // 8))
            signal = signal + soft[label] * np.float32(mean[m] * rng.uniform(0.93, 1.07)) * rough
        bias = np.exp(0.08 * smooth_noise(rng, cohort.size, 3))
        signal = np.clip(signal, 0, None) ** rng.uniform(0.85, 1.18) * bias
        real, imaginary = std * rng.standard_normal((2, *brain.shape), dtype=np.float32)  # a magnitude image: Rician
        image[m] = np.where(brain, np.hypot(signal + real, imaginary), 0)
    return Brain(image, np.where(brain, labels, 0).astype(np.uint8))


# ---- the folder ---------------------------------------------------------------------------------


def affine(size: int) -> NDArray[np.float64]:
    """Affine (4, 4) in RAS+ that puts the centre of the cube at 0 mm."""
    step = FIELD_OF_VIEW / size
    matrix = np.diag([step, step, step, 1.0])
    matrix[:3, 3] = -FIELD_OF_VIEW / 2 + step / 2
    return matrix


def _paths(folder: Path, cohort: Cohort, index: int) -> tuple[Path, Path]:
    part = "Ts" if cohort.is_held_out(index) else "Tr"
    name = f"{cohort.name(index)}.nii.gz"
    return folder / f"images{part}" / name, folder / f"labels{part}" / name


def _write(folder: Path, cohort: Cohort, index: int) -> int:
    """Write the files of a case unless they exist. The image comes last, so a case with an image is complete."""
    image_path, label_path = _paths(folder, cohort, index)
    if image_path.exists() and label_path.exists():
        return index
    brain = make_case(cohort, index)
    labels = VolumeInfo(channels=1, shape=(cohort.size,) * 3, affine=affine(cohort.size))
    # These ranges give slope 1 and intercept 0: the numbers are stored unscaled.
    write_volume(label_path, iter([brain.labels[None].astype(np.float32)]), labels, Quantiser("uint8", 0, 255))
    image = labels.replaced(channels=len(MODALITIES))
    write_volume(image_path, iter([np.rint(UNIT * brain.image)]), image, Quantiser("int16", -32768, 32767))
    return index


def make_cohort(folder: Path, cohort: Cohort, jobs: int = 1) -> Iterator[int]:
    """Write a cohort, or the cases that an interrupted run left out.

    The folders are those of the Decathlon, and ``labelsTs`` with the labels of the held-out cases.

    Yields:
        The number of each case once its files exist.

    Raises:
        UserError: the folder holds another cohort or other files.
    """
    with locked_folder(folder):
        _claim(folder, cohort)
        yield from map_on_processes(functools.partial(_write, folder, cohort), range(cohort.n), jobs)
        write_text(folder / "dataset.json", json.dumps(description(cohort), indent=1) + "\n")


def _claim(folder: Path, cohort: Cohort) -> None:
    """Write the recipe of a cohort and make its folders. Raises UserError if the folder holds something else."""
    recipe = folder / "cohort.json"
    if recipe.exists():
        try:
            settings = json.loads(recipe.read_text())
        except ValueError:
            settings = None
        if settings != asdict(cohort):
            raise UserError(f"{folder}: holds another cohort ({recipe.name}: {settings}); choose another folder, or delete it")
    elif any(folder.iterdir()):
        raise UserError(f"{folder}: expected an empty folder, or an unfinished cohort of this command")
    write_text(recipe, json.dumps(asdict(cohort), indent=1) + "\n")
    for i in range(cohort.n):
        for path in _paths(folder, cohort, i):
            path.parent.mkdir(exist_ok=True)


def description(cohort: Cohort) -> dict[str, object]:
    """Content of dataset.json as the Medical Segmentation Decathlon defines it."""

    def listed(held_out: bool) -> list[int]:
        return [i for i in range(cohort.n) if cohort.is_held_out(i) == held_out]

    return {
        "name": "tcam cohort",
        "description": "Brains with lesions made from the MNI152 template; not anatomy of patients",
        "reference": f"tcam make-cohort --n {cohort.n} --size {cohort.size} --seed {cohort.seed}",
        "licence": "as the MNI152 template's",
        "tensorImageSize": "4D",
        "modality": {str(i): name for i, name in enumerate(MODALITIES)},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "numTraining": cohort.n - cohort.held_out,
        "numTest": cohort.held_out,
        "training": [
            {"image": f"./imagesTr/{cohort.name(i)}.nii.gz", "label": f"./labelsTr/{cohort.name(i)}.nii.gz"}
            for i in listed(False)
        ],
        "test": [f"./imagesTs/{cohort.name(i)}.nii.gz" for i in listed(True)],
    }
