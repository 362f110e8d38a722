"""Rows as a Dataset with unchanged values, in a memory-mapped temporary file."""

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


@cache
def patch_datasets_json() -> None:
    """Replace `datasets`' JSON functions by exact ones in this process. Importing caftune does not do so.

    datasets 5.2 uses pandas' ujson for Json columns: it writes ten decimals (1e-12 becomes 0.0), reads 0.951088 as
    0.9510879999999999, and turns a value with an integer beyond 64 bits into text. Values that the standard library cannot
    write are left to ujson. Remove this when `datasets` keeps numbers: a test in tests/data/test_table.py then fails.
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
    """Build a Dataset from rows, a batch at a time, so that a large file is never in memory as a whole.

    Args:
        features: of the columns that every row has, each Value("string") or Json().
        optional: more Json columns, with the value for rows without them. A column that no row has is left out.
    """
    patch_datasets_json()
    every, missing = Features(features | {name: Json() for name in optional}), set(optional)
    schema = every.arrow_schema
    # The file is deleted at the end of the block; its pages stay while they are mapped.
    with tempfile.NamedTemporaryFile(prefix="caftune-", suffix=".arrow") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                columns = [_column(batch, name, feature, optional.get(name)) for name, feature in every.items()]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                missing -= {name for name in missing if any(name in row for row in batch)}
        file.flush()
        table = pa.ipc.open_stream(pa.memory_map(file.name)).read_all()
    # Without a given fingerprint `datasets` hashes all rows, with several copies in memory.
    return Dataset(table, fingerprint=generate_random_fingerprint()).remove_columns(sorted(missing))


def _column(rows: list[dict[str, Any]], name: str, feature: Any, default: Any) -> pa.Array:
    if not isinstance(feature, Json):
        return pa.array([row[name] for row in rows], pa.string())
    blank = None if default is None else _json.ujson_dumps(default)
    values = [row.get(name) for row in rows]
    texts = [blank if value is None else _json.ujson_dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(feature.pa_type, pa.array(texts, feature.pa_type.storage_type))
