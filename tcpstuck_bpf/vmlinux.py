"""A kernel in a file: an ELF vmlinux, a flat Image, or a compressed /boot/vmlinuz that holds one.

From it come the kernel's types (its .BTF section, else DWARF), its release, and the names of its
functions where it has a symbol table. The kernel need not run.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import mmap
import os
import re
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Union

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from tcpstuck_bpf.btf import Btf
from tcpstuck_bpf.dwarf import Dwarf, has_dwarf
from tcpstuck_bpf.errors import CannotTraceError, TcpstuckError, UsageError
from tcpstuck_bpf.kernel_types import KernelTypes
from tcpstuck_bpf.programs import ENVIRONMENT, find_program

ELF_MAGIC = b"\x7fELF"
FLAT_MAGIC_PLACE = 56
FLAT_MAGICS = {b"ARM\x64": "aarch64", b"RSC\x05": "riscv64"}
"""Of a flat Image (Documentation/arch/arm64/booting.rst, arch/riscv/boot-image-header.rst), and the
architecture as uname(2) names it."""
HEAD_BYTES = FLAT_MAGIC_PLACE + 4
_ELF_MACHINE = struct.Struct("<18xH")
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine of elf.h."""
BTF_HEADER = struct.pack("=HBBI", 0xEB9F, 1, 0, 24)
BTF_HEADER_BYTES = 24
LARGEST_UNPACKED = 1 << 30
"""Bytes. A distribution's kernel unpacks to 40 to 70 MB."""
LARGEST_UNMAPPED = 1 << 26
"""Bytes."""
UNPACKING_LIMIT_S = 300
LZMA_MEMORY_LIMIT = 1 << 29

# linux_banner of init/version.c; /proc/version shows the same text.
_BANNER = re.compile(rb"Linux version ([!-~]{1,64}) \([ -~]{1,1024}")

_Bytes = Union[bytes, mmap.mmap]


class _Unpacker(Protocol):
    def decompress(self, data: memoryview, max_length: int) -> bytes:
        """At most that many bytes of what `data` holds, whatever follows it."""


class _Packing(NamedTuple):
    """A way to compress a kernel (the kernel's scripts/extract-vmlinux knows the same)."""

    name: str
    magic: bytes
    unpacker: Callable[[], _Unpacker] | None
    """None where Python has none and `program` has to do it."""
    program: str = ""


def _gzip() -> _Unpacker:
    return zlib.decompressobj(wbits=31)


def _xz() -> _Unpacker:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_LIMIT)


def _lzma() -> _Unpacker:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY_LIMIT)


_PACKINGS = (
    _Packing("gzip", b"\x1f\x8b\x08", _gzip),
    _Packing("xz", b"\xfd7zXZ\0", _xz),
    _Packing("zstd", b"\x28\xb5\x2f\xfd", None, "zstd"),
    _Packing("bzip2", b"BZh", bz2.BZ2Decompressor),
    _Packing("lzma", b"\x5d\0\0", _lzma),
    _Packing("lz4", b"\x02\x21\x4c\x18", None, "lz4"),
    _Packing("lzo", b"\x89LZO\0\r\n\x1a\n", None, "lzop"),
)


@dataclass(frozen=True)
class KernelImage:
    """What a file tells of a kernel."""

    path: str
    packing: str
    """How it is compressed, `none` for an ELF file."""
    release: str
    """As in uname(2)."""
    banners: tuple[str, ...]
    """Its `Linux version ...` texts: the first of two link passes may leave one of its own."""
    types: KernelTypes
    symbols: frozenset[str] | None
    """Names of its functions; None where it has no symbol table."""
    architecture: str
    """As in uname(2); empty for one that is not known here."""


