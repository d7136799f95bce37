"""Build tcam_ext._C with ninja: without torch, and with CUDA where nvcc is present.

Environment variables: TCAM_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST (as for torch, e.g. "8.0;9.0+PTX"), TCAM_CPU_SETS (e.g.
"avx2": the instruction sets compiled beside the portable one; default: all), CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDA_HOME,
CUDA_PATH, CUDAHOSTCXX, MAX_JOBS, TCAM_COMPILE_COMMANDS=1 (writes compile_commands.json).
"""

import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
INSTRUCTION_SETS = {"portable": (16, "")}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": (32, "-mavx2 -mfma -mf16c"),
        "avx512": (64, AVX512),
        "avx512bf16": (64, AVX512 + " -mavx512bf16"),
        "amx": (64, AVX512 + " -mavx512bf16 -mamx-tile -mamx-bf16"),
    }
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0-PTX"  # few, to build fast; "-PTX" is not torch's: PTX without a cubin


# Older setuptools reject the SPDX license expression in pyproject.toml.
READS_PYPROJECT = int(setuptools.__version__.split(".")[0]) >= 77


def say(text):
    print(f"tcam_ext: {text}", file=sys.stderr, flush=True)


def instruction_sets():
    """The instruction sets that TCAM_CPU_SETS names, and the portable one."""
    spelled = os.environ.get("TCAM_CPU_SETS", "").strip()
    named = re.split(r"[;, ]+", spelled) if spelled else list(INSTRUCTION_SETS)
    if unknown := set(named) - set(INSTRUCTION_SETS):
        raise SystemExit(f"TCAM_CPU_SETS: unknown {', '.join(sorted(unknown))}; known here: {', '.join(INSTRUCTION_SETS)}")
    return {name: how for name, how in INSTRUCTION_SETS.items() if name == "portable" or name in named}


def version():
    return re.search(r'"(.+)"', (ROOT / "tcam_ext" / "_version.py").read_text())[1]


