"""Reading a corpus: its files, the documents in them, the examples in the documents.

    file      plain text, or JSON: objects, one field of which is text, one per line or in a list,
              or a table, one column of which is text
    document  a text file, or the text of one object or row: a stream of UTF-8 bytes
    piece     an example, or a part of a very long one

The first bytes of a file tell how it is packed and encoded, whatever its name. A name that ends in
.json, .jsonl or .ndjson says that it holds objects; for tables see tables.py.
"""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import math
import os
import re
import shlex
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, takewhile
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import cli
from common.noise import GOLDEN
from text import tables

BYTES_BAR = dict(unit="B", unit_scale=True, disable=None)  # options of tqdm
HEAD = 1 << 16  # bytes that tell what a file is
TEXT_ENDINGS = ".txt", ".jsonl", ".ndjson"  # are read of a folder; others there are often no text
JSON_NAME = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|bz2|xz|zst|lz4))?\Z", re.IGNORECASE)
PACKED = {  # what is unpacked: its first bytes, how it is opened, the program that unpacks it
    "gz": (rb"\x1f\x8b", gzip.open, "gzip"),
    "bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P)", bz2.open, "bzip2"),
    "xz": (rb"\xfd7zXZ\0", lzma.open, "xz"),
    "zst": (rb"\x28\xb5\x2f\xfd", tables.Zstd, "zstd"),
}
MARKS = {  # that begin a text; the longer ones are first
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
PANDOC = "pandoc -t plain --wrap=none {path} -o {path}.txt"
EXCEL = (  # writes a table as one object per line
    'python -c "import sys, pandas; pandas.read_excel(sys.argv[1]).to_json(sys.argv[2], '
    "orient='records', lines=True)\" {path} {path}.jsonl (pip install pandas openpyxl)"
)
SQLITE = "sqlite3 -json {path} 'select * from TABLE' > {path}.json (tables: sqlite3 {path} .tables)"
LFS = 'cd "$(dirname {path})" && git lfs pull'
PICTURE = rb"\x89PNG\r|\xff\xd8\xff|GIF8[79]a.{4}[\x80-\xff]|RIFF....WEBPVP8|II\*\x00|MM\x00\*"
FOREIGN = [  # what is not read: its first bytes, what it is, see `advice`
    (rb"%PDF-\d\.\d\s", "a PDF", "pdftotext {path} {path}.txt"),
    (rb"PK\x03\x04.*(word/|mimetypeapplication/)", "a document or an e-book", PANDOC),
    (rb"PK\x03\x04.*xl/", "an Excel file", EXCEL),
    (rb"PK\x03\x04", "a zip archive", "unzip {path} -d {path}.d"),
    (rb".{257}ustar", "a tar archive", "mkdir {path}.d && tar -xf {path} -C {path}.d"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "a 7z or rar archive", "7z x {path} -o{path}.d"),
    (rb"\x04\x22\x4d\x18", "packed with lz4", "lz4 -dc"),
    (rb"SQLite format 3\x00", "a database", SQLITE),
    (rb"PAR1[\x15-\x1c]", "a parquet file", "mv {path} {path}.parquet"),
    (rb"ARROW1\x00\x00|\xff{4}..\x00\x00", "an arrow file", "mv {path} {path}.arrow"),
    (rb"\{\\rtf1", "a rich text", PANDOC),
    (rb"\xd0\xcf\x11\xe0", "an old Office file", "soffice --headless --convert-to docx {path}"),
    (PICTURE, "a picture", "tesseract {path} {path}"),
    (rb"version https://git-lfs", "a link of Git LFS to a file that is not here", LFS),
    *((magic, "packed twice", "") for magic, *_ in PACKED.values()),
]

PIECE_BYTES = 1 << 16  # longer examples are tokenised in pieces of this size, cut at spaces
EXAMPLES = "line", "labelled", "paragraph", "file"  # else a line that separates examples
ONE_LINE = "line", "labelled"  # kinds of examples that have no line break
SEPARATOR = re.compile(r"<[|/]?\w+\|?>|\[[A-Z]+\]|([-=*#~_+\u2013\u2014])( ?\1){2,}|%")
MARK = re.compile(r"<\|\w+\|>")  # no text has it by chance
MOST_LABELS = 10  # that are listed
HEAD_BYTES = 1 << 20  # of a text, in which blank lines and separators are looked for
FEW_EXAMPLES = 100  # a corpus of fewer examples is split for validation by bytes
VAL_SHARE = {"examples": 0.02, "bytes": 0.05}


@dataclass(frozen=True)
class Corpus:
    """A text: one or more files, and the field of .jsonl files that holds their text."""

    path: str  # see `find_files`
    text_field: str | None = None  # None: "text", and .csv and .tsv are plain text

    @classmethod
    def of(cls, corpus):
        """Take a Corpus, or the path of one -> Corpus."""
        return corpus if isinstance(corpus, cls) else cls(os.fspath(corpus))

    def __str__(self):
        return self.path

    @cached_property
    def files(self):
        """Paths of the files. Raises ValueError, see `find_files`."""
        return find_files(self.path)

    @cached_property
    def n_bytes(self):
        """Bytes of all documents. Files other than plain text are read for it."""
        documents = tqdm(self.documents(), "measuring the text", delay=1, disable=None)
        return sum(stream.seek(0, os.SEEK_END) for _, stream in documents)

    def documents(self):
        """Yield a name and a stream of each document, to be read before the next. See `look_at`."""
        for path in self.files:
            field = self.text_field or "text"
            if tables.is_table(path, self.text_field):
                for name, text in tables.texts(path, open_text, field):
                    yield name, io.BytesIO(text)
                continue
            with open_text(path) as stream:
                if is_json(path):
                    yield from _read_objects(path, stream, field)
                else:
                    yield path, stream

    def describe(self, n_examples, n_bytes):
        """Say how much was read, and what was left out -> a line."""
        files = count(len(self.files), "file")
        read = f"{self}: {files}, {count(n_examples, 'example')}, {count(n_bytes, 'byte')}"
        return "; ".join([read, *left_out(self.path)])


def count(n, thing):
    """Write a number of things, such as "1 file" or "1,234 files"."""
    return f"{n:,} {thing}" + "s" * (n != 1)


def find_files(path):
    """List the files of a path: a file, a folder, a pattern like "texts/**/*.txt", or several.

    Several have commas between them. Raises ValueError for a part that names no file.
    """
    files = []
    for part in _parts(path):
        found = [part] if os.path.isfile(part) else glob.glob(part, recursive=True)
        if os.path.isdir(part):
            entries = [str(entry) for entry in _entries(part) if not _reason(entry)]
            found = tables.dataset_files(part) or entries
        found = sorted(filter(os.path.isfile, found))
        if not found:
            kinds = ", ".join(TEXT_ENDINGS) + f", also as .{', .'.join(PACKED)}"
            searched = [f"a folder is searched for {kinds}"] if os.path.isdir(part) else []
            more = "; ".join(searched + left_out(part))
            raise ValueError(f"no text file at {part}" + (f" ({more})" if more else ""))
        files += found
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1]


