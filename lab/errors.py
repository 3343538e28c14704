"""Errors of the lab itself, as opposed to the faults that it creates on purpose."""

from __future__ import annotations

from tcpstuck_bpf.errors import TcpstuckError


class LabError(TcpstuckError):
    """The lab could not be built, or a scenario failed; what, why and remedy are single lines."""

    def __str__(self) -> str:
        """What and why; a test report shows nothing else."""
        return f"{self.what}: {self.why}"

    def lines(self) -> list[str]:
        """The message as printed: one line each for what, why and remedy."""
        return [f"lab: {self.what}", f"  why: {self.why}", f"  remedy: {self.remedy}"]


class LabTimeoutError(LabError):
    """A condition that the scenario waits for did not become true within its limit."""

    def __init__(self, what: str, limit_s: float, seen: str) -> None:
        super().__init__(
            f"timed out waiting for {what}",
            f"not within {limit_s:g} s; last seen: {seen}",
            "on a slow machine, set TCPSTUCK_LAB_PATIENCE (multiplies every limit) above 1",
        )
