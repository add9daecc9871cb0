"""A platform for SGLang, for tests alone: the whole engine on any CPU, each layer in its own PyTorch code.

SGLang's CPU platform needs kernels (AVX-512, a package that no index has). This one does without.
"""

from __future__ import annotations

from typing import Any


def activate() -> str:
    """What SGLang's entry-point group ``sglang.srt.platforms`` calls: where the class is."""
    return f"{__name__}.CpuPlatform"


def __getattr__(name: str) -> Any:
    # Made when it is asked for: the entry point is called before SGLang's platforms can be imported.
    if name != "CpuPlatform":
        raise AttributeError(name)
    from sglang.srt.platforms.cpu import CpuSRTPlatform
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities

    class CpuPlatform(CpuSRTPlatform):
        _enum = PlatformEnum.OOT
        capabilities = PlatformCapabilities()

        def get_device(self, device_id: int = 0) -> str:
            return "cpu"

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

    globals()[name] = CpuPlatform
    return CpuPlatform
