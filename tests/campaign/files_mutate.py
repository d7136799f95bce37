"""Mutations of files: of bytes, and of what NIfTI, DICOM, JSON, YAML, safetensors, npy and checkpoint files consist of.

A case is a set of files by their names in a folder, packed to one string of bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
Bytes = Callable[[bytes], bytes]

#: Name of the file of an input that is no packed case.
ALONE = {"nifti": "a.nii", "dicom": "a.dcm", "yaml": "fit.yaml", "safetensors": "manifest.json", "store": "store.json"}


def pack(files: Files) -> bytes:
    sizes = json.dumps({name: len(content) for name, content in files.items()}).encode()
    return sizes + b"\n" + b"".join(files.values())


def unpack(data: bytes, kind: str) -> Files:
    head, _, rest = data.partition(b"\n")
    files, at = {}, 0
    try:
        for name, size in json.loads(head).items():
            files[name] = rest[at : at + size]
            at += size
    except (ValueError, AttributeError, TypeError):
        return {ALONE.get(kind, "config.yaml"): data}
    return files


def mutated(files: Files, rng: random.Random, library: Bytes) -> Files:
    """The files after one to three mutations. ``library`` is libFuzzer's mutation of bytes."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not files:
            break
        name = rng.choice(list(files))
        draw = rng.random()
        if draw < 0.03:
            del files[name]
        elif draw < 0.06:
            files[name] = files[rng.choice(list(files))]
        elif draw < 0.25:
            files[name] = library(files[name])
        elif draw < 0.4:
            files[name] = any_bytes(files[name], rng)
        else:
            try:
                files[name] = structured(name, files[name], rng)
            except Exception:  # what an earlier mutation damaged is no longer parsed
                files[name] = any_bytes(files[name], rng)
    return with_checksums(files) if rng.random() < 0.8 else files