def read_image(path: str) -> KernelImage:
    """Read a kernel from a file.

    Raises UsageError where the file is none, and CannotTraceError where what it holds cannot be
    read here: no program to unpack it, or no type information.
    """
    data = _read(path)
    packing = "none"
    if not _is_kernel(data[:HEAD_BYTES]):
        packing, data = _unpacked(path, data)
    types, symbols = _flat(data, path) if _is_flat(data[:HEAD_BYTES]) else _elf(data, path)
    banners = list(_BANNER.finditer(data))
    release = banners[0][1].decode("ascii")
    texts = tuple(banner[0].decode("ascii") for banner in banners)
    machine = _architecture(data[:HEAD_BYTES])
    return KernelImage(path, packing, release, texts, types, symbols, machine)


def _architecture(head: bytes) -> str:
    if _is_flat(head):
        return FLAT_MAGICS[head[FLAT_MAGIC_PLACE:HEAD_BYTES]]
    return _ELF_MACHINES.get(_ELF_MACHINE.unpack_from(head)[0], "")


def _is_flat(head: bytes) -> bool:
    return head[FLAT_MAGIC_PLACE:HEAD_BYTES] in FLAT_MAGICS


def _is_kernel(head: bytes) -> bool:
    return head.startswith(ELF_MAGIC) or _is_flat(head)


def _require_banner(data: _Bytes, path: str) -> None:
    if _BANNER.search(data) is None:
        raise UsageError(
            f"{path} is not a Linux kernel",
            "it has no text `Linux version ...`; a file of debug information alone has none either",
            "name a vmlinux, or a /boot/vmlinuz-...",
        )


def _elf(data: _Bytes, path: str) -> tuple[KernelTypes, frozenset[str] | None]:
    try:
        elf = ELFFile(io.BytesIO(data) if isinstance(data, bytes) else data)
        # Before anything is looked for in it: of a truncated file everything may be missing. The
        # table of sections comes last.
        needed = elf["e_shoff"] + elf["e_shnum"] * elf["e_shentsize"]
        if len(data) < needed:
            raise _damaged(path, f"it ends after {len(data)} of {needed} bytes")
        _require_banner(data, path)
        return _types(elf, path), _functions(elf)
    except TcpstuckError:
        raise
    except Exception as error:  # pyelftools raises whatever it meets in a damaged file
        raise _damaged(path, f"{type(error).__name__} {error}") from error


def _flat(data: _Bytes, path: str) -> tuple[KernelTypes, None]:
    """The types in an Image, which has no sections: what begins as BTF does and can be read."""
    _require_banner(data, path)
    place = data.find(BTF_HEADER)
    while place != -1:
        length = Btf.length(data[place : place + BTF_HEADER_BYTES])
        try:
            return Btf(data[place : place + length], path), None
        except CannotTraceError:
            place = data.find(BTF_HEADER, place + 1)
    raise CannotTraceError(
        f"{path} does not describe the kernel's types",
        "it holds no whole BTF (CONFIG_DEBUG_INFO_BTF), and being no ELF file no DWARF",
        "name the vmlinux of the kernel's debug package",
    )


def types_of_running_kernel(path: str) -> KernelTypes:
    """The types in the running kernel's own file.

    Raises what read_image raises, and CannotTraceError where the file is of another kernel:
    another build of the same release may already have its members elsewhere.
    """
    image, running = read_image(path), os.uname()
    if image.release != running.release:
        difference = f"it is Linux {image.release}, the running kernel is {running.release}"
    elif not any(banner.endswith(running.version) for banner in image.banners):
        difference = f"it is another build of {running.release}, not `{running.version}`"
    else:
        return image.types
    raise CannotTraceError(
        f"{path} is not the file of the running kernel",
        difference,
        f"name /boot/vmlinuz-{running.release}, or the vmlinux of its debug package",
    )


def _read(path: str) -> _Bytes:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UsageError(
                f"{path} is not a kernel", "it is no regular file", "name a vmlinux or vmlinuz"
            )
        with Path(path).open("rb") as file:
            # Mapped, not read: with debug information a vmlinux has up to a gigabyte.
            with contextlib.suppress(OSError, ValueError):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Those of /proc and of /sys cannot be mapped; /proc/kcore has no end.
            data = file.read(LARGEST_UNMAPPED)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if not data:
        raise _unreadable(path, "it is empty")
    return data


