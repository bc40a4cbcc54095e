"""The file of `sample.py --output`: it replaces an earlier one when it is whole."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from common import files, parallel
from common.files import writing


def check(args, of_run):
    """Raise ValueError if --output would overwrite anything but texts of an earlier --output.

    of_run: names of the files of a run.
    """
    output = Path(args.output or os.devnull)
    if is_special(output):
        return
    files.check_output(output, is_output, "of an earlier --output")
    if args.prompt_file and output.exists() and output.samefile(args.prompt_file):
        raise ValueError(f"--output={args.output} is the file of prompts: give another name")
    if output.name in of_run and output.resolve().parent == Path(args.model_dir).resolve():
        raise ValueError(f"--output={args.output} is a file of the run: give another name")


def is_special(path):
    """Tell whether a path is a pipe or a device."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def is_output(path):
    """Tell whether a file has the lines of --output."""
    with open(path, encoding="utf-8") as file:
        return json.loads(file.readline()).keys() == {"prompt", "text", "ids", "calls"}


@contextmanager
def opened(path):
    """Open a file that replaces `path` once it is whole. Until then it has a temporary name."""
    path = path if path and parallel.rank() == 0 else os.devnull
    with writing(path):
        unfinished = path if is_special(path) else files.new_temporary(path)
    try:
        with writing(path), open(unfinished, "w", encoding="utf-8") as output:
            yield output
    except BaseException:
        if unfinished is not path and os.path.getsize(unfinished):
            print(f"the texts so far are in {unfinished}", file=sys.stderr)
        elif unfinished is not path:
            os.unlink(unfinished)
        raise
    if unfinished is not path:
        os.replace(unfinished, path)
