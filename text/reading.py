"""The files of a corpus, and the documents in them.

    file      plain text, or JSON: objects, one field of which is text, one per line or in a list
    document  a text file, or the text of one object: a stream of UTF-8 bytes

How a file is packed and encoded is told by its first bytes, whatever its name. A name that ends in
.json, .jsonl or .ndjson says that it holds objects.
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
from typing import NamedTuple

from tqdm import tqdm

from common.noise import GOLDEN

HEAD = 1 << 16  # bytes that tell what a file is
JSON_ENDINGS = ".json", ".jsonl", ".ndjson"


# Packed forms that are read: their first bytes, how they are opened, the tool that unpacks them
PACKED = {
    "gz": (rb"\x1f\x8b", gzip.open, "gzip"),
    "bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P)", bz2.open, "bzip2"),
    "xz": (rb"\xfd7zXZ\0", lzma.open, "xz"),
}


MARKS = {  # that begin a text; the longer ones are first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TEXT_ENDINGS = ".txt", ".jsonl", ".ndjson"  # are read of a folder; a .json there is often no text
SUFFIXES = tuple(f"{end}{pack}" for end in TEXT_ENDINGS for pack in ("", ".gz", ".bz2", ".xz"))
PANDAS = (  # writes a table as one object per line
    'python -c "import sys, pandas, pyarrow.ipc as ipc; {}.to_json(sys.argv[2], '
    "orient='records', lines=True)\" {{path}} {{path}}.jsonl (pip install pandas pyarrow openpyxl)"
)
TO_UTF8 = "iconv -f {} -t UTF-8"
PANDOC = "pandoc -t plain --wrap=none {path} -o {path}.txt"


# What is not read: its first bytes, what it is, the command that makes a text or a folder of it
FOREIGN = [
    (rb"%PDF-\d\.\d\s", "a PDF", "pdftotext {path} {path}.txt"),
    (rb"PK\x03\x04.*(word/|mimetypeapplication/)", "a document or an e-book", PANDOC),
    (rb"PK\x03\x04.*xl/", "an Excel file", PANDAS.format("pandas.read_excel(sys.argv[1])")),
    (rb"PK\x03\x04", "a zip archive", "unzip {path} -d {path}.d"),
    (rb".{257}ustar", "a tar archive", "mkdir {path}.d && tar -xf {path} -C {path}.d"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "a 7z or rar archive", "7z x {path} -o{path}.d"),
    (rb"\x28\xb5\x2f\xfd", "packed with zstd", "zstd -d {path} -o {plain}"),
    (rb"\x04\x22\x4d\x18", "packed with lz4", "lz4 -d {path} {plain}"),
    (
        rb"SQLite format 3\x00",
        "a database",
        "sqlite3 -json {path} 'select * from TABLE' > {path}.json (tables: sqlite3 {path} .tables)",
    ),
    (rb"PAR1[\x15-\x1c]", "a parquet file", PANDAS.format("pandas.read_parquet(sys.argv[1])")),
    (rb"ARROW1\x00\x00", "an arrow file", PANDAS.format("pandas.read_feather(sys.argv[1])")),
    (
        rb"\xff{4}..\x00\x00",
        "a stream of arrow records",
        PANDAS.format("ipc.open_stream(sys.argv[1]).read_pandas()"),
    ),
    (rb"\{\\rtf1", "a rich text", PANDOC),
    (rb"\xd0\xcf\x11\xe0", "an old Office file", "soffice --headless --convert-to docx {path}"),
    (
        rb"\x89PNG\r|\xff\xd8\xff|GIF8[79]a.{4}[\x80-\xff]|RIFF....WEBPVP8|II\*\x00|MM\x00\*",
        "a picture",
        "tesseract {path} {path}",
    ),
    (rb"version https://git-lfs", "a link of Git LFS to a file that is not here", "git lfs pull"),
]


@dataclass(frozen=True)
class Corpus:
    """A text: one or more files, and the field of .jsonl files that holds their text."""

    path: str  # see `find_files`
    text_field: str = "text"

    @classmethod
    def of(cls, corpus):
        """Take a Corpus, or the path of one -> Corpus."""
        return corpus if isinstance(corpus, cls) else cls(os.fspath(corpus))

    @classmethod
    def find(cls, path, text_field, message):
        """Find a text that an earlier command named -> Corpus. Raises ValueError with `message`, in which {} is the path."""
        corpus = cls(os.fspath(path), text_field)
        try:
            corpus.files  # noqa: B018 - looks for them
        except ValueError:
            raise ValueError(message.format(path)) from None
        return corpus

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
        """Yield the documents in order -> pairs of a name for messages and a binary stream, to be
        read before the next. Raises ValueError for a file that is no text, see `look_at`.
        """
        for path in self.files:
            with open_text(path) as stream:
                if is_json(path):
                    yield from _read_objects(path, stream, self.text_field)
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
    """List the files that a path names: a file, all SUFFIXES in a folder, a pattern such as
    "texts/**/*.txt", or several of these with commas between them. Raises ValueError for a part
    that names no file.
    """
    files = []
    for part in _parts(path):
        if os.path.isdir(part):
            found = sorted(entry.path for entry in os.scandir(part) if not _reason(entry))
        elif os.path.isfile(part):
            found = [part]
        else:
            found = sorted(filter(os.path.isfile, glob.glob(part, recursive=True)))
        if not found:
            kinds = ", ".join(TEXT_ENDINGS) + f", also as .{', .'.join(PACKED)}"
            searched = [f"a folder is searched for {kinds}"] * os.path.isdir(part)
            more = "; ".join([*searched, *left_out(part)])
            raise ValueError(f"no text file at {part}" + (f" ({more})" if more else ""))
        files += found
    return list(dict.fromkeys(files))


def _parts(path):
    return [path] if os.path.exists(path) else path.split(",")


def _reason(entry):
    """Say why an entry of a folder is not read -> str, or "" if it is."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "subfolders"
    if entry.is_file() and entry.name.lower().endswith(SUFFIXES):
        return ""
    return os.path.splitext(entry.name)[1].lower() or "without an ending"