def _parts(path):
    return [path] if os.path.exists(path) else path.split(",")


def _entries(part):
    """List what is in a folder, or the folders that a pattern matches."""
    if os.path.isdir(part):
        return () if tables.dataset_files(part) else Path(part).iterdir()
    return [] if "**" in part else filter(Path.is_dir, map(Path, glob.glob(part)))


def _reason(entry):
    """Say why an entry of a folder is not read -> str, or "" if it is."""
    name, ending = os.path.splitext(entry.name.lower())
    if name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "subfolders"
    text_name = name if ending[1:] in PACKED else name + ending
    is_read = entry.is_file() and text_name.endswith(TEXT_ENDINGS)
    return "" if is_read else ending or "without an ending"


def left_out(path):
    """Say what the folders of a path hold besides the files that are read -> a line, or none."""
    entries = [entry for part in _parts(path) for entry in _entries(part) if _reason(entry)]
    counts = Counter(map(_reason, entries)).most_common()
    if not counts:
        return []
    line = "left out: " + ", ".join(f"{reason} {n:,}" for reason, n in counts)
    reasons = [reason for reason, _ in counts if reason != "hidden"]
    commonest = reasons[0].removeprefix("without an ending") if reasons else ""
    ending = ".txt" if "subfolders" in reasons else commonest
    pattern = shlex.quote(os.path.join(entries[0].parent, "**", f"*{ending}"))
    return [f"{line} (a pattern reads more: -d={pattern})" if reasons else line]


# ---------------------------------------------------------------- what a file is


