"""The kernel's symbols. Only this module reads /proc/kallsyms."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError

_SYMBOLS = Path("/proc/kallsyms")


def function_symbols(functions: Collection[str]) -> frozenset[str]:
    """The symbols in /proc/kallsyms that are in `functions`, also with a compiler's suffix.

    Empty where the file cannot be read.
    """
    try:
        symbols = _SYMBOLS.read_bytes()
    except OSError:
        return frozenset()
    names = "|".join(map(re.escape, functions)).encode()
    found = re.findall(rb"^\S+ [tTwW] ((?:%s)(?:\.[\w.]+)?)$" % names, symbols, re.MULTILINE)
    return frozenset(name.decode("ascii") for name in found)


def read_symbols(functions: Collection[str], data_symbol: str) -> tuple[frozenset[str], int | None]:
    """Which of `functions` the kernel has, and the address of `data_symbol` (None if hidden).

    Source: /proc/kallsyms, whose addresses read as zero without CAP_SYSLOG or with
    kptr_restrict=2. Raises CannotTraceError where it cannot be read.
    """
    try:
        symbols = _SYMBOLS.read_bytes()
    except OSError as error:
        raise CannotTraceError(
            "the kernel's symbol table cannot be read",
            f"{_SYMBOLS}: {error.strerror}",
            "use a kernel built with CONFIG_KALLSYMS=y and mount /proc",
        ) from error
    found = frozenset(name for name in functions if b" " + name.encode() + b"\n" in symbols)
    line_end = symbols.find(b" " + data_symbol.encode() + b"\n")
    if line_end < 0:
        return found, None
    line_start = symbols.rfind(b"\n", 0, line_end) + 1
    return found, int(symbols[line_start:line_end].split()[0], 16) or None


_FUNCTION_KINDS = frozenset(b"tTwW")


def place_names(addresses: Iterable[int]) -> dict[int, str]:
    """Kernel and module addresses as `symbol+0x1f`, or in hexadecimal if symbols are hidden.

    Source: /proc/kallsyms, read at each call because modules come and go.
    """
    try:
        lines = _SYMBOLS.read_bytes().splitlines()
    except OSError:
        lines = []
    symbols = sorted(_functions(lines))
    starts = [start for start, _ in symbols]
    found = {}
    for address in addresses:
        index = bisect.bisect_right(starts, address) - 1
        found[address] = f"{address:#x}"
        if index >= 0:
            start, name = symbols[index]
            found[address] = f"{name}+{address - start:#x}"
    return found


def _functions(lines: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Address and name of each function; hidden addresses read as 0 and are left out."""
    for line in lines:
        address, kind, name = line.split(maxsplit=2)
        if kind[0] in _FUNCTION_KINDS and address.strip(b"0"):
            yield int(address, 16), name.split()[0].decode("ascii", "backslashreplace")
