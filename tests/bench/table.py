"""From rounds to medians, ratios and the table in docs/PERFORMANCE.md."""

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stages.models.precision import compute_dtype

BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end: written by make bench -->"
_MB = 1 << 20


@dataclass
class Comparison:
    """The rounds of one bench."""

    name: str
    peer: str
    unit: str
    target: float
    our_rates: list[float] = field(default_factory=list)
    peer_rates: list[float] = field(default_factory=list)
    efficiencies: list[float] = field(default_factory=list)
    """Our model FLOPs a second over the rate of matrix products measured right after."""
    matmul_rates: list[float] = field(default_factory=list)
    our_bytes: int = 0
    peer_bytes: int = 0
    """Peak memory of the process above what it held before training."""

    def add(self, ours: dict[str, Any], peer: dict[str, Any], matmul: dict[str, Any]) -> None:
        """Take a round of each side and the measurement after it."""
        self.our_rates.append(ours["units"] / ours["seconds"])
        self.peer_rates.append(peer["units"] / peer["seconds"])
        self.matmul_rates.append(matmul["flops"] / matmul["seconds"])
        self.efficiencies.append(ours["flops"] / ours["seconds"] / self.matmul_rates[-1])
        self.our_bytes = ours["peak_bytes"] - ours["idle_bytes"]
        self.peer_bytes = peer["peak_bytes"] - peer["idle_bytes"]

    @property
    def ratios(self) -> list[float]:
        return [ours / peer for ours, peer in zip(self.our_rates, self.peer_rates, strict=True)]

    @property
    def met(self) -> bool:
        return statistics.median(self.ratios) >= self.target and self.our_bytes <= self.peer_bytes

    def progress(self) -> str:
        return (
            f"{self.name:16} ours {self.our_rates[-1]:8.1f} peer {self.peer_rates[-1]:8.1f} {self.unit}/s  "
            f"ratio {self.ratios[-1]:5.2f}  {self.efficiencies[-1]:.0%} of {self.matmul_rates[-1] / 1e9:.1f} GFLOP/s"
        )

    def cells(self) -> list[str]:
        ratios = self.ratios
        return [
            f"`{self.name}`",
            self.peer,
            f"{statistics.median(self.our_rates):,.1f} {self.unit}/s",
            f"{statistics.median(self.peer_rates):,.1f}",
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{self.target:.1f}",
            f"{statistics.median(self.efficiencies):.0%} of {statistics.median(self.matmul_rates) / 1e9:.1f}",
            f"{self.our_bytes / _MB:,.0f} / {self.peer_bytes / _MB:,.0f} MB",
        ]


@dataclass(frozen=True)
class Scaling:
    """How throughput grows with processes, and efficiency with the model."""

    tokens_per_second: dict[str, float]
    """By number of processes, each on one core."""
    efficiency: dict[str, float]
    """By size of the model: model FLOPs a second over the rate of matrix products."""

    def lines(self) -> list[str]:
        one, two = self.tokens_per_second["1"], self.tokens_per_second["2"]
        low, high = min(self.efficiency.values()), max(self.efficiency.values())
        sizes = ", ".join(f"{name} {value:.0%}" for name, value in self.efficiency.items())
        return [
            f"Two processes on two cores: {two:,.0f} tokens/s, one on one core: {one:,.0f}; "
            f"{two / one:.2f} times (aim 1.6).",
            f"Model FLOPs over matrix-product rate by size: {sizes}; the largest is {high / low - 1:.0%} above the "
            "smallest (aim 10 %).",
        ]


_HEAD = ("bench", "peer", "ours", "peer's", "ratio (rounds)", "aim", "model FLOPs, GFLOP/s of matmul", "peak memory")


def print_all(comparisons: Sequence[Comparison], scaling: Scaling | None) -> None:
    print("\n".join(_lines(comparisons, scaling)))


def write_page(
    page: Path, comparisons: Sequence[Comparison], scaling: Scaling | None, *, rounds: int, threads: int
) -> None:
    """Replace what stands between the marks."""
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    dtype = str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")
    machine = (
        f"{datetime.now(UTC):%Y-%m-%d}, {_processor()}, {threads} threads, matrix products in {dtype} on both sides, "
        f"torch {torch.__version__}, medians of {rounds} rounds."
    )
    lines = [BEGIN, "", machine, "", *_lines(comparisons, scaling), "", END]
    page.write_text(head + "\n".join(lines) + tail)


def _lines(comparisons: Sequence[Comparison], scaling: Scaling | None) -> list[str]:
    lines = []
    if comparisons:
        lines += [" | ".join(("", *_HEAD, "")).strip(), "|" + "---|" * len(_HEAD)]
        lines += [" | ".join(("", *comparison.cells(), "")).strip() for comparison in comparisons]
    return lines + (["", *scaling.lines()] if scaling else [])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
