"""What a built wheel asks of the machine that loads it: `python tests/wheel_symbols.py WHEEL`, in `make test-releases`.

auditwheel compares glibc and libstdc++ with the declared manylinux. The process runs on torch's libgomp, which has GOMP_4.0
in every release. Every function of Python that the module calls must be in the interpreter of the wheel's tag.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import subprocess
import sys
import zipfile

from elftools.elf.elffile import ELFFile

MANYLINUX = (2, 34)  # GCC 11, the oldest compiler that README names
GOMP = (4, 0)


def needed(module: bytes) -> tuple[set[str], set[str]]:
    """The undefined symbols of a shared library, and the versions of libraries that it names."""
    elf = ELFFile(io.BytesIO(module))
    undefined = {s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] == "SHN_UNDEF" and s.name}
    versions = {v.name for _, each in elf.get_section_by_name(".gnu.version_r").iter_versions() for v in each}
    return undefined, versions


def problems(wheel: str) -> list[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    ).stdout
    tags = [tuple(map(int, tag)) for tag in re.findall(r"manylinux_(\d+)_(\d+)", shown)]
    wrong = []
    if not tags or min(tags) > MANYLINUX:
        wrong.append(f"expected symbols of manylinux_{MANYLINUX[0]}_{MANYLINUX[1]}, got:\n{shown}")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    if not modules:
        wrong.append("expected a compiled module, got none")
    for name, module in modules.items():
        undefined, versions = needed(module)
        python = {s for s in undefined if re.match(r"_?Py", s)}
        missing = sorted(s for s in python if not hasattr(ctypes.pythonapi, s))
        if missing or not python:
            shown = ", ".join(missing) or "no symbol of Python at all"
            wrong.append(f"{name}: not in Python {sys.version.split()[0]}: {shown}")
        openmp = [m for v in versions if (m := re.fullmatch(r"G?OMP_(\d+)\.(\d+)", v))]
        late = sorted(m[0] for m in openmp if (int(m[1]), int(m[2])) > GOMP)
        if late:
            wrong.append(f"{name}: expected libgomp symbols up to GOMP_{GOMP[0]}.{GOMP[1]}, got {', '.join(late)}")
    return wrong


if __name__ == "__main__":
    wheel = sys.argv[1] if len(sys.argv) == 2 else os.environ.get("TOX_PACKAGE")  # tox names the wheel that it built
    sys.exit("expected one argument, a wheel" if not wheel else "\n".join(problems(wheel)) or 0)
