"""The processes that load one model together: all of them have it in the end, or all of them fail."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ..errors import UnavailableError

# Only a rank that hangs makes the others wait so long; one that died is noticed at once.
RANK_WAIT_SECONDS = 600.0


class OtherRankError(UnavailableError):
    """This rank could go on, another one cannot."""


class Ranks:
    """The tensor-parallel ranks of one model.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        One that works on CPU memory (gloo). None: this process is alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        self.is_over = False  # `agree` has raised, so no other rank waits for this one
        if group is not None:
            import torch.distributed

            self.rank = torch.distributed.get_rank(group)
            self.size = torch.distributed.get_world_size(group)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def begin(self) -> None:
        """Another attempt, on all ranks."""
        self.is_over = False

    def agree(self, what: str, error: BaseException | None = None) -> None:
        """Waits for all ranks; raises on each of them when one has an error.

        Each rank must call it equally often, up to the first call that raises: a rank with an error has its
        next call match whichever call the others wait in.

        Raises
        ------
        BaseException
            `error` itself, where there is one.
        OtherRankError
            Another rank has one, or is gone.
        """
        said: list[Any] = [None] * self.size
        self.is_over = True
        if self.size > 1:
            said = self._told(what, error)
        if error is not None:
            raise error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text]
        self.is_over = bool(failed)
        if failed:
            raise OtherRankError(f"{what}: {self} stops because others failed: {'; '.join(failed)}")

    def _told(self, what: str, error: BaseException | None) -> list[Any]:
        import torch.distributed

        said: list[Any] = [None] * self.size
        text = None if error is None else f"{type(error).__name__}: {error}"
        try:
            torch.distributed.monitored_barrier(self._group, timedelta(seconds=RANK_WAIT_SECONDS))
            torch.distributed.all_gather_object(said, text, group=self._group)
        except RuntimeError as lost:
            if error is not None:
                raise error from lost
            raise OtherRankError(f"{what}: {self} lost the others: {lost}") from lost
        return said
