"""The questions that the tool asks of a kernel's type information, in BTF or DWARF.

Both forms are graphs of the same shape: `TypeGraph` walks the graph, and a reader only says what a
node is. So both give the same answers.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from tcpstuck_bpf.errors import CannotTraceError, TcpstuckError

Node = TypeVar("Node")

POINTER_BYTES = 8
"""Every architecture on which BPF tracing works has 64-bit kernels."""

STRUCT, UNION, ENUM, FUNCTION = "struct", "union", "enum", "function"
POINTER, ARRAY, NUMBER, TYPEDEF = "pointer", "array", "number", "typedef"
QUALIFIERS = frozenset({"const", "volatile", "restrict"})
TAG = "tag"
"""An annotation such as __user or __percpu, which is not part of the C type."""

_LONGEST_CHAIN = 64
_DEEPEST_NESTING = 16


class MemberPlace(NamedTuple):
    """Offset and size of a member in its struct."""

    offset: int
    """Bytes from the start of the struct to the byte with the member's first bit."""
    size: int
    """Bytes of the member's type."""
    bits: int
    """Width of a bit-field, which has no address; 0 for other members."""


class Prototype(NamedTuple):
    """A function's type as C writes it."""

    returns: str
    parameters: tuple[str, ...]

    def text(self, name: str) -> str:
        """The declaration of a function of this type, without the semicolon."""
        space = "" if self.returns.endswith("*") else " "
        return f"{self.returns}{space}{name}({', '.join(self.parameters) or 'void'})"


class KernelTypes(Protocol):
    """A kernel's types. Every method raises CannotTraceError where the data is damaged."""

    @property
    def form(self) -> str:
        """`BTF` or `DWARF`."""

    def place(self, struct_name: str, path: str) -> MemberPlace | None:
        """Offset and size of a member such as `__sk_common.skc_net.net`; None if it is missing.

        The path leaves out anonymous structs and unions.
        """

    def parameter_count(self, function: str) -> int | None:
        """Number of a function's parameters; None where no such function is described."""

    def prototype(self, function: str) -> Prototype | None:
        """A function's type; None where no such function is described."""

    def tracepoint_arguments(self, tracepoint: str) -> int | None:
        """Number of arguments that a raw tracepoint program gets; None if unknown."""

    def enumerators(self, prefix: str) -> dict[str, int]:
        """Values of every enumerator whose name begins with `prefix`."""


@dataclass(frozen=True)
class Shape(Generic[Node]):
    """The type at a node of the graph. A node that is None is C's void."""

    kind: str
    name: str = ""
    inner: Node | None = None
    """The type that a pointer, array, typedef, qualifier or function result refers to."""
    size: int = 0
    """Bytes of a number, an enum, a struct or a union."""
    count: int = 0
    """Elements of an array."""


@dataclass(frozen=True)
class Field(Generic[Node]):
    """A member of a struct or union, or a parameter of a function."""

    name: str
    node: Node | None
    bit_offset: int = 0
    bits: int = 0