def is_json(path):
    """Whether a file holds objects instead of plain text, by its name."""
    return bool(JSON_NAME.search(path))


def kind_of(path, text_field):
    """Name what `Corpus.documents` takes from a file, by its name: it is a part of cache keys."""
    field = text_field or "text"
    if tables.is_table(path, text_field):
        ending = tables.CSV.search(path) or tables.ARROW.search(path)
        return f"table {ending[1].lower()} {field}"
    return f"jsonl {field}" if is_json(path) else "text"


def look_at(path):
    """Tell by its first bytes how a text is packed and encoded -> two names, "" for plain UTF-8.

    Raises ValueError for what is no text, with the command that makes one of it.
    """
    packing = _packing_of(path)
    if tables.ARROW.search(str(path)):
        return packing, ""
    with _unpack(path, packing) as stream:
        head = stream.read(HEAD)
    for magic, what, command in FOREIGN:
        if re.match(magic, head, re.DOTALL):
            raise ValueError(f"{path} is {what}, not a text: run {advice(command, path)}")
    encoding = next((name for name, marks in MARKS.items() if head.startswith(marks)), "")
    if b"\0" in head and not encoding:
        command = advice(_without_nul(head), path)
        raise ValueError(f"{path} has NUL bytes: if it is a text, run {command}")
    if b"\r" in head[:-1] and b"\n" not in head:
        encoding = encoding or "utf-8"  # the line ends of old Macs
    return packing, encoding


def _packing_of(path):
    with open(path, "rb") as file:
        head = file.read(16)
    return next((name for name, (magic, *_) in PACKED.items() if re.match(magic, head)), "")


def _unpack(path, packing):
    return io.BufferedReader(_Unpacked(path, packing), 1 << 20) if packing else open(path, "rb")


def advice(command, path):
    """Write the command that makes a text of a file: it names {path}, or the text goes through it.

    What is packed is unpacked first, but tar does that.
    """
    packing, file = _packing_of(path), shlex.quote(path)
    if "{path}" in command and (not packing or " tar " in command):
        return command.format(path=file)
    new = shlex.quote(path + (".jsonl" if is_json(path) else ".txt"))
    if not packing:
        return f"{command} < {file} > {new}"
    unpack = f"{PACKED[packing][2]} -dc {file}"
    if "{path}" in command:
        return f"{unpack} > {new} first"
    return f"{unpack} | {command} > {new}" if command else f"{unpack} > {new}"


def _without_nul(head):
    """Choose a program for a file with NUL bytes. In UTF-16, about every second byte is one."""
    n_even, n_odd = head[::2].count(0), head[1::2].count(0)
    if max(n_even, n_odd) > len(head) / 8 > 4 * min(n_even, n_odd):
        return f"iconv -f UTF-16{'LE' if n_odd > n_even else 'BE'} -t UTF-8"
    return r"tr -d '\000'"


def conversion(path):
    """Say how a text that is not UTF-8 becomes it."""
    command = advice("iconv -f WINDOWS-1252 -t UTF-8", path)
    return f"Convert it, from Latin-1 or Windows-1252 with {command}"


def open_text(path):
    """Open a file -> stream of its text, in UTF-8. Raises ValueError, see `look_at`."""
    packing, encoding = look_at(path)
    stream = _unpack(path, packing)
    return _recode(path, stream, encoding) if encoding else stream


def lines_of(path):
    """Read a small file -> pairs of a number and a line. Wrong bytes become lone surrogates."""
    with open_text(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="\n")
        return [(number, line.rstrip("\r\n")) for number, line in enumerate(text, 1)]


def _recode(path, stream, encoding):
    """Copy a text as UTF-8 with line breaks \\n into a temporary file -> its stream."""
    file = tempfile.TemporaryFile()  # closed by the caller
    try:
        with io.TextIOWrapper(stream, encoding, errors="surrogateescape") as text:
            while block := text.read(1 << 20):
                file.write(block.encode(errors="surrogateescape"))
    except UnicodeError as error:
        file.close()
        found = f"begins as {encoding.upper()}, but {error}"
        raise ValueError(f"{path} {found}: write it again") from None
    file.seek(0)
    return file


