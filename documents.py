"""The files of a corpus, and the documents in them.

    file      plain text, or .jsonl: a JSON object per line, one field of which is text; each may be packed as .gz
    document  a text file, or the text of one object: a stream of UTF-8 bytes
"""

import glob
import gzip
import io
import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property

from tqdm import tqdm

SUFFIXES = ".txt", ".txt.gz", ".jsonl", ".jsonl.gz"  # what is read of a folder


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
        return sum(stream.seek(0, os.SEEK_END) for _, stream in tqdm(self.documents(), "measuring the text", delay=1, disable=None))

    def documents(self):
        """Yield the documents in order -> pairs of a name for messages and a binary stream, to be read before the next."""
        for path in self.files:
            with Unpacked(path) if path.endswith(".gz") else open(path, "rb") as stream:
                if is_jsonl(path):
                    yield from _read_objects(path, stream, self.text_field)
                else:
                    yield path, stream


def find_files(path):
    """List the files that a path names: a file, all SUFFIXES in a folder, a pattern such as "texts/**/*.txt", or several of
    these with commas between them. Raises ValueError for a part that names no file.
    """
    files = []
    for part in [path] if os.path.exists(path) else path.split(","):
        if os.path.isdir(part):
            found = sorted(entry.path for entry in os.scandir(part) if entry.name.endswith(SUFFIXES) and entry.is_file())
        else:
            found = [part] if os.path.isfile(part) else sorted(filter(os.path.isfile, glob.glob(part, recursive=True)))
        if not found:
            kinds = f" (a folder is searched for {', '.join(SUFFIXES)})" if os.path.isdir(part) else ""
            raise ValueError(f"no text file at {part}{kinds}")
        files += found
    return list(dict.fromkeys(files))


def is_jsonl(path):
    """Whether a file holds objects instead of plain text, by its name."""
    return path.endswith((".jsonl", ".jsonl.gz"))


def _read_objects(path, stream, text_field):
    """Yield the texts of a .jsonl file as documents. Raises ValueError that names the line."""
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        name = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from None
        fields = value if isinstance(value, dict) else {}
        try:
            text = fields.get(text_field).encode()
        except AttributeError:
            has = f"its fields are {', '.join(fields) or 'none'}"[:200]
            raise ValueError(f"{name} has no text in a field {text_field!r} ({has}): give --text_field") from None
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not Unicode: {error.reason}") from None
        yield name, io.BytesIO(text)


class Unpacked(io.BufferedReader):
    """The content of a .gz file. Raises ValueError that names the file if it is damaged."""

    def __init__(self, path):
        super().__init__(_Unpacking(path), 1 << 20)


class _Unpacking(io.RawIOBase):
    def __init__(self, path):
        self.path, self.file = path, gzip.open(path)

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
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self.path} is damaged or not a .gz file ({error}): pack it again") from None

    def close(self):
        self.file.close()
        super().close()
