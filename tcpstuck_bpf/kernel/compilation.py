"""Describes a compilation, and runs it in a child process.

The child gets one JSON object on standard input. It writes an artifact (`artifact`) to standard
output, or exits with a non-zero status and an error text. This module itself needs no BCC.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.artifact import Artifact, DamagedError

PROGRAM_TEXTS = (
    "tcpstuck.bpf.c",
    "segment.bpf.c",
    "listener.bpf.c",
    "events.bpf.c",
    "rescue.bpf.c",
    "syn.bpf.c",
    "ack.bpf.c",
    "dropped.bpf.c",
    "entries.bpf.c",
)
"""One file for each subject, in the order in which they are joined to one text. They are joined
because BCC translates table accesses only in its main text, not in included files."""
COMPILE_LIMIT_S = 600.0
"""A compilation takes a quarter of a second, or a minute in a busy emulated machine."""
NO_BCC = "no BCC"
_DISTRIBUTION_S_PREFIX = "/usr"
REFUSED_STATUS = 3
"""The child's exit status when it writes an error's three lines instead of an artifact."""
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tcpstuck_bpf.kernel import compiler; sys.exit(compiler.main())"
)
"""The child uses exactly our search path, so it runs nothing from the current directory."""
_VERSION = re.compile(r"__version__\s*=\s*['\"]([^'\"]+)['\"]")
_KERNEL_S_NAMES = {"x86": "x86_64", "arm64": "aarch64"}
"""uname(2)'s name of an architecture, by BCC's name."""


class CompilerError(Exception):
    """The compiler failed, or the kernel refused a table meanwhile. The text is one line."""


@dataclass(frozen=True)
class Compilation:
    """All inputs of an artifact."""

    header: str
    """kernel_layout.h: the target kernel's layout, as C."""
    flags: Sequence[str]
    mode: str
    kinds: Mapping[str, str]
    """Kinds of the programs that are not attached to functions, by their names in the text."""
    made_for: str
    """The target kernel, in words."""
    compile_for: str = ""
    """BCC's name of the target architecture, such as `arm64`; empty for this machine's."""

    @property
    def architecture(self) -> str:
        """uname(2)'s name of the target architecture."""
        own = platform.machine()
        return _KERNEL_S_NAMES.get(self.compile_for, self.compile_for) or own

    @property
    def all_flags(self) -> list[str]:
        """All flags for the compiler."""
        return [*self.flags, *(["-DTCPSTUCK_FENTRY"] if self.mode == "fentry" else [])]

    def identity(self) -> str:
        """A hash of all inputs and of the text. Equal hashes mean equal programs.

        The compiler is left out, so that a machine without one can check what fits.
        """
        inputs = json.dumps(
            [self.header, self.all_flags, self.mode, dict(self.kinds), self.architecture],
            sort_keys=True,
        )
        parts = (artifact.MAGIC, text_digest(), inputs.encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()


@functools.cache
def program_directory() -> Path:
    """Directory of the BPF text: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / PROGRAM_TEXTS[0]).is_file():
            return candidate
    raise CannotTraceError(
        "the BPF program text is missing",
        f"neither {package / 'bpf'} nor {package.parent / 'bpf'} has {PROGRAM_TEXTS[0]}",
        "install tcpstuck-trace again",
    )


def program_text(directory: Path) -> bytes:
    """The whole BPF text, from `program_directory`. Raises OSError."""
    return b"\n".join((directory / name).read_bytes() for name in PROGRAM_TEXTS)


@functools.cache
def text_digest() -> bytes:
    """A hash of the BPF text and all that it includes."""
    directory = program_directory()
    digest = hashlib.sha256()
    for path in sorted((*directory.glob("*.[ch]"), *directory.glob("stub/**/*.h"))):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(directory)}\n{len(text)}\n".encode())
        digest.update(text)
    return digest.digest()


@functools.cache
def _find_bcc() -> tuple[str, str] | None:
    """Version and directory of the BCC that the child will import; None if there is none.

    This does not import BCC, which would load LLVM into this process.
    """
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        return None
    places = None if spec is None else spec.submodule_search_locations
    for place in places or ():
        try:
            found = _VERSION.search(Path(place, "version.py").read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            found = None
        return (found.group(1) if found else "of unknown version"), place
    return None


def bcc_version() -> str:
    """Version of the BCC that the child will import; NO_BCC if there is none."""
    found = _find_bcc()
    return NO_BCC if found is None else found[0]


def _bcc_remedy() -> str:
    """Commands after which this interpreter finds BCC."""
    install = "apt install python3-bpfcc (or dnf install python3-bcc)"
    if sys.base_prefix != _DISTRIBUTION_S_PREFIX:
        return (
            f"{install}, and tcpstuck-trace in an environment of the distribution's Python "
            "(/usr/bin/python3 -m venv --system-site-packages DIR)"
        )
    if sys.prefix == sys.base_prefix:
        return install
    setting = Path(sys.prefix, "pyvenv.cfg")
    let_see = f"sed -i '/^include-system/s/false/true/' {shlex.quote(str(setting))}"
    return f"{install}, and let this environment see it: {let_see}"


def require_bcc() -> str:
    """BCC's version and directory, as text. Raises CannotTraceError if there is no BCC."""
    found = _find_bcc()
    if found is None:
        raise CannotTraceError(
            "BCC's Python module is not installed",
            "BCC compiles the programs, and no `bcc` is on Python's search path",
            f"install it from the distribution (`bcc` on PyPI is something else): {_bcc_remedy()}; "
            "or trace with programs that --build made elsewhere: --programs DIR",
        )
    return f"{found[0]} ({found[1]})"


def _telling(messages: str) -> str:
    """The most useful lines that the compiler, libbcc and Python printed."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "not permitted" in line]
    last = lines[-1:] if lines else []
    return ": ".join(dict.fromkeys([*telling[:1], *last])) or "it printed nothing"


def compile_in_child(wanted: Compilation) -> bytes:
    """Compile, and return the artifact as bytes that have passed `artifact.decode`.

    Raises CannotTraceError where there is no BCC, and CompilerError where it fails.
    """
    require_bcc()
    request: dict[str, Any] = {
        "directory": str(program_directory()),
        "header": wanted.header,
        "flags": wanted.all_flags,
        "mode": wanted.mode,
        "kinds": dict(wanted.kinds),
        "compile_for": wanted.compile_for,
        "identity": wanted.identity(),
        "made_for": wanted.made_for,
        "architecture": wanted.architecture,
    }
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path)],
            input=json.dumps(request).encode("ascii"),
            capture_output=True,
            timeout=COMPILE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"the compiler did not end within {COMPILE_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise CompilerError(f"the compiler cannot be started: {error.strerror}") from error
    if child.returncode == REFUSED_STATUS:
        raise CannotTraceError(*json.loads(child.stdout))
    messages = child.stderr.decode("utf-8", "backslashreplace")
    if child.returncode < 0:
        raise CompilerError(f"the compiler was ended by signal {-child.returncode}")
    if child.returncode:
        raise CompilerError(_telling(messages))
    try:
        artifact.decode(child.stdout)
    except DamagedError as error:
        raise CompilerError(f"the compiler's output is damaged: {error}") from error
    return child.stdout


def decoded(data: bytes, wanted: Compilation) -> Artifact:
    """The artifact in these bytes. Raises DamagedError if they are not the one that is wanted."""
    found = artifact.decode(data)
    if found.identity != wanted.identity():
        raise DamagedError("it was made from other inputs")
    return found