class _Unpacked(io.RawIOBase):
    """The content of a packed file. Raises ValueError that names the file if it is damaged."""

    def __init__(self, path, packing):
        self.path, self.packing = path, packing
        self.file = PACKED[packing][1](path)

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        return self._call(self.file.readinto, buffer)

    def seek(self, *args):
        return self._call(self.file.seek, *args)

    def _call(self, function, *args):
        try:
            return function(*args)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None):  # of the disk
                raise
            found = f"is damaged or not a .{self.packing} file ({error})"
            raise ValueError(f"{self.path} {found}: pack it again") from None

    def close(self):
        self.file.close()
        super().close()


def _read_objects(path, stream, text_field):
    """Yield the texts of a JSON file as documents. Raises ValueError that names the line."""
    start = stream.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    # A list, and one object on several lines, are read as a whole.
    is_whole = start.startswith(b"[") or start.split(b"\n")[0].strip() == b"{"
    for number, raw in enumerate([stream.read()] if is_whole else stream, 1):
        if raw.isspace():
            continue
        name = path if is_whole else f"{path}, line {number}"
        try:
            value = json.loads(raw)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error.reason}. {conversion(path)}") from None
        except (ValueError, RecursionError) as error:
            hint = f"several lines per object? {advice('jq -c .', path)} writes one per line"
            raise ValueError(f"{name} is not JSON: {error} ({hint})") from None
        members = {name: value}
        if is_whole and isinstance(value, list):
            members = {f"{path}, object {i}": member for i, member in enumerate(value, 1)}
        for name, member in members.items():
            yield name, io.BytesIO(_text_of(member, name, path, text_field))


def _text_of(value, name, path, text_field):
    """Find the text of a value: a text, or an object with a field of text -> UTF-8."""
    fields = value if isinstance(value, dict) else {}
    text = value if isinstance(value, str) else fields.get(text_field)
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not Unicode: {error.reason}") from None
    has = f"its fields are {', '.join(fields) or 'none'}"[:200]
    hint = "give --text_field"
    lists = [key for key, field in fields.items() if isinstance(field, list)]
    if lists and not any(isinstance(field, str) for field in fields.values()):
        selected = shlex.quote(f".[{json.dumps(lists[0])}][]")
        hint += f", or run {advice(f'jq -c {selected}', path)}"
    raise ValueError(f"{name} has no text in a field {text_field!r} ({has}): {hint}")


# ---------------------------------------------------------------- examples


class Piece(NamedTuple):
    """An example of the corpus, or a part of a very long one."""

    text: str
    n_bytes: int
    first: bool  # starts its example
    last: bool  # ends its example
    label: str | None  # of the example, if it is labelled and this is its first piece
    number: int  # of its example in the corpus: 0, 1, ...
    end: int  # bytes of the corpus up to its end; after a last piece, reading can go on there


def read_pieces(corpus, example="line", start=0, stop=math.inf, max_bytes=None, number=0):
    """Yield the examples between two byte positions of a corpus as pieces, in bounded memory.

    example: a "line", a "labelled" line (label<TAB>text; a header is left out, see `header_end`),
    a "paragraph" (blank lines separate them), the whole "file", that is a document, or else the
    separator: a line by itself, with or without spaces around it. Line breaks inside an example
    are one character, "\\n". Blank examples are left out. Examples of more than `max_bytes`
    (default PIECE_BYTES) are cut before a space, or between two characters if there is no space.
    Positions count the bytes of all documents. number: of the first example. Raises ValueError for
    bytes that are not UTF-8, and for a labelled line without a label.
    """
    begin = 0  # of the document in the corpus
    for name, stream in Corpus.of(corpus).documents():
        size = stream.seek(0, os.SEEK_END) if start > begin or stop < math.inf else None
        if size is None or (stop > begin and start < begin + size):
            bounds = max(0, start - begin), stop - begin, max_bytes or PIECE_BYTES
            for text, n, first, last, label, end in _read_document(name, stream, example, *bounds):
                yield Piece(text, n, first, last, label, number, begin + end)
                number += last
        begin += stream.tell() if size is None else size


def _read_document(name, stream, example, start, stop, max_bytes):
    """Yield text, n_bytes, first, last, label and end in the document of its `Piece`s."""
    if example == "labelled" and start == 0:
        start = header_end(stream)
    first = True
    for raw, position, end, last in _cut(stream, example, start, stop, max_bytes):
        text = _decode(raw, name, stream, position).replace("\r\n", "\n")
        if position == 0:
            text = text.removeprefix("\ufeff")  # byte order mark
        if text.strip() or not (first and last):
            label = None
            if example == "labelled" and first:
                label, tab, text = text.partition("\t")
                label = label.strip()
                if not tab or not label:
                    line = _line_at(stream, position)
                    raise ValueError(f"{name}: line {line} is not label<TAB>text")
            yield text, len(text.encode()), first, last, label, end
        first = last


