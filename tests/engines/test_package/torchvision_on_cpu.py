"""Lets the package index's torchvision, a CUDA build, be imported beside a CPU build of torch.

Its library does not load there, and its Python code then fails to describe two operators that the library
would have declared. SGLang imports it and calls neither: they are declared right before it is imported.
"""

from __future__ import annotations

import sys
from typing import Any

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declarer:
    """Finds nothing: it is asked for torchvision first, and leaves finding it to the others."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        import torch

        for operator in OPERATORS:
            torch.library.define(f"torchvision::{operator}", SIGNATURE)


sys.meta_path.insert(0, Declarer())  # type: ignore[arg-type]
