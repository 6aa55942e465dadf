"""Command lines of quietstar as processes of their own, from a parent that imported it once.

Importing torch takes longer than most cases here. So `preload` imports everything, and every
command runs in a child that is forked from there: with its own process group, folder, streams,
limits and, where the tests run as root, without root's rights. The parent itself never computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import pty
import resource
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (str(HERE.parent), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": str(ROOT),
}
ROOTS_RIGHTS = (0, 1, 2, 3, 21, 27)
"""Capabilities by which root passes over permissions, owners and mounts (linux/capability.h)."""
GIB = 2**30
MEMORY = 10 * GIB
"""Address space of a child: what asks for more must say so instead of taking the machine down."""


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def preload() -> None:
    """Import everything that a command may need; call it once, before the first child."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("HF_HOME", _open_folder("faults-hub-"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    import quietstar

    names = [m.name for m in pkgutil.walk_packages(quietstar.__path__, "quietstar.")]
    extras = [
        "peft",
        "scipy.stats",
        "tensorboard",
        "accelerate",
        "torch.utils.tensorboard",
        "datasets.load",
        "transformers.models.llama.modeling_llama",
        "lm_eval.__main__",
        "lm_eval.tasks",
        "lm_eval.evaluator",
    ]
    for name in names + extras:
        if name.endswith("__main__") and name.startswith("quietstar"):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or collections in children would copy the parent's pages


def _open_folder(prefix: str) -> str:
    folder = tempfile.mkdtemp(prefix=prefix)
    os.chmod(folder, 0o777)
    return folder


def new_place(name: str = "faults-") -> Path:
    """Make a temporary folder that other users may enter."""
    return Path(_open_folder(name))


@dataclass
class Outcome:
    """How a child ended."""

    code: int | None  # None: by a signal
    signal: int | None
    timed_out: bool
    seconds: float
    out: str
    err: str
    traceback: str  # of a file in the child's TMPDIR
    ended: float  # time.monotonic()

    @property
    def said(self) -> str:
        """Give what it printed, streams one after the other."""
        return self.out + self.err