def _cut(stream, example, start, stop, max_bytes):
    """Cut a document into raw pieces -> bytes, begin and end in it, whether an example ends.

    A separator after a piece lies before its end.
    """
    separator = b"" if example == "paragraph" else example.strip().encode()
    is_separated = example == "paragraph" or example not in EXAMPLES
    position, held, first = start, bytearray(), True  # held: read but not yielded, at `position`
    longest = max(max_bytes, len(separator) + 100)  # a separator is not read in parts
    for raw, is_whole in _read_lines(stream, start, stop, longest):
        is_separator = is_separated and is_whole and raw.strip() == separator
        if is_separated and is_whole and first and not held:
            is_separator = is_separator or raw.isspace()  # a blank line before an example
        complete = is_separator or (example in ONE_LINE and raw.endswith(b"\n"))
        held += b"" if is_separator else raw
        while len(held) > max_bytes or (len(held) == max_bytes and not complete):
            cut = _find_cut(held[:max_bytes])
            yield held[:cut], position, position + cut, False
            position, held, first = position + cut, held[cut:], False
        if complete:
            end = position + len(held) + (len(raw) if is_separator else 0)
            yield held.rstrip(b"\r\n"), position, end, True
            position, held, first = end, bytearray(), True
    if held or not first:
        yield held.rstrip(b"\r\n"), position, position + len(held), True


def _read_lines(stream, start, stop, longest):
    """Yield the lines of a part of a document, long ones in parts, and whether each is whole."""
    stream.seek(start)
    starts_line = True
    while raw := stream.readline(limit := int(min(longest, stop - start))):
        start += len(raw)
        ends_line = raw.endswith(b"\n")
        yield raw, starts_line and (ends_line or len(raw) < limit)
        starts_line = ends_line


def _find_cut(raw):
    """Find where to cut: before the last space, else after the last line, else a character."""
    space, line = raw.rfind(b" ", 1), raw.rfind(b"\n") + 1
    if space > 0 or line:
        return space if space > 0 else line
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return len(raw) - len(decoder.getstate()[0])  # the last character may be incomplete


