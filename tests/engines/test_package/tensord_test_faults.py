"""Faults that tests ask for by environment variables, in an engine's every process.

TENSORD_TEST_FAIL_RANK=1       rank 1 cannot open checkpoints
TENSORD_TEST_KILL_RANK=1       rank 1 is killed when it opens one
TENSORD_TEST_OTHER_VERSION=1   the engine's release is none that the plug-in was tested with
"""

from __future__ import annotations

import os
import signal
from typing import Any


def register() -> None:
    """An entry point of both engines; called again in each process."""
    fail, kill = os.environ.get("TENSORD_TEST_FAIL_RANK"), os.environ.get("TENSORD_TEST_KILL_RANK")
    if fail or kill:
        _break_opening(fail, kill)
    if os.environ.get("TENSORD_TEST_OTHER_VERSION"):
        from tensord.engines.versions import Tested

        Tested.is_tested = lambda self: False  # type: ignore[method-assign]


def _break_opening(fail: str | None, kill: str | None) -> None:
    from tensord import UnavailableError
    from tensord.engines.engine_load import EngineLoad

    opened = EngineLoad._opened

    def broken(self: Any, files: Any) -> Any:
        rank = str(self._ranks.rank)
        if rank == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == fail:
            raise UnavailableError("this rank was told to fail")
        return opened(self, files)

    EngineLoad._opened = broken  # type: ignore[method-assign]
