"""The part of a recording that filters choose: by port, family, address and network namespace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.model import FourTuple, TraceFilter, address_text
from tcpstuck_bpf.usage import nearest


@dataclass(frozen=True)
class Wanted:
    """The wanted part of a recording. An empty or None field does not restrict it."""

    ports: Collection[int] = ()
    ports_text: str = ""
    family: int | None = None
    address: bytes | None = None
    netns: str | None = None
    """A name in the recording, or an inode number."""
    timeout_ns: int | None = None


class Part:
    """A part of a recording that was made with the filters `watched`, which are `words` as text.

    Raises UsageError if the recording does not contain the wanted part.
    """

    def __init__(
        self, wanted: Wanted, watched: TraceFilter, words: str, netns_names: Mapping[int, str]
    ) -> None:
        self._wanted = _less_than(watched, wanted)
        self.netns = _netns_of(wanted.netns, netns_names)
        """Inode numbers of the wanted network namespaces; None: all."""
        _refuse_what_was_not_watched(self._wanted, self.netns, watched, words)
        self.words = _in_words(self._wanted)
        """The part as text; empty if it is the whole recording."""

    def selects(self, who: FourTuple) -> bool:
        """Whether a connection belongs to it."""
        wanted = self._wanted
        return (
            (not wanted.ports or who.server_port in wanted.ports)
            and wanted.family in (None, who.family)
            and wanted.address in (None, who.server_address)
            and (self.netns is None or who.netns in self.netns)
        )


def _less_than(watched: TraceFilter, wanted: Wanted) -> Wanted:
    """The same filters without those that the recording was already made with."""
    return replace(
        wanted,
        ports=() if {*wanted.ports} == {*watched.ports} else wanted.ports,
        family=None if wanted.family == watched.family else wanted.family,
        address=None if wanted.address == watched.listener_address else wanted.address,
    )


def _in_words(wanted: Wanted) -> str:
    words = []
    if wanted.ports:
        words.append(f"port{'s' * (len(wanted.ports) > 1)} {wanted.ports_text}")
    if wanted.address is not None:
        words.append(f"address {address_text(wanted.address)}")
    if wanted.family is not None:
        words.append(f"IPv{wanted.family}")
    if wanted.netns is not None:
        words.append(f"network namespace {wanted.netns}")
    return ", ".join(words)


def _netns_of(text: str | None, names: Mapping[int, str]) -> Collection[int] | None:
    """The inode numbers that match a name or number; None if no namespace was given."""
    if text is None:
        return None
    # A container's name matches without the engine and identifier that may follow it.
    found = {inode for inode, name in names.items() if text in (name, name.partition(" (")[0])}
    if not found and text.isdecimal():
        found = {int(text)}
    if not found:
        known = ", ".join(sorted(names.values())) or "none by name"
        raise UsageError(
            f"the recording has no network namespace {text}",
            f"it has: {known}",
            nearest(text, names.values(), "give one of these names, or an inode number"),
        )
    return found


def _refuse_what_was_not_watched(
    wanted: Wanted, netns: Collection[int] | None, watched: TraceFilter, words: str
) -> None:
    beyond = {
        "-p": bool(watched.ports) and not {*wanted.ports} <= {*watched.ports},
        "-4 or -6": None not in (watched.family, wanted.family) and watched.family != wanted.family,
        "--listener": None not in (watched.listener_address, wanted.address)
        and watched.listener_address != wanted.address,
        "--netns": watched.netns is not None and netns is not None and watched.netns not in netns,
    }
    for option, asks_for_more in beyond.items():
        if asks_for_more:
            raise UsageError(
                f"{option} selects more than the recording contains",
                f"it watched {words} and nothing else",
                "leave it out, or record again",
            )
