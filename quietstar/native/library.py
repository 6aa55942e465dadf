"""Compiling the C++ files of this folder, on first use, as one library.

They hold plain functions on memory, without torch's headers: a compiler needs two seconds, once a
machine (results are kept in the user's cache folder). Without a compiler, or where it fails,
torch's own operators do the same. ``QUIETSTAR_NATIVE=0`` leaves them out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs
import torch

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno",
          "-fno-trapping-math")  # fmt: skip
_FOLDER = Path(__file__).parent
_FLAGS_OF = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
               "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}  # fmt: skip
"""By torch's name of what a processor can."""


def find_compiler() -> tuple[str, ...] | None:
    """Command of this machine's C++ compiler: CXX, or the first of the usual ones."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        logger.warning("CXX=%s cannot be read (%s); looking for others", os.environ["CXX"], error)
        wanted = []
    for name, *arguments in filter(None, (wanted, *([name] for name in COMPILERS))):
        found = shutil.which(name)
        if found is not None:
            return found, *arguments
        if [name, *arguments] == wanted:
            logger.warning("there is no compiler CXX=%s; looking for others", " ".join(wanted))
    return None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled files, or None where they cannot be had; says so once."""
    if os.environ.get("QUIETSTAR_NATIVE", "1") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        logger.info("no C++ compiler: torch's operators do what compiled loops would, slower")
        return None
    try:
        return _loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "the C++ files could not be compiled (%s); torch's operators do the same, slower. CXX "
            "names another compiler, XDG_CACHE_HOME another folder to keep the result in, and "
            "QUIETSTAR_NATIVE=0 leaves them out",
            _reason(error),
        )
        return None


def _loaded(compiler: tuple[str, ...]) -> ctypes.CDLL:
    library = _compiled(compiler)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # damaged: a full disk, a machine that went down
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(compiler)))


def _compiled(compiler: tuple[str, ...]) -> Path:
    """The shared library, made where it is not there yet."""
    flags = (*_FLAGS, *_FLAGS_OF.get(torch.backends.cpu.get_cpu_capability(), ()))
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    contents = [path.read_text("utf-8") for path in files]
    key = hashlib.sha256(repr((compiler, flags, contents)).encode()).hexdigest()
    folder = platformdirs.user_cache_path("quietstar")
    library = folder / f"native-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            sources = [str(path) for path in files if path.suffix == ".cpp"]
            command = [*compiler, *flags, *sources, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(library)  # at once: other ranks may be doing the same
    return library


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and not error.stderr:
        return f"{error.cmd[0]} ended with exit code {error.returncode}"
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