def structured(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file with a part changed that its format has a name for."""
    for ending, change in STRUCTURES.items():
        if name.endswith(ending):
            return change(data, rng)
    return any_bytes(data, rng)


def with_checksums(files: Files) -> Files:
    """The files with the checksums of their indexes as they are now, so that what lies behind the checksum is read."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def of(folder: str, name: str) -> str | None:
        return sums.get(f"{folder}{name}")

    def mend(content: Any, folder: str) -> None:
        if isinstance(content.get("sha256"), dict):
            content["sha256"] = {name: of(folder, name) or old for name, old in content["sha256"].items()}
        for key, form in (("volumes", "planes/{}.safetensors"), ("cases", "cases/{}.npy")):
            for entry in content.get(key) or ():
                entry["sha256"] = of(folder, form.format(entry["name"])) or entry["sha256"]
        if "decoder_sha256" in content:
            content["decoder_sha256"] = of(folder, "decoder.safetensors") or content["decoder_sha256"]

    mended = dict(files)
    for name, data in files.items():
        if name.endswith(("manifest.json", "latents.json", "model.json", "store.json")):
            try:
                content = json.loads(data)
                mend(content, name[: name.rfind("/") + 1])
                mended[name] = json.dumps(content, indent=1).encode()
            except Exception:  # the index itself is damaged
                continue
    return mended


# ---- bytes -------------------------------------------------------------------------------


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, removed, doubled, overwritten, flipped or swapped."""
    if not data:
        return rng.randbytes(8)
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    short = min(b, a + rng.choice((1, 2, 4, 8, 64)))
    change = rng.randrange(8)
    if change == 0:
        return data[:a]
    if change == 1:
        return data[:a] + data[b:]
    if change == 2:
        return data[:b] + data[a:]
    if change == 3:
        return data[:a] + rng.randbytes(short - a) + data[short:]
    if change == 4:
        return data[:a] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (short - a) + data[short:]
    if change == 5:
        return data[:a] + data[a:short][::-1] + data[short:]
    if change == 6:
        return data[:a] + bytes([data[a] ^ (1 << rng.randrange(8))]) + data[a + 1 :]
    return data + rng.randbytes(rng.choice((1, 16, 300)))


# ---- NIfTI -------------------------------------------------------------------------------

SHORTS = (0, 1, -1, 2, 5, 7, 8, 127, 255, 256, 512, 4096, 32767, -32768)
FLOATS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 1e-30, 1e-8, 3e38, -3e38, 1e20, 352.0, 351.5, 0.001)

#: Offsets of fields of a NIfTI-1 header: format, offset, number of entries.
FIELDS = (
    ("i", 0, 1), ("h", 40, 8), ("h", 40, 8), ("h", 68, 1), ("h", 70, 1), ("h", 72, 1), ("h", 74, 1), ("f", 76, 8), ("f", 76, 8),
    ("f", 108, 1), ("f", 112, 2), ("f", 112, 2), ("B", 123, 1), ("f", 124, 2), ("h", 252, 2), ("f", 256, 6), ("f", 280, 12),
    ("f", 280, 12), ("B", 344, 4),
)  # fmt: skip
DATATYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304)


def nifti(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    if rng.random() < 0.05:  # the other order of bytes, of the header alone
        raw[40:56] = b"".join(raw[i : i + 2][::-1] for i in range(40, 56, 2))
        return bytes(raw)
    if rng.random() < 0.15:  # voxels
        at = rng.randrange(352, len(raw) - 8)
        raw[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
        return bytes(raw)
    if rng.random() < 0.1:  # extensions, or no more of them
        return bytes(raw[:348]) + bytes([rng.randrange(3), 0, 0, 0]) + struct.pack("<ii", rng.choice(SHORTS), 6) + bytes(raw[352:])
    form, offset, count = rng.choice(FIELDS)
    at = offset + rng.randrange(count) * struct.calcsize(form)
    value: Any = {"B": rng.randrange(256), "f": rng.choice(FLOATS), "h": rng.choice(SHORTS), "i": rng.choice((540, 348, 0))}[form]
    if offset == 70:
        value = rng.choice(DATATYPES)
    struct.pack_into("<" + form, raw, at, value)
    return bytes(raw)


def nifti_gz(data: bytes, rng: random.Random) -> bytes:
    whole = gzip.decompress(data)
    draw = rng.random()
    inner = nifti(whole, rng) if draw < 0.7 else any_bytes(whole, rng)
    packed = gzip.compress(inner, 1, mtime=0)
    return packed + packed if draw > 0.95 else packed


# ---- DICOM -------------------------------------------------------------------------------

TAGS = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "NumberOfFrames",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "SliceThickness",
    "SpacingBetweenSlices", "SeriesInstanceUID", "Modality", "PhotometricInterpretation", "PixelData", "InstanceNumber", "ImageType",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanarConfiguration", "RescaleType",
    "SpecificCharacterSet",
)  # fmt: skip
TEXTS = ("nan", "inf", "-inf", "1e400", "1e308", "-1e30", "0", "-1", "", "x", "1\\2", "1\\2\\3", "0.5\\0.5", "1e-30\\1e-30", " 7 ")
SYNTAXES = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80", "1.2.3", "",
)  # fmt: skip


def dicom(data: bytes, rng: random.Random) -> bytes:
    """An element of the file with another value, written as its bytes so that no library corrects it."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    if rng.random() < 0.08:
        known = [s for s in SYNTAXES + ("1.2.840.10008.1.2.1",) if s and s.encode() in data[:400]]
        old = max(known, key=len).encode() if known else b"1.2.840.10008.1.2.1"
        new = rng.choice(SYNTAXES).encode()
        return data.replace(old, new[: len(old)].ljust(len(old), b"\0"), 1)
    name = rng.choice(TAGS)
    tag = tag_for_keyword(name)
    assert tag is not None
    kind, prefix = dictionary_VR(tag)[:2], struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    at = data.find(prefix, 132)
    long = kind in ("OB", "OW", "SQ", "UN")
    kind = "OW" if name == "PixelData" else kind

    def element(value: bytes) -> bytes:
        value += b" " * (len(value) % 2)
        return prefix + kind.encode() + (struct.pack("<HI", 0, len(value)) if long else struct.pack("<H", len(value))) + value

    value = struct.pack("<H", rng.choice(SHORTS) & 0xFFFF) if kind == "US" else rng.choice(TEXTS).encode()
    if at < 0:
        spot = data.find(struct.pack("<HH", 0x0008, 0x0016), 132)
        return data[:spot] + element(value) + data[spot:]
    size, head = (struct.unpack_from("<I", data, at + 8)[0], 12) if long else (struct.unpack_from("<H", data, at + 6)[0], 8)
    end = min(at + head + size, len(data))
    draw = rng.random()
    if draw < 0.15:
        return data[:at] + data[end:]
    if draw < 0.25:
        return data[:end] + data[at:end] + data[end:]
    if draw < 0.35:  # another length, or another VR
        other = bytearray(data)
        struct.pack_into("<H", other, at + rng.choice((4, 6)), rng.choice((0x4353, 0x5344, 0x5355, 0xFFFF, 0, 2, 7)))
        return bytes(other)
    if name == "PixelData":
        return data[: at + head] + any_bytes(data[at + head : end], rng) + data[end:]
    if long:
        return data[: at + head] + any_bytes(data[at + head : end], rng)[:size].ljust(size, b"\0") + data[end:]
    return data[:at] + element(value) + data[end:]


# ---- values in JSON and YAML ---------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 10**6, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, -0.5, 1e-300, 1e300, 1e400, -1e400, math.nan,
    "", "x", "1e-2", "nan", "../x", "a/b", "\x00", "é", "\ud800", "x" * 3000, "[bold]", [], {}, [1], [1, 2, 3], [0, 0, 0], [-1, 2, 3],
    ["x", None, {}], [[]], [[[[1]]]], {"x": 1}, {"": {}}, [1e400, 1, 1], [math.nan] * 3, [math.nan, 1.0], [4096] * 3, [1] * 1000,
)  # fmt: skip


