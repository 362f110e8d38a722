"""Rows as a Dataset, every value as it was: in memory, or where they are many in a temporary file mapped into it."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json
from datasets.features import features as _features
from datasets.fingerprint import generate_random_fingerprint
from datasets.utils import json as _json

_BATCH = 1000  # rows
_IN_MEMORY = 64 * 2**20  # bytes of Arrow


@cache
def patch_datasets_json() -> None:
    """Let `datasets` keep the numbers of Json columns as they are, from now on in this process. Importing caftune does not.

    datasets 5.2 writes and reads them with pandas' ujson: ten digits after the point are written (1e-12 becomes 0.0), 0.951088
    is read as 0.9510879999999999, and an integer beyond 64 bits turns its whole value into a text. Values that the standard
    library has no JSON for are left to ujson. To be removed when `datasets` keeps numbers: tests/test_table.py says when.
    """
    written = _json.ujson_dumps

    def dumps(value: Any, *args: Any, **kwargs: Any) -> str:
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError):
            return written(value, *args, **kwargs)

    for module in (_features, _json):
        module.ujson_dumps, module.ujson_loads = dumps, json.loads  # type: ignore[attr-defined]


def dataset(rows: Iterator[dict[str, Any]], features: Features, optional: Mapping[str, Any]) -> Dataset:
    """The rows, a batch at a time: of a large file neither the text nor its Python objects are ever whole in memory.

    Args:
        features: of the columns that every row has, each Value("string") or Json().
        optional: more Json columns, and what stands for each in rows without it. One that no row has is left out.
    """
    patch_datasets_json()
    every, found = Features(features | {name: Json() for name in optional}), _Table()
    missing = set(optional)
    while batch := list(islice(rows, _BATCH)):
        columns = [_column(batch, name, feature, optional.get(name)) for name, feature in every.items()]
        found.add(pa.Table.from_arrays(columns, schema=every.arrow_schema))
        missing -= {name for name in missing if any(name in row for row in batch)}
    return found.finish().remove_columns(sorted(missing))


def _column(rows: list[dict[str, Any]], name: str, feature: Any, default: Any) -> pa.Array:
    if not isinstance(feature, Json):
        return pa.array([row[name] for row in rows], pa.string())
    blank = None if default is None else _json.ujson_dumps(default)
    values = [row.get(name) for row in rows]
    texts = [blank if value is None else _json.ujson_dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(feature.pa_type, pa.array(texts, feature.pa_type.storage_type))


class _Table:
    """Arrow tables put one behind the other. Beyond 64 MiB they go to a file without a name, which ends with the Dataset."""

    def __init__(self) -> None:
        self._kept: list[pa.Table] = []
        self._size = 0
        self._file: Any = None
        self._writer: Any = None

    def add(self, table: pa.Table) -> None:
        self._kept.append(table)
        self._size += table.nbytes
        if self._size > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        if self._writer is None:
            self._file = tempfile.NamedTemporaryFile(prefix="caftune-", suffix=".arrow")  # noqa: SIM115 (closed in finish)
            self._writer = pa.ipc.new_stream(self._file, self._kept[0].schema)
        for table in self._kept:
            self._writer.write_table(table)
        self._kept, self._size = [], 0

    def finish(self) -> Dataset:
        if self._file is None:
            table = pa.concat_tables(self._kept)
        else:
            with self._file:  # removed at the end of this block, as a name: its pages stay as long as they are mapped
                self._spill()
                self._writer.close()
                self._file.flush()
                table = pa.ipc.open_stream(pa.memory_map(self._file.name)).read_all()
        # Without a fingerprint of its own `datasets` makes one of all rows, in memory and several times over.
        return Dataset(table, fingerprint=generate_random_fingerprint())