def left_out(path):
    """Say what the folders of a path hold besides the files that are read -> a line, or none."""
    reasons, folder = Counter(), ""
    for part in _parts(path):
        if os.path.isdir(part):
            reasons.update(filter(None, map(_reason, os.scandir(part))))
            folder = folder or part
        elif not os.path.exists(part) and "**" not in part:  # a pattern
            reasons["subfolders"] += sum(map(os.path.isdir, glob.glob(part)))
            folder = folder or os.path.dirname(part)
    reasons = +reasons
    if not reasons:
        return []
    counts = ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())
    endings = [reason for reason, _ in reasons.most_common() if reason[0] == "."]
    ending = ".txt" if "subfolders" in reasons or not endings else endings[0]
    pattern = shlex.quote(os.path.join(folder, "**", f"*{ending}"))
    more = f" (a pattern reads more: -d={pattern})" if set(reasons) != {"hidden"} else ""
    return [f"left out: {counts}{more}"]


# ---------------------------------------------------------------- what a file is


class Form(NamedTuple):
    """How a text is written in its file."""

    packing: str = ""  # of PACKED
    encoding: str = ""  # if it is copied as UTF-8 before it is read

    def __str__(self):
        return "".join(f" {part}" for part in self if part)


def is_json(path):
    """Whether a file holds objects instead of plain text, by its name."""
    name = path.lower()
    for packing in PACKED:
        name = name.removesuffix(f".{packing}")
    return name.endswith(JSON_ENDINGS)


def look_at(path):
    """Tell by its first bytes how a text is packed and encoded -> Form.

    Raises ValueError for what is no text, with the command that makes one of it.
    """
    packing = _packing_of(path)
    with _unpack(path, packing) as stream:
        head = stream.read(HEAD)
    if _packing(head):
        raise ValueError(f"{path} is packed twice: run {pipe('', path)}")
    for magic, what, command in FOREIGN:
        if re.match(magic, head, re.DOTALL):
            raise ValueError(f"{path} is {what}, not a text: run {_fill(command, path)}")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    if b"\0" in head and not encoding:
        advice = pipe(_without_nul(head), path)
        raise ValueError(f"{path} has NUL bytes: if it is a text, run {advice}")
    if b"\r" in head[:-1] and b"\n" not in head:
        encoding = encoding or "utf-8"  # the line ends of old Macs
    return Form(packing, encoding)


def _packing(head):
    return next((name for name, (magic, *_) in PACKED.items() if re.match(magic, head)), "")


def _packing_of(path):
    with open(path, "rb") as file:
        return _packing(file.read(16))