def changed(value: Any, rng: random.Random) -> Any:
    """A tree of dicts and lists with one of its nodes replaced, removed, doubled or given another neighbour."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        draw = rng.random()
        if draw < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if draw < 0.12:
            return value | {f"{key}x": value[key]}
        if draw < 0.16:
            return value | {key: value[rng.choice(list(value))]}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        draw = rng.random()
        if draw < 0.1:
            return value[:at] + value[at + 1 :]
        if draw < 0.2:
            return value + [value[at]]
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.3:
        return rng.choice((-value, value + 1, value * 2, value * 1e6, str(value), value / 3, [value]))
    return rng.choice(ODD)


def tree_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.07:
        return rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe", b"null", b"3", b'{"format": 1}', b"{}"))
    text = json.dumps(changed(json.loads(data), rng), indent=1)
    return text.encode("utf-8", "surrogatepass")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghij"
)
LINES = (
    BOMB, BOMB.replace("a: &a [x,x,x,x,x,x,x,x,x]", "a: &a {x: 1}").replace("[*a", "[{<<: *a}, *a"), "steps: &s [*s]\n", "steps: 2001-99-99\n",
    "lr: !!float x\n", "steps: !!int ''\n", "center: !!bool maybe\n", "seed: !!timestamp x\n", "seed: 1:99:99\n", "steps: 0x\n",
    "steps: !!python/object:os.system 1\n", "steps: " + "9" * 5000 + "\n", "a: " + "[" * 3000 + "\n", "a: " + "{b: " * 500 + "}" * 500 + "\n",
    "? [1, 2]\n: 3\n", "? {}\n: 3\n", "1: 2\n", "null: 1\n", "---\n---\n", "%YAML 9.9\n---\n", "\t\n", "steps: yes\n", "lr: .inf\n", "lr: .nan\n",
    "beta2: 1e-2\n", "steps: 1_000\n", "steps: 010\n", "steps: 1e3\n", "steps: 12.0\n", "seed: -0\n", "steps: '5'\n", "<<: {steps: 3}\n",
    "<<: 3\n", "steps: !!set {a, b}\n", "steps: !!binary aGVsbG8=\n", "steps: |\n  a\n  b\n", "'ste\\nps': 1\n", '"ste\\nps": 1\n',
    '"\\u001b[31m": 1\n', "steps: \x07\n", "steps: &a 3\nseed: *a\n", "steps: *none\n",
)  # fmt: skip


def tree_yaml(data: bytes, rng: random.Random) -> bytes:
    import yaml

    draw = rng.random()
    if draw < 0.4:
        lines = data.decode("utf-8", "replace").splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
        return "".join(lines).encode("utf-8", "surrogatepass")
    if draw < 0.5:
        odd = rng.choice((b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xc3\x28", b"\r", b"\x85", b"\xe2\x80\xa8"))
        at = rng.randrange(len(data) + 1)
        return data[:at] + odd + data[at:]
    if draw < 0.53:
        return data.decode("utf-8", "replace").encode("utf-16")
    return yaml.dump(changed(yaml.safe_load(data), rng), sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


# ---- tensors -------------------------------------------------------------------------------


def safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    draw = rng.random()
    if draw < 0.3:  # a value
        at = rng.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
    elif draw < 0.4:
        name = rng.choice([n for n in header if n != "__metadata__"])
        entry = header.pop(name)
        header[rng.choice((name + "x", "xy", "yz", "weight", ""))] = entry
    elif draw < 0.55:  # a tensor of another shape, at its place
        entry = header[rng.choice([n for n in header if n != "__metadata__"])]
        entry["shape"] = rng.choice((entry["shape"][::-1], [math.prod(entry["shape"])], [1, *entry["shape"]], entry["shape"][:-1]))
    elif draw < 0.65:  # a type of the same size
        header[rng.choice([n for n in header if n != "__metadata__"])]["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "X"))
    else:
        header = changed(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    size = rng.choice((0, 7, 2**40, 2**63)) if rng.random() < 0.03 else len(text)
    return struct.pack("<Q", size) + text + bytes(body)


def npy(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<H", data[8:10])
    text, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    swap = rng.choice((
        (r"\(\d+", rng.choice(("(0", "(-1", "(99999999", "(True", "(1, 1"))), (r"'descr': '[^']*'", rng.choice((
            "'descr': '|O'", "'descr': '<f2'", "'descr': '<f8'", "'descr': '|S9'", "'descr': 3", "'descr': '|i1'", "'descr': '|V1'",
        ))), ("False", rng.choice(("True", "3", "[" * 300))), (r"\}", rng.choice(("", "'x': 1}", "}}"))),
    ))  # fmt: skip
    text = re.sub(swap[0], swap[1], text, count=1).encode("latin1")
    return data[:8] + struct.pack("<H", len(text)) + text + body


def checkpoint(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint with another value of its state, or with an entry of its zip file damaged under a right CRC."""
    import torch

    if rng.random() < 0.7:
        state = other_state(torch.load(io.BytesIO(data), weights_only=True), rng)
        out = io.BytesIO()
        torch.save(state, out)
        return out.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice([n for n in old.namelist() if "data" in n] or old.namelist())
        for name in old.namelist():
            content = old.read(name)
            content = any_bytes(content, rng) if name == chosen else content
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def other_state(value: Any, rng: random.Random) -> Any:
    """A state with a tensor or another value changed."""
    import torch

    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        draw = rng.random()
        if draw < 0.05:
            return {k: v for k, v in value.items() if k != key}
        if draw < 0.1:
            return dict(value) | {key: value[rng.choice(list(value))]}
        return dict(value) | {key: other_state(value[key], rng)}
    if isinstance(value, list | tuple) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], other_state(value[at], rng), *value[at + 1 :]]
    if isinstance(value, torch.Tensor):
        t = value.detach().clone()
        return rng.choice((
            lambda: t * math.nan, lambda: t + math.inf, lambda: t[..., :0], lambda: t.unsqueeze(0), lambda: t.flatten(),
            lambda: t.double(), lambda: t.half(), lambda: t.long(), lambda: t.bool(), lambda: t.to(torch.complex64), lambda: t.sum(),
            lambda: torch.zeros(1).expand(10**6, 10**6), lambda: t.to_sparse(), lambda: torch.zeros((), dtype=torch.long),
            lambda: t.transpose(0, -1), lambda: -t, lambda: t.repeat(2, *[1] * (t.dim() - 1)), lambda: None, lambda: 3.0, lambda: t.tolist(),
            lambda: t.requires_grad_(), lambda: t.to("meta"),
        ))()  # fmt: skip
    return rng.choice([v for v in ODD if v != "\ud800"])


def csv_table(data: bytes, rng: random.Random) -> bytes:
    odd = rng.choice((b'"', b";", b",", b"\n", b"\r", b"\0", b"\xff", b"image,image\n", b"../../x", b"\xef\xbb\xbf", b"x" * 140_000, b"split"))
    at = rng.randrange(len(data) + 1)
    return data[:at] + odd + data[at:]


STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".nii": nifti, ".nii.gz": nifti_gz, ".dcm": dicom, ".json": tree_json, ".yaml": tree_yaml, ".safetensors": safetensors,
    ".npy": npy, ".pt": checkpoint, ".csv": csv_table,
}  # fmt: skip


def files_of(folder: Path) -> Files:
    """The files of a folder, as a case."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