def find_nvcc():
    mode = os.environ.get("TCAM_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"TCAM_CUDA={mode}: expected auto, on or off")
    if mode == "off":
        say("CUDA kernels left out (TCAM_CUDA=off)")
        return None
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates = [
        os.environ.get("CUDACXX"),
        *(f"{h}/bin/nvcc" for h in homes),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    if mode == "on":
        raise SystemExit("TCAM_CUDA=on, but no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    say("no nvcc found: building the CPU kernels only (TCAM_CUDA=on makes this an error)")
    return None


def cuda_library_folders(nvcc):
    """The library folders that nvcc reports: a wrapper script or a pip toolkit has no fixed layout."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True)
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry.stderr, re.M)
    if not libraries:
        raise SystemExit(f"{nvcc} does not run; TCAM_CUDA=off builds without it.\n{dry.stderr.strip()}")
    return re.findall(r'-L"?([^" ]+)"?', libraries[1])


def gencode():
    spelled = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES
    flags, names = [], []
    for item in re.split(r"[;, ]+", spelled):
        m = re.fullmatch(r"(\d+)\.(\d+)([af]?)([+-]PTX)?", item)
        if not m:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: cannot read {item!r}; expected for example 8.0;9.0a;12.0+PTX")
        number = m[1] + m[2] + m[3]
        if m[4] != "-PTX":
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            names.append(f"sm_{number}")
        if m[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
            names.append(f"compute_{number}")
    return flags, " ".join(names)


def source_hash():
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file()):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def escape(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


class InPlace(Distribution):
    """A distribution that ignores pyproject.toml, for `python setup.py build_ext --inplace` with older setuptools."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        if set(self.script_args or []) & {"install", "develop", "bdist_wheel", "sdist", "dist_info", "egg_info"}:
            raise SystemExit(
                f"setuptools {setuptools.__version__} is too old to install tcam_ext: 77 or newer, or `pip install .`"
            )


class WithViewer(build_py):
    """Python files, after the script of the viewer for `tcam report`, which npm has."""

    def run(self):
        missing = runpy.run_path(str(ROOT / "python" / "tcam_diff" / "report" / "niivue.py"))["fetch"]()
        if missing:
            say(f"`tcam report` will lack the viewer: {missing}")
        super().run()


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        self.write_ninja(folder, target.name, pybind11.get_include())
        try:
            import ninja

            command = [str(Path(ninja.BIN_DIR) / "ninja")]
        except ImportError:
            command = ["ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.check_call([*command, "-C", str(folder), "-j", jobs])
        if os.environ.get("TCAM_COMPILE_COMMANDS"):
            database = subprocess.check_output([*command, "-C", str(folder), "-t", "compdb", "cxx"])
            (ROOT / "compile_commands.json").write_bytes(database)
        shutil.copy2(folder / target.name, target)

    def write_ninja(self, folder, name, pybind_include):
        nvcc = find_nvcc()
        includes = [f"-I{shlex.quote(p)}" for p in (pybind_include, sysconfig.get_paths()["include"])]
        flags = ["-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -DNDEBUG -Wall -Wextra -Wno-psabi"]
        flags += [os.environ.get("CXXFLAGS", "")]
        defines = [f"-DTCAM_VERSION='\"{version()}\"' -DTCAM_SOURCE_HASH='\"{source_hash()}\"'"]
        edges, objects = [], []

        def compile_cpp(source, stem, extra):
            objects.append(f"{stem}.o")
            edges.append(f"build {stem}.o: cxx {escape(source)}\n  flags = {' '.join([*flags, *extra])}")

        link = ["-fopenmp", "-Wl,--exclude-libs,ALL", os.environ.get("LDFLAGS", "")]
        rules = ["rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"]
        if nvcc:
            arch_flags, arch_names = gencode()
            say(f"CUDA kernels with {nvcc} for {arch_names}")
            architectures = f"-DTCAM_CUDA_ARCHITECTURES='\"{arch_names}\"'"
            defines.append(f"-DTCAM_WITH_CUDA=1 {architectures}")
            ccbin = ["-ccbin=" + shlex.quote(os.environ["CUDAHOSTCXX"])] if os.environ.get("CUDAHOSTCXX") else []
            nvcc_flags = [
                *ccbin,
                "-std=c++17 -O3 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden",
                architectures,
                *arch_flags,
            ]
            rules.append(
                f"rule nvcc\n  command = {shlex.quote(nvcc)} {' '.join(nvcc_flags)} -MD -MT $out -MF $out.d -c $in -o $out"
                "\n  depfile = $out.d\n  deps = gcc"
            )
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                objects.append(f"{source.stem}.cu.o")
                edges.append(f"build {objects[-1]}: nvcc {escape(source)}")
            link += [f"-L{shlex.quote(d)}" for d in cuda_library_folders(nvcc)]
            link += ["-lcudart_static -lrt -lpthread -ldl"]  # static: the wheel runs with any torch, with or without CUDA
        compile_cpp(CSRC / "bindings.cpp", "bindings", includes + defines)
        compile_cpp(CSRC / "cpu" / "decode.cpp", "decode", [])
        sets = instruction_sets()
        compile_cpp(CSRC / "cpu" / "isa.cpp", "isa", [f"-DTCAM_HAS_{isa.upper()}=1" for isa in sets])
        for isa, (vector_bytes, isa_flags) in sets.items():
            # -ffp-contract=fast fuses a*b + c. No other flag changes floating-point results.
            extra = [
                isa_flags,
                "-ffp-contract=fast",
                f"-DTCAM_ISA={isa}",
                f"-DTCAM_VECTOR_BYTES={vector_bytes}",
            ]
            compile_cpp(CSRC / "cpu" / "voxel_core.cpp", f"voxel_core.{isa}", extra)
        rules.append(f"rule link\n  command = $cxx -shared $in -o $out {' '.join(link)}")
        text = ["ninja_required_version = 1.5", f"cxx = {os.environ.get('CXX', 'c++')}", *rules, *edges]
        text += [f"build {name}: link {' '.join(objects)}", f"default {name}", ""]
        (folder / "build.ninja").write_text("\n".join(text))


setup(
    **({} if READS_PYPROJECT else {"distclass": InPlace, "name": "tcam-ext", "version": version()}),
    packages=find_packages(include=["tcam_ext", "tcam_ext.*"]) + find_packages("python"),
    package_dir={"tcam_diff": "python/tcam_diff"},
    ext_modules=[Extension("tcam_ext._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "build_py": WithViewer},
)
