"""Expert load as tables of pyarrow, a row per frame and layer: lines of JSON, and segments in parquet.

Both have the keys of `expert_load.jsonl`, so that one function turns either into arrays. In a segment
rows are sums over the `span` steps that end with `step`, and what is large stands once: `rank_rows` and
`links` are summed over the layers and lie in each frame's first row, `domains` and `pairs` are summed over
the segment and lie in the rows of its last frame; other rows hold empty lists, and `received` [R] instead
of a matrix per layer. Gates are rounded to three digits, all else is kept as it was. With the bytes of
numbers regrouped by significance (byte stream split) zstd halves them.

Nothing here starts a thread. Legend: N rows, F frames, L layers, E experts, R ranks.
"""

import re
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe.telemetry.frames import SCALARS, History, Real, Whole, empty
from moe.telemetry.load import Layer

if TYPE_CHECKING:
    import pyarrow

_LAYER_NUMBER = re.compile(rb'"layer": ?(\d+)')
_SPLIT = ("counts", "gate", "bias", "received", "expert_seconds", "pairs")
_SPLIT_PATHS = (*(f"{name}.list.element" for name in _SPLIT), "rank_rows.list.element.list.element")


def from_lines(lines: bytes, layers: tuple[Layer, ...] | None = None) -> History:
    """Whole lines of expert_load.jsonl as frames of one step; steps that lack rows of a layer are left out.

    `layers` are those of the run if known, else those that the lines name.
    """
    import pyarrow as pa
    import pyarrow.json

    whole, real = pa.list_(pa.int64()), pa.list_(pa.float32())
    known = {
        **{"step": pa.int64(), "layer": pa.string(), "counts": whole, "gate": real, "bias": real},
        **{"rank_rows": pa.list_(whole), "row_bytes": pa.int64(), "links": whole},
        **{"expert_seconds": real, "pairs": whole},
        **{name: pa.float64() for name in SCALARS},
    }
    if not lines:
        return empty()
    table = pyarrow.json.read_json(
        pa.BufferReader(_LAYER_NUMBER.sub(rb'"layer":"\1"', lines)),  # a column has one type
        pyarrow.json.ReadOptions(use_threads=False, block_size=2 * len(lines) + 1024),
        pyarrow.json.ParseOptions(explicit_schema=pa.schema(list(known.items()))),
    )
    return _frames(table, layers)


def read_segment(file: IO[bytes]) -> History:
    """The frames of a segment."""
    import pyarrow.parquet

    return _frames(pyarrow.parquet.ParquetFile(file, pre_buffer=False).read(use_threads=False), None)


