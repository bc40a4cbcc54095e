"""Files that are written as a whole, and what identifies their content."""

import errno
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # no space left, quota exceeded, file too large


@contextmanager
def writing(path):
    """Name the path in the error of a full disk. Put it around the `with` that closes the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_FULL:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path):
    """Yield a temporary path, which replaces `path` at the end. After an error, `path` stays."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the content must be on the disk before its name
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path, progress=None):
    """Compute the sha256 of a file -> hexadecimal. Calls progress(bytes) after each block."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value.update(block)
            if progress:
                progress(len(block))
    return value.hexdigest()