def _unpack(path, packing):
    return Unpacked(path, packing) if packing else open(path, "rb")


def _fill(command, path):
    """Fill in a command of FOREIGN; a file that is packed is unpacked first, but tar does that."""
    if _packing_of(path) and "tar " not in command:
        return f"{pipe('', path)} first"
    plain, ending = os.path.splitext(path)
    plain = plain if ending.lower() in (".zst", ".lz4") else f"{path}.txt"
    return command.format(path=shlex.quote(path), plain=shlex.quote(plain))


def _without_nul(head):
    """Choose a program for a file with NUL bytes. In UTF-16, about every second byte is one."""
    n_even, n_odd = head[::2].count(0), head[1::2].count(0)
    if max(n_even, n_odd) > len(head) / 8 > 4 * min(n_even, n_odd):
        return TO_UTF8.format("UTF-16LE" if n_odd > n_even else "UTF-16BE")
    return r"tr -d '\000'"


def pipe(program, path):
    """Write the command that sends the text of a file through a program into a new file."""
    packing, file = _packing_of(path), shlex.quote(path)
    new = shlex.quote(path + (".jsonl" if is_json(path) else ".txt"))
    if not packing:
        return f"{program} < {file} > {new}"
    return " | ".join(filter(None, [f"{PACKED[packing][2]} -dc {file}", program])) + f" > {new}"


def conversion(path):
    """Say how a text that is not UTF-8 becomes it."""
    command = pipe(TO_UTF8.format("WINDOWS-1252"), path)
    return f"Convert it, from Latin-1 or Windows-1252 with {command}"


def open_text(path):
    """Open a file -> stream of its text, in UTF-8. Raises ValueError, see `look_at`."""
    form = look_at(path)
    stream = _unpack(path, form.packing)
    return _recode(path, stream, form.encoding) if form.encoding else stream


def lines_of(path):
    """Read the lines of a small file -> pairs of a number and a line without its end.

    What is not UTF-8 becomes lone surrogates. Raises ValueError, see `look_at`.
    """
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


# ---------------------------------------------------------------- objects


def _read_values(path, stream):
    """Yield the values of a JSON file, each with a name for messages: a line, or what is in a list.

    A list, and one object on several lines, are read as a whole. Raises ValueError.
    """
    start = stream.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    is_whole = start.startswith(b"[") or start.split(b"\n")[0].strip() == b"{"
    for number, line in enumerate([stream.read()] if is_whole else stream, 1):
        if line.isspace():
            continue
        name = path if is_whole else f"{path}, line {number}"
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error.reason}. {conversion(path)}") from None
        except (ValueError, RecursionError) as error:
            advice = f"several lines per object? {pipe('jq -c .', path)} writes one per line"
            raise ValueError(f"{name} is not JSON: {error} ({advice})") from None
        if not (is_whole and isinstance(value, list)):
            yield name, value
            continue
        for i, member in enumerate(value, 1):
            yield f"{path}, object {i}", member


def _read_objects(path, stream, text_field):
    """Yield the texts of a JSON file as documents. Raises ValueError that names the line."""
    for name, value in _read_values(path, stream):
        fields = value if isinstance(value, dict) else {}
        try:
            text = (value if isinstance(value, str) else fields.get(text_field)).encode()
        except AttributeError:
            has = f"its fields are {', '.join(fields) or 'none'}"[:200]
            advice = "give --text_field"
            lists = [key for key, field in fields.items() if isinstance(field, list)]
            if lists and not any(isinstance(field, str) for field in fields.values()):
                selected = shlex.quote(f".[{json.dumps(lists[0])}][]")
                advice += f", or run {pipe(f'jq -c {selected}', path)}"
            found = f"has no text in a field {text_field!r} ({has})"
            raise ValueError(f"{name} {found}: {advice}") from None
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not Unicode: {error.reason}") from None
        yield name, io.BytesIO(text)


class Unpacked(io.BufferedReader):
    """The content of a packed file. Raises ValueError that names the file if it is damaged."""

    def __init__(self, path, packing):
        super().__init__(_Unpacking(path, packing), 1 << 20)


class _Unpacking(io.RawIOBase):
    def __init__(self, path, packing):
        self.path, self.packing = path, packing
        self.file = PACKED[packing][1](path)

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        return self._call(self.file.readinto, buffer)

    def seek(self, offset, whence=os.SEEK_SET):
        return self._call(self.file.seek, offset, whence)

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


