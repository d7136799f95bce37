"""``python -m tcam_ext.info``: versions, instruction set, CUDA architectures and devices, OpenMP threads."""

from __future__ import annotations

import os
import platform

import torch

from tcam_ext import _C, TriplaneDecoder, __version__, explain


def lines() -> list[tuple[str, str]]:
    cuda = _C.cuda_info()
    out = [
        ("tcam_ext", f"{__version__} (sources {_C.source_hash}, compiler {_C.compiler})"),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("CPU instruction set", _C.cpu_isa() + (" (TCAM_CPU_ISA)" if os.environ.get("TCAM_CPU_ISA") else "")),
        ("bfloat16 products", "bfloat16 instructions" if _C.cpu_has_bf16() else "computed in float32"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
    ]
    out += _operating_point("cpu", torch.float32)
    if not cuda["built"]:
        return [*out, ("CUDA", "left out of this build")]
    out.append(("CUDA architectures", cuda["architectures"]))
    out.append(("CUDA runtime, driver", f"{_cuda_version(cuda['runtime'])}, {_cuda_version(cuda['driver'])}"))
    if cuda["error"]:
        out.append(("CUDA devices", f"none usable: {cuda['error']}"))
        if cuda["driver"] and cuda["driver"] < cuda["runtime"]:
            out.append(
                (
                    "",
                    "the driver is older than the CUDA toolkit of this build: update it, or build with an older nvcc",
                )
            )
    elif not cuda["devices"] or not torch.cuda.is_available():
        out.append(("CUDA devices", str(cuda["devices"])))
    else:
        for i in range(cuda["devices"]):
            p = torch.cuda.get_device_properties(i)
            out.append((f"CUDA device {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
            out += _operating_point(f"cuda:{i}", torch.bfloat16)
    return out


def _operating_point(device: str, compute: torch.dtype) -> list[tuple[str, str]]:
    """The kernels that decode TCAM-Diff's operating point on a device: 42 channels, four hidden layers of 128, one output."""
    decoder, planes = TriplaneDecoder(42), torch.zeros(1, 3, 42, 8, 8)
    explained = explain(decoder, planes, (8, 8, 8), compute_dtype=compute, device=device)
    name = str(compute).removeprefix("torch.")
    return [("  42 -> 4 x 128 -> 1" if key == "values" else "", f"{key}, {name}: {text}") for key, text in explained.items()]


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def main() -> None:
    for name, value in lines():
        print(f"{name + ':' if name else '':<22}{value}")


if __name__ == "__main__":
    main()