class Child:
    """A command line of quietstar, or a function, in a process group of its own.

    Args:
        arguments: Command line, without ``quietstar``.
        cwd: Folder in which it runs.
        place: Folder for its streams and temporary files; by default the parent of ``cwd``.
        function: Runs in place of the command line; its result is the exit code.
        before: Called in the child before the command.
        stdin: What it can read.
        real: Whether to start a new interpreter.
        terminal: Whether its streams are a terminal.
        as_root: Whether it keeps root's rights, if the parent has them.
        environment: More variables.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        *,
        place: Path | None = None,
        function: Callable[[], int | None] | None = None,
        before: Callable[[], object] | None = None,
        stdin: bytes = b"",
        real: bool = False,
        terminal: bool = False,
        as_root: bool = False,
        memory: int = MEMORY,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.arguments, self.cwd, self.real = list(arguments), cwd, real
        self.function, self.before, self.memory = function, before, memory
        self.is_user = os.geteuid() == 0 and not as_root
        self.environment = environment or {}
        self.io = Path(tempfile.mkdtemp(prefix="io-", dir=place or cwd.parent))
        for name in ("tmp", "home"):
            (self.io / name).mkdir()
        (self.io / "stdin").write_bytes(stdin)
        self.screen = b""
        self.master, slave = pty.openpty() if terminal else (None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(slave)
        if slave is not None:
            os.close(slave)
            os.write(self.master, stdin)
        self.status: int | None = None
        self.ended = 0.0

    def _be_child(self, slave: int | None) -> None:
        code = 1
        try:
            os.setsid()
            if slave is not None:
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
                streams = [slave] * 3
            else:
                streams = [os.open(self.io / "stdin", os.O_RDONLY)]
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                streams += [os.open(self.io / n, flags, 0o666) for n in ("stdout", "stderr")]
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            self._open_streams()
            os.environ |= {"HOME": str(self.io / "home"), "TMPDIR": str(self.io / "tmp")}
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "200"}
            os.environ |= self.environment
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))
            os.umask(0o022)
            if self.is_user:
                drop_rights()
            os.chdir(self.cwd)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler
                              if number == signal.SIGINT else signal.SIG_DFL)  # fmt: skip
            if self.real:
                call = [sys.executable, "-m", "quietstar", *self.arguments]
                os.execve(sys.executable, call, dict(os.environ))
            if self.before is not None:
                self.before()
            sys.argv = ["quietstar", *self.arguments]
            code = (self.function or self._main)() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                sys.stderr.write(stop.code + "\n")
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(BaseException):
                    stream.flush()
            os._exit(code)

    def _open_streams(self) -> None:
        """Replace the parent's streams, which know another terminal."""
        kinds = (("stdin", "surrogateescape"), ("stdout", "strict"), ("stderr", "backslashreplace"))
        for number, (name, errors) in enumerate(kinds):
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    def _main(self) -> int | None:
        from quietstar.cli.main import main

        return main(self.arguments)

    def poll(self) -> bool:
        """Return whether it has ended."""
        self._read_screen()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = status, time.monotonic()
        return self.status is not None

    def _read_screen(self) -> None:
        while self.master is not None and select.select([self.master], [], [], 0)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other side is closed
                data = b""
            if not data:
                return
            self.screen += data

    def kill(self, number: int = signal.SIGKILL, group: bool = True) -> None:
        """Signal it, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float = 60.0) -> Outcome:
        """Wait for its end; one that takes longer is killed."""
        timed_out, pause = False, 0.002
        while not self.poll():
            if time.monotonic() - self.began > timeout and not timed_out:
                timed_out = True
                self.kill()
            time.sleep(pause)
            pause = min(0.05, pause * 1.2)
        self.kill()  # whatever it left
        self._read_screen()
        if self.master is not None:
            os.close(self.master)
            self.master = None
        killed = os.WIFSIGNALED(self.status)
        streams = [self.screen, b""]
        if not self.screen and (self.io / "stdout").exists():
            streams = [(self.io / name).read_bytes() for name in ("stdout", "stderr")]
        out, err = (s.decode("utf-8", "surrogateescape") for s in streams)
        found = sorted((self.io / "tmp").glob("quietstar-traceback-*"))
        return Outcome(
            None if killed else os.WEXITSTATUS(self.status),
            os.WTERMSIG(self.status) if killed else None,
            timed_out, self.ended - self.began, out, err,
            "".join(path.read_text(errors="replace") for path in found), self.ended,
        )  # fmt: skip


def drop_rights() -> None:
    """Have root obey permissions as any user, also in what this process starts.

    Another user could not read the interpreter where it is installed in root's home.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    failed = libc.capget(header, sets)
    for right in ROOTS_RIGHTS:
        failed |= libc.prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP
        for index in range(3):
            sets[index] &= ~(1 << right)
    if failed | libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "root's rights cannot be dropped")


def call(function: Callable[[], Any], place: Path, timeout: float = 600.0) -> Any:
    """Run a function in a child and return its result, which JSON must be able to hold.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    descriptor, name = tempfile.mkstemp(dir=place, suffix=".json")
    os.close(descriptor)
    os.chmod(name, 0o666)

    def run() -> int:
        Path(name).write_text(json.dumps(function()))
        return 0

    outcome = Child([], place, place=place, function=run, as_root=True).wait(timeout)
    if outcome.code != 0:
        raise RuntimeError(f"{function}: exit {outcome.code}\n{outcome.said}")
    return json.loads(Path(name).read_text())


def runs_alone(script: str, *arguments: str, timeout: float = 600.0) -> dict[str, Any]:
    """Run a script of this folder in a new interpreter; return what it wrote with ``--json``.

    The test process itself must not fork: its threads, and the package's checks of types that
    pytest turns on, would be in the children.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(HERE / script), "--json", str(path), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(path.read_text())