PIECE_BYTES = 1 << 16  # longer examples are tokenised in pieces of this size, cut at spaces
EXAMPLES = "line", "labelled", "paragraph", "file"  # else a line that separates examples
EXAMPLE_HELP = (
    "what one example is: line, labelled, paragraph, file, or else the separator that stands "
    "between examples, such as '<|endoftext|>', as a line by itself (line)"
)
ONE_LINE = "line", "labelled"  # kinds of examples that have no line break
SEPARATOR = re.compile(r"<[|/]?\w+\|?>|\[[A-Z]+\]|([-=*#~_+\u2013\u2014])( ?\1){2,}|%")
MARK = re.compile(r"<\|\w+\|>")  # no text has it by chance
MOST_LABELS = 10  # that are listed
HEAD_BYTES = 1 << 20  # of a text, in which blank lines and separators are looked for
FEW_EXAMPLES = 100  # a corpus of fewer examples is split for validation by bytes
VAL_SHARE = {"examples": 0.02, "bytes": 0.05}


# ---------------------------------------------------------------- reading text


class Piece(NamedTuple):
    """An example of the corpus, or a part of a very long one."""

    text: str
    n_bytes: int
    first: bool  # starts its example
    last: bool  # ends its example
    label: str | None  # of the example, if it is labelled and this is its first piece
    number: int  # of its example in the corpus: 0, 1, ...
    end: int  # bytes of the corpus up to its end; from the last piece of an example, reading can go on there


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
            bounds = max(0, start - begin), stop - begin
            number = yield from _read_document(name, stream, example, *bounds, max_bytes or PIECE_BYTES, number, begin)
        begin += stream.tell() if size is None else size


def _read_document(name, stream, example, start, stop, max_bytes, number, begin):
    """Yield the pieces of a document, which is at byte `begin` of the corpus, see `read_pieces` -> number of the next example."""
    if example == "labelled" and start == 0:
        start = header_end(stream)
    position, held, first, starts_line = start, bytearray(), True, True  # held: what is read but not yielded, at `position`
    separator = b"" if example == "paragraph" else example.strip().encode()
    is_separated = example not in (*ONE_LINE, "file")

    def piece(raw, last, end):
        nonlocal number
        text = _decode(raw, name, stream, position).replace("\r\n", "\n")
        if position == 0:
            text = text.removeprefix("\ufeff")  # byte order mark
        if first and last and not text.strip():
            return []
        label, tab, rest = text.partition("\t") if example == "labelled" and first else (None, True, text)
        label = label and label.strip()
        if not tab or label == "":
            raise ValueError(f"{name}: line {_line_at(stream, position)} is not label<TAB>text")
        number += last
        return [Piece(rest, len(rest.encode()), first, last, label, number - last, begin + end)]

    n_unread = stop - start
    stream.seek(start)
    longest = max(max_bytes, len(separator) + 100)  # a separator is not read in parts
    while raw := stream.readline(limit := int(min(longest, n_unread))):
        n_unread -= len(raw)
        ends_line = raw.endswith(b"\n")
        is_whole = starts_line and (ends_line or len(raw) < limit)
        begins = first and not held  # a blank line here is left out, like the separator
        stands_between = raw.strip() == separator or (begins and raw.isspace())
        is_separator = is_separated and is_whole and stands_between
        complete = is_separator or (example in ONE_LINE and ends_line)
        starts_line = ends_line
        if not is_separator:
            held += raw
        while len(held) > max_bytes or (len(held) == max_bytes and not complete):
            cut = _find_cut(held[:max_bytes]) or max_bytes  # 0 only of bytes that are not UTF-8
            yield from piece(held[:cut], False, position + cut)
            position, held, first = position + cut, held[cut:], False
        if complete:
            end = position + len(held) + is_separator * len(raw)
            yield from piece(held.rstrip(b"\r\n"), True, end)
            position, held, first = end, bytearray(), True
    if held or not first:
        yield from piece(held.rstrip(b"\r\n"), True, position + len(held))
    return number


