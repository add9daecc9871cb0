"""Parity without an engine: tensors as safetensors' own reader gives them, and as a traced load does."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..client import open as open_model
from .parity import Snapshot, poison, snapshot
from .recording import record


class Cuts(torch.nn.Module):
    """A parameter for each tensor of a checkpoint: of those with two dimensions and more, one rank's rows."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], rank: int, world: int) -> None:
        super().__init__()
        self._cuts: dict[str, tuple[int, int] | None] = {}
        self._names: dict[str, str] = {}
        for at, (name, (shape, dtype)) in enumerate(shapes.items()):
            self._cuts[name] = None
            if len(shape) > 1 and shape[0] % world == 0:
                rows = shape[0] // world
                self._cuts[name] = (rank * rows, rows)
                shape = (rows, *shape[1:])
            self._names[name] = f"{at}"
            self.register_buffer(f"{at}", torch.empty(shape, dtype=dtype))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            cut = self._cuts[name]
            target = self._buffers[self._names[name]]
            assert target is not None
            target.copy_(weight if cut is None else weight.narrow(0, *cut))

    def named_snapshot(self) -> Snapshot:
        marks = snapshot(self)
        return {name: marks[at] for name, at in self._names.items()}


def parity_modules(path: str, *, tp: int = 1) -> Iterator[tuple[str, Any, Any]]:
    """For each rank its label and two snapshots: by safetensors, and by `tensord.record`."""
    safe_open = importlib.import_module("safetensors").safe_open
    with open_model(path, "pt") as model, torch.no_grad():
        shapes = {entry.name: (entry.memory_shape, model[entry.name].dtype) for entry in model.entries()}
        for rank in range(tp):
            module = Cuts(shapes, rank, tp)
            for file in model.files:
                with safe_open(file, framework="pt") as opened:
                    module.load_weights((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            reference = module.named_snapshot()
            poison(module)
            with record(model, module) as weights:
                module.load_weights(weights)
            yield f"rank {rank}", reference, module.named_snapshot()
