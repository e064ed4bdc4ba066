"""llama.cpp with its RPC backend from a pinned source package, and SmolLM2 in bfloat16 for it. Made once, then found.

    python -m bench.peers.llama_cpp_build             builds what is missing and prints where it is
    python -m bench.peers.llama_cpp_build --jobs 4    the same with four compilers at once

Everything lies in ``peers/llama.cpp-VERSION`` of the cache folder. A second call only looks. The build is Release, with
the instruction sets of this machine's processor and no others: it must not be copied to another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from molink_common.errors import MolinkError
from molink_common.folders import cache_folder
from molink_stage_worker.models.demo import GGUF_NAME, fetch_demo

VERSION = "0.3.36"
"""Of the package llama-cpp-python, whose source package carries llama.cpp whole."""
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

TARGETS = ("ggml-rpc-server", "llama-server", "llama-quantize")
MODEL_NAME = "smollm2-bf16.gguf"

_FETCH_TIMEOUT_S = 1800.0
_BUILD_TIMEOUT_S = 4 * 3600.0
_MODEL_TIMEOUT_S = 600.0
_VENDORED = "vendor/llama.cpp/"

_FIXED_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_RPC": "ON",
    "GGML_RPC_RDMA": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_CCACHE": "OFF",
    # its own matrix kernels with bfloat16 dot products: what a build by hand has too
    "GGML_LLAMAFILE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    # else the build downloads a web page from a model hub
    "LLAMA_USE_PREBUILT_UI": "OFF",
}

_NEEDED_FLAGS = {
    "GGML_SSE42": {"sse4_2"},
    "GGML_AVX": {"avx"},
    "GGML_AVX2": {"avx2"},
    "GGML_BMI2": {"bmi2"},
    "GGML_FMA": {"fma"},
    "GGML_F16C": {"f16c"},
    "GGML_AVX_VNNI": {"avx_vnni"},
    # this one option turns on five instruction sets at once
    "GGML_AVX512": {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"},
    "GGML_AVX512_VBMI": {"avx512vbmi"},
    "GGML_AVX512_VNNI": {"avx512_vnni"},
    "GGML_AVX512_BF16": {"avx512_bf16"},
    "GGML_AMX_TILE": {"amx_tile"},
    "GGML_AMX_INT8": {"amx_int8"},
    "GGML_AMX_BF16": {"amx_bf16"},
}
"""What Linux must name among a processor's flags for an option of the build to be on."""


