"""Tables as texts: a column of .csv, .tsv, .parquet and .arrow files, row by row.

pyarrow is imported where it is needed: only parquet, arrow and zstd take it.
"""

import csv
import io
import json
import re
import sys
from pathlib import Path

from common.cli import import_optional

CSV = re.compile(r"\.(csv|tsv)(\.(gz|bz2|xz|zst))?\Z", re.IGNORECASE)
ARROW = re.compile(r"\.(parquet|arrow|feather)\Z", re.IGNORECASE)
ROWS = 1024  # of a parquet file that are read at once
CELL_BYTES = 1 << 30  # the longest text in a cell of a .csv


def is_table(path, column):
    """Whether a file is read as a table, by its name: .csv and .tsv only if a column is named."""
    return bool(ARROW.search(path) or (column and CSV.search(path)))


def dataset_files(folder):
    """List the files of a folder that `datasets` has saved -> paths, or None for another folder.

    Raises ValueError for one with several splits.
    """
    folder = Path(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(path.parent.name for path in sorted(folder.glob("*/state.json")))
        raise ValueError(f"{folder} has the splits {splits}: give one of these folders")
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return None
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}: copy or save it again")
    return list(map(str, files))


def texts(path, open_text, column):
    """Yield the name of each row and its text, as UTF-8. Raises ValueError that names the row.

    open_text: opens a text file, see `reading.open_text`. column: its name. A row without a text
    there is empty.
    """
    rows = _csv_rows(path, open_text, column) if CSV.search(path) else _arrow_rows(path, column)
    for number, text in rows:
        name = f"{path}, row {number}"
        try:
            yield name, b"" if text is None else text.encode()
        except AttributeError:
            raise ValueError(f"{name} has no text in {column!r}, but {text!r:.80}") from None
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error.reason}") from None


def check_column(path, column, columns):
    """Raise ValueError if a table has no such column, or several."""
    if column not in columns:
        listed = ", ".join(map(str, columns)) or "none"
        found = f"{path} has no column {column!r} (its columns are {listed:.200})"
        raise ValueError(f"{found}: give --text_field")
    if columns.count(column) > 1:
        raise ValueError(f"{path} has several columns {column!r}: rename all but one")


def _csv_rows(path, open_text, column):
    """Yield the number of each row of a .csv or .tsv file, counted from 1, and its text.

    Raises ValueError for a row that cannot be read.
    """
    csv.field_size_limit(CELL_BYTES)
    with open_text(path) as stream:
        file = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        is_tsv = CSV.search(path)[1].lower() == "tsv"
        look = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else {}
        reader = csv.reader(file, strict=True, **look)
        try:
            columns = next(reader, [])
            check_column(path, column, columns)
            for number, row in enumerate(filter(None, reader), 1):
                if len(row) != len(columns):
                    raise csv.Error(f"{len(row)} cells, the header has {len(columns)}")
                yield number, row[columns.index(column)]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is no row: {error}") from None


def _arrow_rows(path, column):
    """Yield the number of each row of a parquet or arrow file, counted from 1, and its value."""
    pyarrow = import_optional("pyarrow", f"{path} is read with pyarrow")
    number = 0
    try:
        for batch in _batches(path, column):
            for value in batch.column(column).to_pylist():
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the disk
            raise
        found = f"is damaged after row {number} ({' '.join(str(error).split()):.100})"
        raise ValueError(f"{path} {found}: write it again") from None


def _batches(path, column):
    """Yield parts of the rows of a parquet or arrow file, which is never in memory as a whole."""
    import pyarrow.parquet

    if path.lower().endswith(".parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        batches = file.iter_batches(ROWS, columns=[column])
    elif pyarrow.memory_map(path).read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        schema = file.schema
        batches = map(file.get_batch, range(file.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(path))
        schema = batches.schema
    check_column(path, column, schema.names)
    yield from batches


class Zstd(io.RawIOBase):
    """The content of a file packed with zstd. Going back reads it from its beginning."""

    def __init__(self, path):
        self.pyarrow = import_optional("pyarrow", f"{path} is read with pyarrow")
        self.path, self.position = path, sys.maxsize
        self.seek(0)

    def readinto(self, buffer):
        n = self.file.readinto(buffer)
        self.position += n
        return n

    def seek(self, offset, whence=io.SEEK_SET):
        places = {io.SEEK_SET: offset, io.SEEK_CUR: self.position + offset}
        place = places.get(whence, sys.maxsize)
        if place < self.position:
            self.file = self.pyarrow.CompressedInputStream(open(self.path, "rb"), "zstd")
            self.position = 0
        while block := self.file.read(min(place - self.position, 1 << 20)):
            self.position += len(block)
        return self.position
