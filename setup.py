"""Builds and installs dflash_scale: metadata, and a ninja build for each of the two native libraries.

dflash_scale/_ring.<abi>.so   pybind11 module over csrc/ring; knows no torch
dflash_scale/_kernels.so      torch operators over LibTorch's stable ABI; not a Python module. One file holds the CPU
                              operators and, where nvcc is found, the sm_80 and sm_90a kernels; it loads in a CPU-only
                              torch and in any torch >= 2.10.

Each is a target of its own, and `python setup.py build_ext --inplace --target NAME` builds one of them alone: a machine
without Python's headers, or without pybind11, still gets the kernels. Two more targets are never installed:
build/sanitize/_kernels.so, the CPU operators with address and undefined-behaviour checks (test_sanitizers.py);
build/watchdog/_kernels.so, whose GPU kernels give up a wait that does not end and say where (attention/watchdog.h).

torch's own CUDAExtension is not used: it refuses to build CUDA code beside a CPU-only torch, and ties the result to one
torch release. Every target has a folder of its own in build/; a second build with nothing changed runs no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O2"
# Structures of arguments are begun in one expression and filled in below it.
WARNINGS = "-Wall -Wextra -Wno-missing-field-initializers"
RING = f"_ring{sysconfig.get_config_var('EXT_SUFFIX')}"
KERNELS = "_kernels.so"
INSTALLED = {"kernels": KERNELS, "ring": RING}  # targets, and the library that each makes
# Other targets: the kernels, built with other tools than `find_tools` found.
VARIANTS: dict[str, dict[str, Any]] = {
    "sanitize": {"nvcc": None, "sanitizers": SANITIZERS},
    "watchdog": {"defines": "-DDFLASH_WATCHDOG"},
}
TARGETS = (*INSTALLED, *VARIANTS)
# The oldest torch whose stable ABI has all we call: 2.10, as (major << 56 | minor << 48).
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# sm_80 and sm_90a machine code separately: -arch=sm_90a would add compute_90 PTX, in which wgmma does not exist. The
# PTX is compute_80's, which GPUs newer than both compile when the library is loaded.
GENCODE = (
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80 -gencode arch=compute_90a,code=sm_90a"
)


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, looked up first in the environment that is being installed into.

    An isolated build cannot import that environment's packages, but the interpreter is the same, so sysconfig knows
    where they are. A package that pip put into the build environment is the second choice: its path is temporary, and
    would make every build a full one.
    """
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / name
        if (folder / "__init__.py").is_file():
            return folder
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def fail(sentence: str) -> SystemExit:
    return SystemExit(f"dflash_scale: {sentence}")


@dataclass(frozen=True)
class Tools:
    """What the build runs, all checked before the first file is compiled."""

    cxx: str
    ninja: str
    torch: Path
    nvcc: str | None
    sanitizers: str = ""
    defines: str = ""  # for the CUDA sources


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def find_ninja() -> str | None:
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        import ninja

        found = Path(ninja.BIN_DIR) / "ninja"
        if found.is_file():
            return str(found)
    return shutil.which("ninja")


def find_tools() -> Tools:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next((found for name in wanted if (found := shutil.which(name))), None)
    if cxx is None:
        raise fail(
            f"no C++ compiler found (looked for {', '.join(wanted)} on PATH); install g++ 11 or newer, or set CXX."
        )
    torch = package_dir("torch")
    if torch is None or not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise fail("no torch >= 2.10 with its C++ headers found in this environment; pip install 'torch>=2.10' first.")
    ninja = find_ninja()
    if ninja is None:
        raise fail("ninja not found; pip install ninja, or install without --no-build-isolation.")
    nvcc = find_nvcc()
    if nvcc is None:
        print("dflash_scale: nvcc not found in CUDA_HOME or on PATH: building the CPU operators only.", flush=True)
    return Tools(cxx, ninja, torch, nvcc)


# Folders of csrc that make _kernels.so.
OP_FOLDERS = ("attention", "loss", "pointwise")
# tile_isa.cpp is compiled once for each of these; the library picks one when it is loaded (csrc/attention/cpu.cpp).
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512dq -mavx512vl -mfma",
}


