"""Labels of voxels: the one place where their codes get names.

The codes of brain tumours differ between data sets, and a well-known tutorial swaps two of them:

=================  ====  =======  ==
data set           ED    NCR/NET  ET
=================  ====  =======  ==
Decathlon, Task01  1     2        3
BraTS to 2021      2     1        4
BraTS from 2023    2     1        3
=================  ====  =======  ==

ED is edema, NCR/NET the necrotic and non-enhancing core, ET the enhancing tumour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.errors import UserError
from tcam_diff.text import shown

#: Names of the tumour's parts, in the order of the paper's table 2.
TUMOUR = ("ED", "NCR/NET", "ET")

#: Names of codes in folders of BraTS cases, of all releases. Releases with code 3 for ET have no code 4, or give it to RC.
BRATS: Mapping[int, str] = {1: "NCR/NET", 2: "ED", 3: "ET", 4: "ET"}

#: Names in dataset.json files, in the spelling of `_plain`, and what tables call them.
_SYNONYMS = {
    "edema": "ED",
    "peritumoral edema": "ED",
    "non enhancing tumor": "NCR/NET",
    "necrotic and non enhancing tumor": "NCR/NET",
    "necrotic tumor core": "NCR/NET",
    "ncr": "NCR/NET",
    "ncr net": "NCR/NET",
    "enhancing tumor": "ET",
}


def listed_names(labels: Any) -> dict[int, str]:
    """Names by code of the entry "labels" of a dataset.json: {"1": "edema"} or, of nnU-Net, {"edema": 1}.

    Names of the tumour's parts become those of TUMOUR. Background, and nnU-Net's regions of several codes, are left out.
    """
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        code, name = (key, value) if isinstance(value, str) else (value, key)
        if re.fullmatch(r"\d{1,3}", str(code)) and int(code) > 0 and name:
            names[int(code)] = _SYNONYMS.get(_plain(name), shown(name, 40))
    return names


def label_names(listed: Mapping[int, str], codes: Iterable[int]) -> dict[int, str]:
    """Names of the codes of a data set, but for background, 0.

    Args:
        listed: names by code, from dataset.json or BRATS; codes without a name become "label CODE".
        codes: all codes in the data set. BraTS releases that use 3 and 4 call 4 the resection cavity, RC.
    """
    present = sorted(set(codes) - {0})
    names = {code: listed.get(code, f"label {code}") for code in present}
    if listed == BRATS and {3, 4} <= set(present):
        names[4] = "RC"
    return names


def classes(names: Iterable[str]) -> list[str]:
    """Distinct names, those of TUMOUR first and in its order."""
    return sorted(dict.fromkeys(names), key=lambda n: (TUMOUR.index(n) if n in TUMOUR else len(TUMOUR), n))


def class_numbers(names: Mapping[int, str]) -> np.ndarray:
    """Table (256,) uint8 from a code to the number of its class: 1 + the position in ``classes``, 0 for background."""
    order = classes(names.values())
    table = np.zeros(256, np.uint8)
    for code, name in names.items():
        table[code] = 1 + order.index(name)
    return table


def label_maps(labels: np.ndarray, maps: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Label maps (L, H, W, D) float32 of labels (H, W, D): 1 where the label is one of a map's codes, else 0."""
    return np.stack([np.isin(labels, list(codes)) for codes in maps.values()]).astype(np.float32)


def labels_of_maps(values: np.ndarray, maps: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Labels (H, W, D) uint8 from the values (L, H, W, D) of label maps: of all codes, and 0, the likeliest.

    A value is taken for the probability that the voxel is inside the map, independently of the other maps. Maps may overlap,
    as the regions of BraTS do.
    """
    codes = [0, *sorted({c for of in maps.values() for c in of})]
    inside = np.array([[c in of for of in maps.values()] for c in codes])  # (codes, L)
    p = np.clip(values, 1e-6, 1 - 1e-6)
    likelihoods = np.einsum("cl,l...->c...", inside, np.log(p)) + np.einsum("cl,l...->c...", ~inside, np.log1p(-p))
    return np.array(codes, np.uint8)[likelihoods.argmax(0)]


def label_codes(path: Path, values: Sequence[float] | None, not_finite: int = 0) -> list[int]:
    """The codes of a label file as integers. Raises UserError if they are none of 0 to 255.

    Args:
        path: the file, for messages.
        values: its distinct values; None: more than 256.
        not_finite: number of its voxels that are NaN or infinite.
    """
    if not_finite:
        raise UserError(f"{path}: {not_finite} labels are NaN or infinite")
    if values is None or any(v != int(v) or not 0 <= v <= 255 for v in values):
        wrong = "more than 256 values" if values is None else ", ".join(f"{v:g}" for v in values[:6])
        raise UserError(f"{path}: expected labels 0, 1, 2, ..., 255, got {wrong}")
    return [int(v) for v in values]


def _plain(name: str) -> str:
    """A name in lower case, in American spelling, without punctuation."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    return words.replace("tumour", "tumor").replace("oedema", "edema")
