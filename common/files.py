"""Files that are written as a whole, never over a file that is not ours, and their hashes."""

import errno
import hashlib
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # no space left, quota exceeded, file too large


@contextmanager
def writing(path):
    """Name the path in the error of a full disk. Put it around the `with` that closes the file.

    numpy and torch say in their own words that the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if re.search("requested and [0-9]+ written|unexpected pos|inline_container", str(error)):
            raise OSError(errno.ENOSPC, "no space left: make room", str(path)) from error
        if getattr(error, "errno", None) in DISK_FULL and error.filename is None:
            error.filename = str(path)
        raise


def new_temporary(path):
    """Create an empty file next to `path`, of a name that nobody has -> its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:50]}.{uuid4().hex}.tmp")
    open(temporary, "x").close()
    return temporary


def remove_leftovers(folder, names):
    """Delete what killed processes have left of files whose names begin with `names`.

    No other process may write there now.
    """
    for path in Path(folder).glob(f".*.{'[0-9a-f]' * 32}.tmp"):
        if path.name[1:].startswith(tuple(names)):
            path.unlink(missing_ok=True)


def check_folder(folder, name, is_ours):
    """Raise ValueError for a folder of other files than earlier results, as file `name` tells."""
    folder = Path(folder)
    if (folder / name).is_file():
        check_output(folder / name, is_ours, "of an earlier command")
    elif os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds other files: give another --output")


@contextmanager
def replacing(path):
    """Yield a temporary path, which replaces `path` at the end. After an error, `path` stays."""
    with writing(path):
        temporary = new_temporary(path)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the content must be on the disk before its name
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path, content):
    """Write bytes as a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_output(path, is_ours, kind):
    """Refuse a path that holds anything but an earlier output of this kind, or cannot be written.

    is_ours: function of the path. kind: words for the message. Raises ValueError.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            if path.is_file() and is_ours(path):
                return
        raise ValueError(f"{path} exists already and is not {kind}: give another name")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        found = f"{folder} is {'read-only' if folder.is_dir() else 'a file'}"
        raise ValueError(f"{path} cannot be written: {found}, give another name")


def file_hash(path, progress=None):
    """Compute the sha256 of a file -> hexadecimal. Calls progress(bytes) after each block."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value.update(block)
            if progress:
                progress(len(block))
    return value.hexdigest()
