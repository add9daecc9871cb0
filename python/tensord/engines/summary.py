"""LoadSummary: what became of one load, for people and for an engine's logger."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..copies import LoadReport
from ..progress import bytes_text

NAMED_MAX = 3  # tensors that one line names


@dataclass(frozen=True)
class LoadSummary:
    """What a `tensord.record`, a stream or a `tensord.load_model` did."""

    bytes: int = 0  # written by records, or handed out as plain tensors
    seconds: float = 0.0  # from the first tensor that was asked for to the last copy
    record_count: int = 0  # copies of (parts of) tensors that loaders made
    tensor_count: int = 0  # that loaders were given
    paths: dict[str, int] = field(default_factory=lambda: {"strided": 0, "device": 0, "plain": 0})
    plain: dict[str, str] = field(default_factory=dict)  # tensors that were needed as such, and why
    replayed: bool = False  # by a cached plan: no tensor was handed out
    cache: str = ""  # what became of the cached plan, or why there is none
    slower_why: str = ""  # why copies to GPU memory took a slower way

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds > 0 else 0.0

    def one_line(self) -> str:
        """``tensord: 28.2 GB in 3.1 s (9.1 GB/s), 443 tensors, 443 copies; strided 28.2 GB; ...``"""
        rate = f"{bytes_text(self.bytes_per_second)}/s"
        ways = ", ".join(f"{way} {bytes_text(count)}" for way, count in self.paths.items() if count)
        text = (
            f"tensord: {bytes_text(self.bytes)} in {self.seconds:.2f} s ({rate}), "
            f"{self.tensor_count} tensors, {self.record_count} copies"
        )
        if ways:
            text += f"; {ways}"
        if self.replayed:
            text += "; replayed from a cached plan"
        if self.plain:
            named = [f"{name} ({why})" for name, why in list(self.plain.items())[:NAMED_MAX]]
            more = f" and {len(self.plain) - NAMED_MAX} more" if len(self.plain) > NAMED_MAX else ""
            text += f"; plain: {', '.join(named)}{more}"
        if self.slower_why:
            text += f"; slower: {self.slower_why}"
        return text


def summary_of(
    reports: list[LoadReport],
    *,
    seconds: float,
    record_count: int,
    tensor_count: int,
    plain: dict[str, str],
    plain_bytes: int,
    replayed: bool = False,
    cache: str = "",
) -> LoadSummary:
    """Adds up what calls of the library and plain tensors did."""
    copied = sum(report.bytes for report in reports)
    device = sum(report.device_bytes for report in reports)
    staged = sum(report.staged_bytes for report in reports)
    return LoadSummary(
        bytes=copied + plain_bytes,
        seconds=seconds,
        record_count=record_count,
        tensor_count=tensor_count,
        paths={"strided": copied - device - staged, "device": device, "plain": plain_bytes + staged},
        plain=dict(plain),
        replayed=replayed,
        cache=cache,
        slower_why=next((report.slower_why for report in reports if report.slower_why), ""),
    )