class CannotBuildPeer(MolinkError):
    """The peer cannot be fetched, built or given a model. The message says what failed, or what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """A finished build and its model."""

    rpc_server: Path
    server: Path
    model: Path
    options: dict[str, str]
    """What cmake was given."""
    build_s: float
    """What the compilers took, when they ran."""


def processor_options(cpuinfo: str) -> dict[str, str]:
    """An option of the build for each instruction set, from the text of ``/proc/cpuinfo``.

    Where that names no x86 flags, the compiler is asked for what this machine has.
    """
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if line is None:
        return {"GGML_NATIVE": "ON"}
    has = frozenset(line.partition(":")[2].split())
    return {option: "ON" if needed <= has else "OFF" for option, needed in _NEEDED_FLAGS.items()}


def cmake_options(cpuinfo: str) -> dict[str, str]:
    """Everything that decides what the build becomes, beside the compiler."""
    return {**_FIXED_OPTIONS, **processor_options(cpuinfo)}


def ensure_llama_cpp(jobs: int = 1) -> LlamaCpp:
    """The build and its model, made now where they are missing. Takes minutes then, and at most 4 hours.

    Several processes may ask at once: one builds, the others wait for it.

    Raises:
        CannotBuildPeer: no compiler, no network, or the build failed.
    """
    folder = cache_folder() / "peers" / f"llama.cpp-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=_BUILD_TIMEOUT_S):
        options = cmake_options(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        build_s = _read_stamp(folder, options)
        if build_s is None:
            if not (folder / "source").exists():
                _fetch_source(folder)
            build_s = _build(folder, options, jobs)
            _write_stamp(folder, options, build_s)
        binaries = folder / "build" / "bin"
        if not (folder / MODEL_NAME).exists():
            _make_model(binaries / "llama-quantize", folder)
    return LlamaCpp(
        rpc_server=binaries / "ggml-rpc-server",
        server=binaries / "llama-server",
        model=folder / MODEL_NAME,
        options=options,
        build_s=build_s,
    )


def _read_stamp(folder: Path, options: dict[str, str]) -> float | None:
    """The seconds that the build took, or None where there is none with these options."""
    stamp = folder / "built.json"
    if not stamp.exists() or not all((folder / "build" / "bin" / target).exists() for target in TARGETS):
        return None
    written = json.loads(stamp.read_text(encoding="utf-8"))
    return float(written["build_s"]) if written["options"] == options else None


def _write_stamp(folder: Path, options: dict[str, str], build_s: float) -> None:
    text = json.dumps({"build_s": round(build_s, 1), "options": options}, indent=1)
    (folder / "built.json").write_text(text, encoding="utf-8")


def _fetch_source(folder: Path) -> None:
    """llama.cpp out of the source package, into ``source``; whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        wanted = scratch / "requirements.txt"
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        command += ["--dest", str(scratch), "--require-hashes", "--requirement", str(wanted)]
        _run(command, scratch / "pip.log", _FETCH_TIMEOUT_S)
        archive = next(iter(scratch.glob("*.tar.gz")), None)
        if archive is None:
            raise CannotBuildPeer(f"pip fetched no source package of llama-cpp-python {VERSION}")
        with tarfile.open(archive) as package:
            members = [member for member in package.getmembers() if member.name.partition("/")[2].startswith(_VENDORED)]
            package.extractall(scratch / "unpacked", members=members, filter="data")
        vendored = next(iter((scratch / "unpacked").glob("*/vendor/llama.cpp")), None)
        if vendored is None:
            raise CannotBuildPeer(f"{archive.name} carries no vendor/llama.cpp")
        vendored.rename(folder / "source")


def _build(folder: Path, options: dict[str, str], jobs: int) -> float:
    """Configure and compile at the lowest priority; the seconds it took."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise CannotBuildPeer(f"{' and '.join(missing)} missing: apt install cmake g++ ninja-build")
    build = folder / "build"
    configure = ["cmake", "-S", str(folder / "source"), "-B", str(build)]
    if shutil.which("ninja") is not None:
        configure += ["-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    started = time.monotonic()
    _run(configure, folder / "configure.log", _FETCH_TIMEOUT_S)
    compile_all = ["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *TARGETS]
    _run(compile_all, folder / "build.log", _BUILD_TIMEOUT_S)
    return time.monotonic() - started


def _make_model(quantize: Path, folder: Path) -> None:
    """SmolLM2 in bfloat16: the demo model's own file, widened by llama.cpp's tool. The tokenizer stays as it is."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        fetch_demo(scratch, lambda _doing, _share: None)
        fresh = scratch / MODEL_NAME
        command = [str(quantize), "--allow-requantize", str(scratch / GGUF_NAME), str(fresh), "BF16", "1"]
        _run(command, scratch / "quantize.log", _MODEL_TIMEOUT_S)
        fresh.rename(folder / MODEL_NAME)


def _run(command: Sequence[str], log: Path, timeout_s: float) -> None:
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    with log.open("wb") as out:
        try:
            result = subprocess.run(
                [*nice, *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout_s, check=False, env=dict(os.environ),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CannotBuildPeer(f"{command[0]} did not end within {timeout_s:g} s") from error
    if result.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CannotBuildPeer(f"{' '.join(command[:4])} failed:\n{tail}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.llama_cpp_build", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    arguments = parser.parse_args(argv)
    try:
        built = ensure_llama_cpp(arguments.jobs)
    except MolinkError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{built.rpc_server}\n{built.server}\n{built.model}")
    print(f"built in {built.build_s:.0f} s with", " ".join(f"-D{key}={value}" for key, value in built.options.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