def _decode(raw, name, stream, position):
    """Decode bytes of a document from `position` on. Raises ValueError for the first wrong one."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = position + error.start
        where = f"byte {wrong} is 0x{raw[error.start]:02x}, in line {_line_at(stream, wrong)}"
        raise ValueError(f"{name} is not UTF-8: {where}. {conversion(name)}") from None


def _line_at(stream, position):
    """Find the line of a byte of a document, counted from 1."""
    stream.seek(0)
    blocks = (stream.read(min(1 << 20, position - start)) for start in range(0, position, 1 << 20))
    return 1 + sum(block.count(b"\n") for block in blocks)


def header_end(stream):
    """Find the end of the header of a file of labelled lines -> bytes, or 0 if it has none.

    The first line is a header if its label is in no other line, while that of the second is.
    """

    def label(raw):
        return raw.partition(b"\t")[0].strip()

    stream.seek(0)
    lines = filter(bytes.strip, iter(partial(stream.readline, PIECE_BYTES), b""))
    first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
    end, second, is_header = stream.tell(), next(lines, b""), False
    for raw in lines if b"\t" in first and label(first) != label(second) else ():
        if label(raw) == label(first):
            return 0
        is_header = is_header or label(raw) == label(second)
    return end if is_header else 0


def reading_notes(corpus, example):
    """Say what of a corpus is left out as a header, and what may be a separator -> lines."""
    if example == "labelled":
        return _header_notes(corpus)
    plain = [path for path in corpus.files if tables.CSV.search(path) and not corpus.text_field]
    if plain:
        return [f"{plain[0]} is read as plain text: --text_field=COLUMN reads a column"]
    if example in ("line", "paragraph") and (found := find_separator(corpus)):
        flag = shlex.quote(f"--example={found[0]}")
        return [f"{found[0]!r} occurs {found[1]:,} times: if it separates examples, {flag}"]
    return []


def _header_notes(corpus):
    headers = []
    for name, stream in corpus.documents():
        if end := header_end(stream):
            stream.seek(0)
            headers.append((name, stream.read(end).decode("utf-8-sig", "replace").strip()))
    if not headers:
        return []
    name, header = headers[0]
    also = f", and those of {count(len(headers) - 1, 'more file')}" if headers[1:] else ""
    return [f"left out as a header: {header!r}, the first line of {name}{also}"]


def find_separator(corpus):
    """Find what looks like a separator near the beginning of a corpus -> (separator, n) or None.

    It is a line like <end>, [END], --- or %, or <|MARK|> anywhere. It occurs three times or more,
    and as often as all others together.
    """
    found = Counter()
    for piece in read_head(corpus, "line"):
        line = piece.text.strip()
        found.update([line] if SEPARATOR.fullmatch(line) else MARK.findall(line))
    line, n = max(found.items(), key=itemgetter(1), default=("", 0))
    return (line, n) if n >= max(3, found.total() / 2) else None


def check_separator(corpus, example):
    """Raise ValueError if `example` is a separator, and no line of the corpus is."""
    if example in EXAMPLES:
        return
    separator, is_within = example.strip(), False
    for piece in read_pieces(corpus, "line"):
        if piece.text.strip() == separator:
            return
        is_within = is_within or separator in piece.text
    hint = f"--example is {', '.join(EXAMPLES)}, or a line that stands between examples"
    if separator and is_within:
        pattern = re.sub(r"([][\\.*^$/])", r"\\\1", separator)
        command = shlex.quote(f"s/{pattern}/\\n&\\n/g")
        hint = f"it stands within lines: put it on separate lines, with sed {command}"
    raise ValueError(f"no line of {corpus} is {example!r}: {hint}")


def read_head(corpus, example):
    """Yield the pieces of the first HEAD_BYTES of a corpus."""
    return takewhile(lambda piece: piece.end <= HEAD_BYTES, read_pieces(corpus, example))


def list_labels(counts):
    """List labels with their numbers of examples, the most frequent first -> a line, or none."""
    if not counts:
        return []
    listed = [f"{cli.visible(label)} {n:,}" for label, n in counts.most_common(MOST_LABELS)]
    rest = f", and {len(counts) - len(listed)} more" if len(counts) > len(listed) else ""
    return [f"{len(counts)} labels: {', '.join(listed)}{rest}"]


def split_position(corpus, example="line"):
    """Find the byte where few examples are cut for validation: after a space, for the last 5 %.

    None if there are FEW_EXAMPLES or more: `read_part` holds out whole examples.
    """
    examples = (piece for piece in read_pieces(corpus, example) if piece.last)
    if sum(1 for _ in islice(examples, FEW_EXAMPLES)) == FEW_EXAMPLES:
        return None
    corpus = Corpus.of(corpus)
    position = begin = int(corpus.n_bytes * (1 - VAL_SHARE["bytes"]))
    for _, stream in corpus.documents():
        size = stream.seek(0, os.SEEK_END)
        if begin <= size:  # it begins in this document
            stream.seek(max(0, begin - PIECE_BYTES))
            raw = stream.read(min(begin, PIECE_BYTES))
            by_words = example in ("line", "paragraph", "file")
            space = max(raw.rfind(b" ") if by_words else 0, raw.rfind(b"\n"))
            return position - len(raw) + (space + 1 if space > 0 else _find_cut(raw))
        begin -= size
    return position


def read_part(corpus, part, example="line", start=0, number=0):
    """Yield the pieces of one part of a corpus: "all", "train" or "val".

    start, number: bytes and examples of the corpus that were read before, see `Piece.end`. Example
    i is in "val" if frac(i * golden ratio) < 2 %. These are spread evenly over the corpus, whatever
    period its examples may have. A corpus of few examples is cut in two (`split_position`).
    """
    if part == "all":
        yield from read_pieces(corpus, example, start, number=number)
    elif (position := split_position(corpus, example)) is not None:
        bounds = (start, position) if part == "train" else (max(start, position),)
        yield from read_pieces(corpus, example, *bounds, number=number)
    else:
        for piece in read_pieces(corpus, example, start, number=number):
            if (part == "val") == (piece.number * GOLDEN % 1 < VAL_SHARE["examples"]):
                yield piece
