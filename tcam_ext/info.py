"""``python -m tcam_ext.info``: versions, instruction set, CUDA architectures and devices, OpenMP threads."""

from __future__ import annotations

import os
import platform

import torch

from tcam_ext import _C, __version__


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
                    "the driver is older than the CUDA this build was made with: update it, or build with an older nvcc",
                )
            )
    elif not cuda["devices"] or not torch.cuda.is_available():
        out.append(("CUDA devices", str(cuda["devices"])))
    else:
        for i in range(cuda["devices"]):
            p = torch.cuda.get_device_properties(i)
            out.append((f"CUDA device {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    return out


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def main() -> None:
    for name, value in lines():
        print(f"{name + ':' if name else '':<22}{value}")


if __name__ == "__main__":
    main()