class TypeGraph(ABC, Generic[Node]):
    """The questions of KernelTypes, answered by walking a graph that a reader provides."""

    form: str
    _damage: ClassVar[tuple[type[Exception], ...]]
    """Exceptions that the reader's parser raises on damaged data."""

    def __init__(self, source: str) -> None:
        self._source = source

    @abstractmethod
    def _named(self, kind: str, name: str) -> Node | None:
        """The struct, typedef or function of this name."""

    @abstractmethod
    def _shape(self, node: Node) -> Shape[Node]:
        """The type at a node."""

    @abstractmethod
    def _fields(self, node: Node) -> Iterator[Field[Node]]:
        """Members of a struct or union, parameters of a function."""

    @abstractmethod
    def _enumerators(self, prefix: str) -> dict[str, int]:
        """Values of every enumerator whose name begins with `prefix`."""

    def _unreadable(self, why: str) -> CannotTraceError:
        return CannotTraceError(
            f"cannot read the kernel's type information in {self._source}",
            why,
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, or the vmlinux of its debug package",
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except TcpstuckError:
            raise
        except self._damage as error:
            raise self._unreadable(f"it is damaged: {type(error).__name__} {error}") from error

    def place(self, struct_name: str, path: str) -> MemberPlace | None:
        """See KernelTypes."""
        with self._reading():
            node = self._named(STRUCT, struct_name)
            bit_offset = bits = 0
            for name in path.split("."):
                found = None if node is None else self._search(node, name, _DEEPEST_NESTING)
                if found is None:
                    return None
                bit_offset += found.bit_offset
                node, bits = found.node, found.bits
            return MemberPlace(bit_offset // 8, self._size(node), bits)

    def parameter_count(self, function: str) -> int | None:
        """See KernelTypes."""
        with self._reading():
            node = self._named(FUNCTION, function)
            return None if node is None else sum(1 for _ in self._fields(node))

    def prototype(self, function: str) -> Prototype | None:
        """See KernelTypes."""
        with self._reading():
            node = self._named(FUNCTION, function)
            if node is None:
                return None
            parameters = (self._declared(f.node, f.name) for f in self._fields(node))
            return Prototype(self._declared(self._shape(node).inner, ""), tuple(parameters))

    def tracepoint_arguments(self, tracepoint: str) -> int | None:
        """See KernelTypes.

        The source is typedef btf_trace_NAME of include/trace/bpf_probe.h, a pointer to a function
        whose first parameter is not the tracepoint's.
        """
        with self._reading():
            node = self._named(TYPEDEF, f"btf_trace_{tracepoint}")
            resolved = None if node is None else self._resolved(node)
            if resolved is None or resolved[1].kind != POINTER or resolved[1].inner is None:
                return None
            function = self._resolved(resolved[1].inner)
            if function is None or function[1].kind != FUNCTION:
                return None
            return sum(1 for _ in self._fields(function[0])) - 1

    def enumerators(self, prefix: str) -> dict[str, int]:
        """See KernelTypes."""
        with self._reading():
            return self._enumerators(prefix)

    def _resolved(self, node: Node) -> tuple[Node, Shape[Node]] | None:
        """The node behind typedefs, qualifiers and tags; None if it is void."""
        for _ in range(_LONGEST_CHAIN):
            shape = self._shape(node)
            if shape.kind not in QUALIFIERS and shape.kind not in (TYPEDEF, TAG):
                return node, shape
            if shape.inner is None:
                return None
            node = shape.inner
        raise self._unreadable("it is damaged: its types refer to each other in a circle")

    def _search(self, node: Node, name: str, depth: int) -> Field[Node] | None:
        """Find a member, in anonymous structs and unions too."""
        resolved = self._resolved(node)
        if resolved is None or resolved[1].kind not in (STRUCT, UNION) or not depth:
            return None
        for field in self._fields(resolved[0]):
            if field.name == name:
                return field
            if field.name or field.node is None:
                continue
            inner = self._search(field.node, name, depth - 1)
            if inner is not None:
                return Field(name, inner.node, field.bit_offset + inner.bit_offset, inner.bits)
        return None

    def _size(self, node: Node | None) -> int:
        elements = 1
        for _ in range(_DEEPEST_NESTING):
            resolved = None if node is None else self._resolved(node)
            if resolved is None:
                return 0
            shape = resolved[1]
            if shape.kind != ARRAY:
                return elements * (POINTER_BYTES if shape.kind == POINTER else shape.size)
            elements *= shape.count
            node = shape.inner
        return 0

    def _declared(self, node: Node | None, declarator: str) -> str:
        """A declaration as C writes it, from the inside (the name) outwards."""
        qualifiers = ""
        for _ in range(_LONGEST_CHAIN):
            if node is None:
                return f"{qualifiers}void {declarator}".rstrip()
            shape = self._shape(node)
            if shape.kind in QUALIFIERS:
                qualifiers += f"{shape.kind} "
            elif shape.kind == POINTER:
                declarator = f"*{qualifiers}{declarator}".rstrip()
                qualifiers = ""
            elif shape.kind == ARRAY:
                declarator = f"{_grouped(declarator)}[{shape.count or ''}]"
            elif shape.kind == FUNCTION:
                inside = ", ".join(self._declared(f.node, f.name) for f in self._fields(node))
                declarator = f"{_grouped(declarator)}({inside or 'void'})"
            elif shape.kind != TAG:
                return f"{qualifiers}{_type_name(shape)} {declarator}".rstrip()
            node = shape.inner
        raise self._unreadable("it is damaged: its types refer to each other in a circle")


def _grouped(declarator: str) -> str:
    return f"({declarator})" if declarator.startswith("*") else declarator


def _type_name(shape: Shape[Node]) -> str:
    if shape.kind in (STRUCT, UNION, ENUM):
        return f"{shape.kind} {shape.name or '{...}'}"
    return shape.name
