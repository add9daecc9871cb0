"""``tensord show``: what lies in a checkpoint, and what a view of it would copy. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .output import Output, document
from .packing import Tensor
from .table import Table, counted, quoted, shown_name, size_text


def show_index(
    path: str, files: Sequence[dict[str, Any]], tensors: Sequence[Tensor], metadata: dict[str, str]
) -> Output:
    """Every tensor and file. `path` is what the user named."""
    payload_bytes = sum(tensor.size_bytes for tensor in tensors)
    table = Table("tensor", "dtype", "shape", ">size", ">file")
    for tensor in tensors:
        table.add(
            shown_name(tensor.name),
            tensor.dtype,
            _shape_text(tensor.shape),
            size_text(tensor.size_bytes),
            str(tensor.file),
        )
    text = f"{path}: {counted(len(tensors), 'tensor')}, {size_text(payload_bytes)}\n\n{table.text()}\n"
    text += _files_text(files)
    text += "".join(f"metadata  {quoted(key)} = {quoted(value)}\n" for key, value in sorted(metadata.items()))
    shown = {
        "path": path,
        "payload_bytes": payload_bytes,
        "tensor_count": len(tensors),
        "files": files,
        "metadata": metadata,
        "tensors": [tensor._asdict() for tensor in tensors],
    }
    return Output(document(shown), text)


def show_views(path: str, tensors: Sequence[Tensor], plan: dict[str, Any]) -> Output:
    """The plan that packs slices row-major one after another into one buffer, as `packed_plan` makes it."""
    size_of = {tensor.name: tensor.size_bytes for tensor in tensors}
    table = Table("view", "dtype", "shape", ">size", ">of the tensor", ">at")
    for item in plan["items"]:
        whole = size_of[item["tensor"]]
        share = item["size_bytes"] / whole * 100 if whole else 100.0
        table.add(
            shown_name(item["view"]),
            item["dtype"],
            _shape_text(item["shape"]),
            size_text(item["size_bytes"]),
            f"{share:.1f} %",
            str(item["target_offset"]),
        )
    records, files = plan["records"], plan["files"]
    text = (
        f"{table.text()}\nplan of a packed copy: {size_text(plan['target_bytes'])} in "
        f"{counted(len(records), 'record')} (source offset -> target offset; s1: is file 1)\n"
    )
    text += "".join(map(_record_text, records))
    if len(files) > 1:
        text += "\n" + _files_text(files)
    view = {name: plan[name] for name in ("items", "target_bytes", "records")}
    return Output(document({"path": path, "files": files, "view": view}), text)


def _shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _files_text(files: Sequence[dict[str, Any]]) -> str:
    table = Table(">file", ">size", "path")
    for number, file in enumerate(files):
        table.add(str(number), size_text(file["size_bytes"]), file["path"])
    return table.text()


def _record_text(record: dict[str, Any]) -> str:
    """``1006 pitch 12 -> 0 pitch 6   8 rows x 6 B   x 4 pitch 96 -> 48``, ``fill -> 24   1 row x 8 B``"""
    is_fill = record["kind"] == "fill"
    rows = record["row_count"]
    source, source_pitch = "fill", ""
    if not is_fill:
        source = f"s{record['source']}:" if record["source"] else ""
        source += str(record["source_offset"])
        source_pitch = f" pitch {record['source_pitch']}" if rows != 1 else ""
    target_pitch = f" pitch {record['target_pitch']}" if rows != 1 else ""
    loops = "".join(
        f"   x {loop['count']} pitch {'' if is_fill else loop['source_pitch']}"
        f"{'' if is_fill else ' '}-> {loop['target_pitch']}"
        for loop in record["outer"]
    )
    return (
        f"{source}{source_pitch} -> {record['target_offset']}{target_pitch}   "
        f"{counted(rows, 'row')} x {record['row_bytes']} B{loops}\n"
    )
