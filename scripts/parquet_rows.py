#!/usr/bin/env python3
"""Prints what is in Parquet files of exported log records.

    PYTHONPATH=target/test-parquet scripts/parquet_rows.py FILE...            a line of JSON a row
    PYTHONPATH=target/test-parquet scripts/parquet_rows.py --about FILE...    a line of JSON a file: columns, row groups, statistics

Needs pyarrow: scripts/fetch_parquet.sh fetches it.
"""

import datetime
import json
import sys

import pyarrow.parquet


def plain(value):
    if isinstance(value, datetime.datetime):
        # As a line has it.
        return value.astimezone(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    raise TypeError(f"a row holds {value!r}")


def about(path):
    file = pyarrow.parquet.ParquetFile(path)
    told = file.metadata
    columns = {}
    for group in range(told.num_row_groups):
        for at in range(told.num_columns):
            column = told.row_group(group).column(at)
            found = column.statistics
            span = [found.min, found.max] if found.has_min_max else None
            columns[column.path_in_schema] = {
                "nulls": found.null_count,
                "span": span,
                "codec": column.compression,
                "values": column.num_values,
            }
    types = {field.name: str(field.type) for field in file.schema_arrow}
    return {"rows": told.num_rows, "groups": told.num_row_groups, "types": types, "columns": columns}


def main(arguments):
    is_about = arguments[:1] == ["--about"]
    for path in arguments[is_about:]:
        rows = [about(path)] if is_about else pyarrow.parquet.ParquetFile(path).read().to_pylist()
        for row in rows:
            print(json.dumps(row, default=plain, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