def sources(folder: str, suffix: str) -> list[Path]:
    return sorted((HERE / "csrc" / folder).glob(f"*{suffix}"))


def quoted(*words: str | Path) -> str:
    """Words for a command line in build.ninja: quoted for the shell, then for ninja."""
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def rules(tools: Tools) -> list[str]:
    cxx = quoted(tools.cxx)
    include = quoted(
        f"-I{HERE / 'csrc'}",
        *(["-DDFLASH_CUDA"] if tools.nvcc else []),
        "-isystem",
        tools.torch / "include",
        "-isystem",
        tools.torch / "include" / "torch" / "csrc" / "api" / "include",
    )
    flags = f"-std=c++20 -O3 -fPIC -fvisibility=hidden {WARNINGS} -MMD -MF $out.d {tools.sanitizers}"
    libraries = quoted(f"-L{tools.torch / 'lib'}", "-ltorch_cpu") + f" {tools.sanitizers}"
    text = [
        "ninja_required_version = 1.5",
        "builddir = .",
        f"rule cxx_op\n  command = {cxx} {flags} {TORCH_TARGET} {include} $isa -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link_cxx\n  command = {cxx} -shared -pthread $in -o $out $libraries\n  description = link $out",
    ]
    if tools.nvcc:
        nvcc = f"{quoted(tools.nvcc, '-ccbin', tools.cxx, f'-I{HERE}/csrc')} {GENCODE}"
        cuda = f"-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings -Xptxas -v {tools.defines}"
        # The log is kept, because check_ptxas judges it after every build, also where nothing was compiled.
        text += [
            f"rule cuda\n  command = {nvcc} {cuda} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || { cat $out.log; rm -f $out; false; }",
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
            f"rule link_op\n  command = {nvcc} -shared -cudart static $in -o $out {libraries}",
            "  description = link $out",
        ]
    else:
        text += [
            f"rule link_op\n  command = {cxx} -shared -pthread $in -o $out {libraries}",
            "  description = link $out",
        ]
    return text


def ring_edges(tools: Tools) -> list[str]:
    pybind = package_dir("pybind11")
    if pybind is None:
        raise fail("pybind11 not found; pip install pybind11, or install without --no-build-isolation.")
    include = quoted(f"-I{HERE / 'csrc'}", "-isystem", pybind / "include", "-isystem", sysconfig.get_path("include"))
    text = [
        f"rule cxx_ring\n  command = {quoted(tools.cxx)} -std=c++20 -O3 -fPIC -fvisibility=hidden {WARNINGS}"
        f" -MMD -MF $out.d {include} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
    ]
    objects = [(path, f"{path.name}.o") for path in sources("ring", ".cpp")]
    text += [f"build {target}: cxx_ring {ninja_path(path)}" for path, target in objects]
    text += [f"build {RING}: link_cxx {' '.join(target for _, target in objects)}\n  libraries = -lrt"]
    return [*text, f"default {RING}"]


def kernel_edges(tools: Tools) -> list[str]:
    text, objects = [], []
    isas = ISA_FLAGS if platform.machine() == "x86_64" else {"baseline": ""}
    for folder in OP_FOLDERS:
        for suffix, rule in ((".cpp", "cxx_op"), *([(".cu", "cuda")] if tools.nvcc else [])):
            for path in sources(folder, suffix):
                for isa, flags in isas.items() if path.stem.endswith("_isa") else [("", "")]:
                    objects.append(f"{folder}/{path.stem}{isa and '.' + isa}{suffix}.o")
                    text.append(f"build {objects[-1]}: {rule} {ninja_path(path)}")
                    if isa:
                        text.append(f"  isa = -DDFLASH_ISA={isa} {flags} -ffp-contract=fast")
    return [*text, f"build {KERNELS}: link_op {' '.join(objects)}", f"default {KERNELS}"]