def _unreadable(path: str, why: str | None) -> UsageError:
    remedy = "name a vmlinux or vmlinuz that you may read"
    return UsageError(f"cannot read {path}", why or "for no reason given", remedy)


def _damaged(path: str, why: str) -> UsageError:
    return UsageError(
        f"{path} is not a readable kernel", f"damaged or truncated: {why}", "name another file"
    )


def _unpacked(path: str, data: _Bytes) -> tuple[str, bytes]:
    """The kernel in a compressed image, and how it was compressed.

    An image begins with a loader of its own, and the magic numbers are short: only what unpacks
    to an ELF file or a flat Image is believed.
    """
    lacking = None
    with memoryview(data) as view:
        for packing, place in _hits(data):
            if packing.unpacker is not None:
                unpacked = _unpack(path, packing.unpacker, view[place:])
            elif find_program(packing.program) is None:
                lacking = lacking or packing
                continue
            else:
                unpacked = _unpack_by_program(packing.program, view[place:])
            if unpacked is not None:
                return packing.name, unpacked
    if lacking is not None:
        raise CannotTraceError(
            f"cannot unpack {path}",
            f"it seems to be compressed by {lacking.name}; no program `{lacking.program}` is here",
            f"install {lacking.program} (apt install {lacking.program}), or name the vmlinux",
        )
    raise UsageError(
        f"{path} is not a Linux kernel",
        "it is neither an ELF file or flat Image nor holds a compressed one that can be unpacked; "
        "one that is truncated early looks the same",
        "name a vmlinux, or a /boot/vmlinuz-...",
    )


def _hits(data: _Bytes) -> Iterator[tuple[_Packing, int]]:
    """Every place where a compressed stream may begin, in order."""
    magics = re.compile(b"|".join(re.escape(packing.magic) for packing in _PACKINGS))
    for found in magics.finditer(data):
        for packing in _PACKINGS:
            if packing.magic == found[0]:
                yield packing, found.start()


def _unpack(path: str, make: Callable[[], _Unpacker], packed: memoryview) -> bytes | None:
    """None for a false hit. Raises UsageError where the stream is right but broken."""
    try:
        if not _is_kernel(make().decompress(packed, HEAD_BYTES)):
            return None
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        return None
    try:
        return make().decompress(packed, LARGEST_UNPACKED)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _unpack_by_program(program: str, packed: memoryview) -> bytes | None:
    """None for a false hit. What follows the stream makes the program fail after its output."""
    try:
        ended = subprocess.run(
            [find_program(program) or program, "-dc"],
            input=packed,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=UNPACKING_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout if _is_kernel(ended.stdout[:HEAD_BYTES]) else None


def _types(elf: ELFFile, path: str) -> KernelTypes:
    if elf.elfclass != 64:
        raise UsageError(
            f"{path} is not a kernel that can be traced",
            f"it is a {elf.elfclass}-bit one",
            "name the file of a 64-bit kernel",
        )
    if elf.little_endian != (sys.byteorder == "little"):
        raise UsageError(
            f"{path} is of another byte order than this machine",
            "its type information can be read on a machine of its own byte order only",
            "look at it there",
        )
    section = elf.get_section_by_name(".BTF")
    if section is not None:
        try:
            return Btf(section.data(), path)
        except CannotTraceError as error:
            raise _damaged(path, f".BTF: {error.why}") from error
    if has_dwarf(elf):
        return Dwarf(elf, path)
    raise CannotTraceError(
        f"{path} does not describe the kernel's types",
        "it has neither a .BTF section (CONFIG_DEBUG_INFO_BTF) nor DWARF (.debug_info)",
        "name the vmlinux of the kernel's debug package",
    )


def _functions(elf: ELFFile) -> frozenset[str] | None:
    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        return None
    return frozenset(
        symbol.name for symbol in table.iter_symbols() if symbol["st_info"]["type"] == "STT_FUNC"
    )
