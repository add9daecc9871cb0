"""Which releases of an engine the plug-ins were tested with."""

from __future__ import annotations

import importlib
from typing import Any


class Tested:
    """The releases of one engine, as prefixes of version numbers: ``("0.32", "0.33.1")``."""

    def __init__(self, engine: str, module: str, prefixes: tuple[str, ...]) -> None:
        self.engine = engine
        self._module = module
        self._prefixes = prefixes
        self._is_said = False

    def version(self) -> str:
        """The installed one's; "unknown" where it does not say."""
        module = importlib.import_module(self._module)
        return str(getattr(module, "__version__", None) or "unknown")

    def is_tested(self) -> bool:
        numbers = self.version().partition("+")[0]
        return any(numbers == prefix or numbers.startswith(f"{prefix}.") for prefix in self._prefixes)

    def say(self, log: Any) -> None:
        """A warning, once a process, where the release is another one."""
        if not self._is_said and not self.is_tested():
            log.warning(
                "tensord: %s %s is not among the tested releases (%s): tensors are loaded one by one, not as "
                "one plan",
                self.engine,
                self.version(),
                ", ".join(self._prefixes),
            )
        self._is_said = True