def check_ptxas(built: Path) -> None:
    """Prints each kernel's registers; a spill or serialised wgmma (C7512, C7520) fails the build: silent, and 2-10x."""
    logs = [built / folder / f"{path.name}.o.log" for folder in OP_FOLDERS for path in sources(folder, ".cu")]
    for log in logs:
        text = log.read_text()
        for kernel, arch, rest in re.findall(r"entry function '(\w+)' for '(\w+)'(.*?)(?=Compiling|\Z)", text, re.S):
            registers = re.search(r"Used (\d+) registers", rest)
            print(f"ptxas {log.name[:-6]} {arch} {kernel}: {registers[1] if registers else '?'} registers", flush=True)
            if re.search(r"[1-9]\d* bytes spill", rest):
                raise fail(f"{kernel} spills registers on {arch}; see {log}.")
        if "instructions are serialized" in text:
            raise fail(f"ptxas serialised wgmma in {log.name[:-6]}; see {log}.")


def publish(built: Path, folder: Path) -> None:
    """Copies a library beside its destination and renames it: a process that has the old one mapped keeps it whole."""
    target = folder / built.name
    if target.is_file() and target.read_bytes() == built.read_bytes():
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copy2(built, aside)
    os.replace(aside, target)


class NinjaBuild(build_ext):
    """build_ext that writes a build.ninja for each target, runs ninja, and places what it made."""

    user_options: ClassVar[list] = [
        *build_ext.user_options,
        ("target=", None, f"one of {', '.join(TARGETS)}; default: {' and '.join(INSTALLED)}"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.target: str | None = None

    def run(self) -> None:
        if self.target not in (None, *TARGETS):
            raise fail(f"--target: got {self.target}, wanted one of {', '.join(TARGETS)}.")
        tools = find_tools()
        for target in [self.target] if self.target is not None else INSTALLED:
            self.make(target, replace(tools, **VARIANTS.get(target, {})))

    def make(self, target: str, tools: Tools) -> None:
        folder = BUILD / target
        self.ninja(tools, folder, ring_edges(tools) if target == "ring" else kernel_edges(tools))
        if tools.nvcc and target != "ring":
            check_ptxas(folder)
        if target in INSTALLED:
            publish(folder / INSTALLED[target], self.destination())

    def ninja(self, tools: Tools, folder: Path, edges: list[str]) -> None:
        parts = [*rules(tools), *edges]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(parts) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [tools.ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            raise fail(f"the native build in {folder.relative_to(HERE)} failed; the compiler's message is above.")

    def destination(self) -> Path:
        return (HERE if self.inplace else Path(self.build_lib)) / "dflash_scale"

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(HERE)) for path in sorted((HERE / "csrc").rglob("*.*"))]

    def get_outputs(self) -> list[str]:
        return [str(self.destination() / name) for name in INSTALLED.values()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        built = Path(self.build_lib) / "dflash_scale"
        return {str(built / name): str(HERE / "dflash_scale" / name) for name in INSTALLED.values()}


def version() -> str:
    found = re.search(r'__version__ = "(.+)"', (HERE / "dflash_scale" / "__init__.py").read_text())
    assert found is not None, "dflash_scale/__init__.py states no __version__"
    return found[1]


REQUIRES = [
    "torch>=2.10",
    "deepspeed>=0.18",
    "transformers>=5.0",
    "datasets",
    "safetensors",
    "pyzmq>=26.4",
    "msgpack",
    "xxhash",
    "pydantic>=2",
    "aiohttp>=3.11",
    "tensorboard",
    "matplotlib",
    "tqdm",
    "numpy",
    "ninja",
    "pybind11",
]

setup(
    name="dflash-scale",
    version=version(),
    description="Trains DFlash drafters for speculative decoding, online, from a fleet of vLLM servers",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dflash_scale", "dflash_scale.*"]),
    package_data={"dflash_scale": [KERNELS]},
    # Only named here, so that setuptools makes a platform wheel and calls build_ext: ninja knows the sources.
    ext_modules=[Extension("dflash_scale._kernels", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    # Only the headers are needed: an environment that has torch must not download another into the isolated build. pip
    # asks for build requirements by egg_info; at any other time find_tools says what is missing in one sentence.
    setup_requires=["torch>=2.10"] if "egg_info" in sys.argv and package_dir("torch") is None else [],
    install_requires=REQUIRES,
    extras_require={"dev": ["pytest", "hypothesis", "ruff", "mypy", "clang-format"]},
    entry_points={"console_scripts": ["dflash-scale = dflash_scale.commands.cli:main"]},
)
