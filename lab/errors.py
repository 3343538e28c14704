"""What can go wrong in the lab itself, apart from what it makes go wrong on purpose."""

from __future__ import annotations

from tcpstuck_bpf.errors import TcpstuckError


class LabError(TcpstuckError):
    """The lab could not be built or played; what, why and remedy are single lines."""

    def __str__(self) -> str:
        """What and why: in a test's report there is nothing else."""
        return f"{self.what}: {self.why}"

    def lines(self) -> list[str]:
        """The message as it is printed, one line each of what, why and remedy."""
        return [f"lab: {self.what}", f"  why: {self.why}", f"  remedy: {self.remedy}"]


class LabTimeoutError(LabError):
    """A condition the scenario waits for did not come about within its limit."""

    def __init__(self, what: str, limit_s: float, seen: str) -> None:
        super().__init__(
            f"waited in vain: {what}",
            f"not within {limit_s:g} s; last seen: {seen}",
            "on a slow machine set TCPSTUCK_LAB_PATIENCE (a factor on every limit) above 1",
        )
