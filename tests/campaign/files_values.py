"""Mutations of the values in JSON, YAML, tables, safetensors, npy and checkpoint files."""

from __future__ import annotations

import io
import json
import math
import random
import re
import struct
import zipfile
from typing import Any

from files_formats import FLOATS, any_bytes

# ---- values in JSON and YAML ---------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 10**6, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, -0.5, 1e-300, 1e300, 1e400, -1e400,
    math.nan,
    "", "x", "1e-2", "nan", "../x", "a/b", "\x00", "é", "\ud800", "x" * 3000, "[bold]", [], {}, [1], [1, 2, 3], [0, 0, 0],
    [-1, 2, 3],
    ["x", None, {}], [[]], [[[[1]]]], {"x": 1}, {"": {}}, [1e400, 1, 1], [math.nan] * 3, [math.nan, 1.0], [4096] * 3,
    [1] * 1000,
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


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghij")
LINES = (
    BOMB, BOMB.replace("a: &a [x,x,x,x,x,x,x,x,x]", "a: &a {x: 1}").replace("[*a", "[{<<: *a}, *a"), "steps: &s [*s]\n",
    "steps: 2001-99-99\n",
    "lr: !!float x\n", "steps: !!int ''\n", "center: !!bool maybe\n", "seed: !!timestamp x\n", "seed: 1:99:99\n", "steps: 0x\n",
    "steps: !!python/object:os.system 1\n", "steps: " + "9" * 5000 + "\n", "a: " + "[" * 3000 + "\n",
    "a: " + "{b: " * 500 + "}" * 500 + "\n",
    "? [1, 2]\n: 3\n", "? {}\n: 3\n", "1: 2\n", "null: 1\n", "---\n---\n", "%YAML 9.9\n---\n", "\t\n", "steps: yes\n",
    "lr: .inf\n", "lr: .nan\n",
    "beta2: 1e-2\n", "steps: 1_000\n", "steps: 010\n", "steps: 1e3\n", "steps: 12.0\n", "seed: -0\n", "steps: '5'\n",
    "<<: {steps: 3}\n",
    "<<: 3\n", "steps: !!set {a, b}\n", "steps: !!binary aGVsbG8=\n", "steps: |\n  a\n  b\n", "'ste\\nps': 1\n",
    '"ste\\nps": 1\n',
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
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [math.prod(entry["shape"])], [1, *entry["shape"]], entry["shape"][:-1])
        )
    elif draw < 0.65:  # a type of the same size
        header[rng.choice([n for n in header if n != "__metadata__"])]["dtype"] = rng.choice(
            ("I32", "U32", "F16", "BF16", "F64", "X")
        )
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
            "'descr': '|O'", "'descr': '<f2'", "'descr': '<f8'", "'descr': '|S9'", "'descr': 3", "'descr': '|i1'",
            "'descr': '|V1'",
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
            lambda: t.double(), lambda: t.half(), lambda: t.long(), lambda: t.bool(), lambda: t.to(torch.complex64),
            lambda: t.sum(),
            lambda: torch.zeros(1).expand(10**6, 10**6), lambda: t.to_sparse(), lambda: torch.zeros((), dtype=torch.long),
            lambda: t.transpose(0, -1), lambda: -t, lambda: t.repeat(2, *[1] * (t.dim() - 1)), lambda: None, lambda: 3.0,
            lambda: t.tolist(),
            lambda: t.requires_grad_(), lambda: t.to("meta"),
        ))()  # fmt: skip
    return rng.choice([v for v in ODD if v != "\ud800"])


def csv_table(data: bytes, rng: random.Random) -> bytes:
    odd = rng.choice(
        (
            b'"',
            b";",
            b",",
            b"\n",
            b"\r",
            b"\0",
            b"\xff",
            b"image,image\n",
            b"../../x",
            b"\xef\xbb\xbf",
            b"x" * 140_000,
            b"split",
        )
    )
    at = rng.randrange(len(data) + 1)
    return data[:at] + odd + data[at:]