def write_segment(file: IO[bytes], history: History) -> None:
    """Write frames as one segment, with their sums of domains and pairs."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        _table(history),
        file,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding=dict.fromkeys(_SPLIT_PATHS, "BYTE_STREAM_SPLIT"),
    )


def _frames(table: "pyarrow.Table", layers: tuple[Layer, ...] | None) -> History:
    names = [int(name) if name.isdigit() else name for name in table["layer"].to_pylist()]
    layers = layers or tuple(dict.fromkeys(names))
    place = np.array([layers.index(name) for name in names])
    steps, frame = np.unique(table["step"].to_numpy(), return_inverse=True)
    order = np.lexsort((place, frame))
    lacking = np.bincount(frame, minlength=len(steps)) != len(layers)
    order = order[~lacking[frame[order]]]
    if not np.array_equal(order, np.arange(len(names))):
        table = table.take(order)
    num_frames, num_layers = len(order) // len(layers), len(layers)

    def by_layer(values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(num_frames, num_layers, *values.shape[1:])

    counts = by_layer(_lists(table, "counts", np.int64))
    row_bytes = _numbers(table, "row_bytes", 0).astype(np.int64)
    rows, matrices = _matrices(table)
    num_ranks = max(matrices.shape[1], _longest(table, "received"))
    received = _lists(table, "received", np.int64, num_ranks)
    if "received" not in table.column_names:
        received[rows] = matrices.sum(1)
    rank_rows = np.zeros((num_frames, num_ranks, num_ranks), np.int64)
    sent_bytes = np.zeros_like(rank_rows)
    np.add.at(rank_rows, rows // num_layers, matrices)
    np.add.at(sent_bytes, rows // num_layers, matrices * row_bytes[rows][:, None, None])
    experts = {name: _lists(table, name, np.float32, counts.shape[2]) for name in ("gate", "bias")}
    links = by_layer(_lists(table, "links", np.int64, 3) * row_bytes[:, None])
    return History(
        layers=layers,
        steps=steps[~lacking],
        spans=_numbers(table, "span", 1).astype(np.int64)[::num_layers],
        counts=counts,
        gate=by_layer(experts["gate"]),
        bias=by_layer(experts["bias"]),
        scalars={name: by_layer(_scalars(table, name)) for name in SCALARS},
        received=by_layer(received),
        rank_rows=rank_rows,
        sent_bytes=sent_bytes,
        links=links.sum(1),
        expert_seconds=by_layer(_lists(table, "expert_seconds", np.float32, num_ranks)),
        domains=_domains(table, num_layers, counts.shape[2]),
        pairs=_pairs(table, num_layers),
    )


def _lists(table: "pyarrow.Table", name: str, kind: type, width: int = 0) -> NDArray[Any]:
    """A column of lists [N, longest], at least `width`; what lacks is 0, or NaN among floats."""
    fill = np.nan if kind is np.float32 else 0
    if name not in table.column_names:
        return np.full((len(table), width), fill, kind)
    column = table[name].combine_chunks()
    lengths = _lengths(column)
    values = np.full((len(table), max(width, lengths.max(initial=0))), fill, kind)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if flat.size == values.size:
        return flat.reshape(values.shape).astype(kind, copy=False)
    begins = np.cumsum(lengths) - lengths
    for length in np.unique(lengths[lengths > 0]):  # one, where the layout of the run never changed
        rows = np.flatnonzero(lengths == length)
        values[rows, :length] = flat[begins[rows][:, None] + np.arange(length)]
    return values


def _matrices(table: "pyarrow.Table") -> tuple[Whole, Whole]:
    """The rows that hold `rank_rows`, and those matrices, padded with zeros to the most ranks."""
    most = _longest(table, "rank_rows")
    if not most:
        return np.zeros(0, np.int64), np.zeros((0, 0, 0), np.int64)
    column = table["rank_rows"].combine_chunks()
    ranks = _lengths(column)
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
    begins = np.cumsum(ranks**2) - ranks**2
    rows = np.flatnonzero(ranks)
    matrices = np.zeros((len(rows), most, most), np.int64)
    for size in np.unique(ranks[rows]):
        cells = flat[begins[rows[ranks[rows] == size]][:, None] + np.arange(size * size)]
        matrices[ranks[rows] == size, :size, :size] = cells.reshape(-1, size, size)
    return rows, matrices


def _longest(table: "pyarrow.Table", name: str) -> int:
    if name not in table.column_names:
        return 0
    return int(_lengths(table[name].combine_chunks()).max(initial=0))


def _lengths(column: "pyarrow.ListArray") -> Whole:
    lengths: Whole = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _numbers(table: "pyarrow.Table", name: str, missing: float) -> NDArray[np.float64]:
    if name not in table.column_names:
        return np.full(len(table), missing, np.float64)
    values = table[name].fill_null(missing).to_numpy().astype(np.float64)
    return np.asarray(values)


def _scalars(table: "pyarrow.Table", name: str) -> Real:
    values = _numbers(table, name, np.nan)
    return values if SCALARS[name] == "sum" else values.astype(np.float32)


def _domains(table: "pyarrow.Table", num_layers: int, num_experts: int) -> dict[str, Whole]:
    import pyarrow as pa

    if "domains" not in table.column_names:
        return {}
    column = table["domains"].combine_chunks()
    rows = pa.table(column.flatten(), [column.type.field(i).name for i in range(column.type.num_fields)])
    return {
        name: _lists(rows, name, np.int64, num_experts).reshape(-1, num_layers, num_experts).sum(0)
        for name in rows.column_names
    }


def _pairs(table: "pyarrow.Table", num_layers: int) -> Whole | None:
    if "pairs" not in table.column_names:
        return None
    rows = np.flatnonzero(_lengths(table["pairs"].combine_chunks()))
    if not rows.size:
        return None
    # Only the rows that hold some: there are few, and each is long.
    values = _lists(table.select(["pairs"]).take(rows), "pairs", np.int64)
    sums = np.zeros((num_layers, values.shape[1]), np.int64)
    np.add.at(sums, rows % num_layers, values)
    return sums


def _table(history: History) -> "pyarrow.Table":
    import pyarrow as pa

    num_frames, num_layers = len(history), len(history.layers)
    num_rows = num_frames * num_layers
    num_ranks = history.received.shape[2]
    each = np.ones(num_rows, bool)
    first = np.arange(num_rows) % num_layers == 0
    last = np.arange(num_rows) >= num_rows - num_layers
    seconds = history.expert_seconds.reshape(num_rows, num_ranks)
    timed = np.asarray(np.isfinite(seconds).any(1))
    rows, sent = history.rank_rows.sum((1, 2)), history.sent_bytes.sum((1, 2))
    row_bytes = sent // np.maximum(rows, 1)
    columns = {
        "step": np.repeat(history.steps, num_layers),
        "span": np.repeat(history.spans, num_layers),
        "layer": [str(layer) for _ in range(num_frames) for layer in history.layers],
        "counts": _array(history.counts, each),
        "gate": _array(_rounded(history.gate), each),
        "bias": _array(history.bias, each),
        **{name: values.ravel() for name, values in history.scalars.items()},
        "received": _array(history.received, each),
        "rank_rows": _nested(history.rank_rows, first),
        "row_bytes": np.repeat(row_bytes, num_layers),
        "links": _array(history.links // np.maximum(row_bytes, 1)[:, None], first),
        "expert_seconds": _array(_rounded(seconds[timed]), timed),
    }
    if history.domains:
        arrays = [_array(counts, last) for counts in history.domains.values()]
        columns["domains"] = pa.StructArray.from_arrays(arrays, list(history.domains))
    if history.pairs is not None:
        columns["pairs"] = _array(history.pairs, last)
    return pa.table(columns)


def _array(values: NDArray[Any], rows: NDArray[np.bool_]) -> "pyarrow.ListArray":
    """The innermost axis of `values` as lists, one in each of the chosen rows; the others are empty."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(rows * values.shape[-1])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.ravel())


def _nested(matrices: Whole, rows: NDArray[np.bool_]) -> "pyarrow.ListArray":
    import pyarrow as pa

    inner = _array(matrices, np.ones(matrices.shape[0] * matrices.shape[1], bool))
    offsets = np.concatenate([[0], np.cumsum(rows * matrices.shape[1])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner)


def _rounded(values: Real) -> Real:
    """float32 with 11 significant bits, which is three digits and more: the rest does not compress."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: Real = ((bits + (1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, np.nan).astype(np.float32)
