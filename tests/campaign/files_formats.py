"""Mutations of bytes and of what NIfTI and DICOM files consist of."""

from __future__ import annotations

import gzip
import math
import random
import struct
from typing import Any


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
        return (
            bytes(raw[:348]) + bytes([rng.randrange(3), 0, 0, 0]) + struct.pack("<ii", rng.choice(SHORTS), 6) + bytes(raw[352:])
        )
    form, offset, count = rng.choice(FIELDS)
    at = offset + rng.randrange(count) * struct.calcsize(form)
    value: Any = {"B": rng.randrange(256), "f": rng.choice(FLOATS), "h": rng.choice(SHORTS), "i": rng.choice((540, 348, 0))}[
        form
    ]
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
    "SpacingBetweenSlices", "SeriesInstanceUID", "Modality", "PhotometricInterpretation", "PixelData", "InstanceNumber",
    "ImageType",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanarConfiguration", "RescaleType",
    "SpecificCharacterSet",
)  # fmt: skip
TEXTS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e308",
    "-1e30",
    "0",
    "-1",
    "",
    "x",
    "1\\2",
    "1\\2\\3",
    "0.5\\0.5",
    "1e-30\\1e-30",
    " 7 ",
)
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