def header_end(stream):
    """Find the end of the header of a file of labelled lines -> bytes, or 0 if it has none.

    The first line is a header if its label is in no other line, while that of the second is.
    """

    def label(raw):
        return raw.partition(b"\t")[0].strip()

    stream.seek(0)
    lines = filter(bytes.strip, iter(partial(stream.readline, PIECE_BYTES), b""))
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")  # byte order mark
    end, second, is_header = stream.tell(), next(lines, b""), False
    for raw in lines if b"\t" in first and label(first) != label(second) else ():
        if label(raw) == label(first):
            return 0
        is_header = is_header or label(raw) == label(second)
    return end if is_header else 0


def reading_notes(corpus, example):
    """Say what of a corpus is left out as a header, and what may be a separator -> lines."""
    notes, headers = [], []
    if example == "labelled":
        for name, stream in corpus.documents():
            if end := header_end(stream):
                stream.seek(0)
                headers.append((name, stream.read(end).decode("utf-8-sig", "replace").strip()))
        for name, header in headers[:1]:
            also = f", and those of {count(len(headers) - 1, 'more file')}" if len(headers) > 1 else ""
            notes.append(f"left out as a header: {header!r}, the first line of {name}{also}")
    elif example in ("line", "paragraph") and (found := find_separator(corpus)):
        flag, n = shlex.quote(f"--example={found[0]}"), found[1]
        notes.append(f"{found[0]!r} occurs {n:,} times: if it separates examples, {flag}")
    return notes


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


def list_labels(counts):
    """List labels with their numbers of examples, the most frequent first -> a line, or none."""
    if not counts:
        return []
    listed = [f"{label} {n:,}" for label, n in counts.most_common(MOST_LABELS)]
    rest = f", and {len(counts) - len(listed)} more" if len(counts) > len(listed) else ""
    return [f"{len(counts)} labels: {', '.join(listed)}{rest}"]


def check_separator(corpus, example):
    """Raise ValueError if `example` is a separator, and no line of the corpus is."""
    if example in EXAMPLES:
        return
    separator, is_within = example.strip(), False
    for piece in read_pieces(corpus, "line"):
        if piece.text.strip() == separator:
            return
        is_within = is_within or separator in piece.text
    advice = f"--example is {', '.join(EXAMPLES)}, or a line that stands between examples"
    if separator and is_within:
        pattern = re.sub(r"([][\\.*^$/])", r"\\\1", separator)
        command = shlex.quote(f"s/{pattern}/\\n&\\n/g")
        advice = f"it stands within lines: give it lines of its own, with sed {command}"
    raise ValueError(f"no line of {corpus} is {example!r}: {advice}")


def read_head(corpus, example):
    """Yield the pieces of the first HEAD_BYTES of a corpus."""
    return takewhile(lambda piece: piece.end <= HEAD_BYTES, read_pieces(corpus, example))


def _find_cut(raw):
    """Find where to cut a part of a long example: before its last space, else after its last line, else between characters."""
    space, line = raw.rfind(b" ", 1), raw.rfind(b"\n") + 1
    if space > 0 or line:
        return space if space > 0 else line
    cut = len(raw)
    while cut > 1 and raw[cut - 1] & 0xC0 == 0x80:  # a byte that continues a character
        cut -= 1
    return cut - 1 if raw and raw[cut - 1] >= 0xC0 else len(raw)  # the last character may be incomplete


def _decode(raw, name, stream, position):
    """Decode UTF-8. Raises ValueError that names the first wrong byte of the document; `raw` begins at `position`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = position + error.start
        raise ValueError(
            f"{name} is not UTF-8: byte {wrong} is 0x{raw[error.start]:02x}, in line {_line_at(stream, wrong)}. "
            f"{conversion(name)}"
        ) from None


def _line_at(stream, position):
    """Find the line of a byte of a document, counted from 1."""
    stream.seek(0)
    blocks = (stream.read(min(1 << 20, position - start)) for start in range(0, position, 1 << 20))
    return 1 + sum(block.count(b"\n") for block in blocks)


def split_position(corpus, example="line"):
    """Find the byte where the validation part of a corpus of few examples begins: after a space, close to the last 5 %.

    Returns None for a corpus of at least FEW_EXAMPLES, because `read_part` holds out whole examples of it.
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
    """Yield the pieces of one part of a corpus: "all", "train" or "val". The last two do not overlap.

    start, number: bytes and examples of the corpus that were read before, see `Piece.end`. Example i is in "val" if frac(i * golden ratio) < 2 %: these are spread evenly over the corpus, whatever period its
    examples may have. A corpus of few examples is cut in two instead (`split_position`).
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
