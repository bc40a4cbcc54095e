"""Make flow.ipynb from flow.md: python tests/notebook.py.

Prose becomes markdown cells. A ```python fence becomes a code cell, and a ```text fence right after
it its output. All other fences stay in the prose.
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flow.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = """\
# A notebook starts in its own folder. This goes up to the folder of bfn.py.
import os
import sys
from pathlib import Path

folders = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "bfn.py").exists()]
if not folders:
    raise FileNotFoundError("no bfn.py in this folder or above: \
open the notebook where it is in the repository")
os.chdir(folders[0])
sys.path.insert(0, os.getcwd())
"""


def split(page):
    """Cut a page into its parts -> list of (kind, text). The kind follows ```, "" is prose."""
    parts, end = [], 0
    for fence in FENCE.finditer(page):
        parts += [("", page[end : fence.start()]), fence.groups()]
        end = fence.end()
    parts.append(("", page[end:]))
    return [(kind, text.strip("\n") + "\n") for kind, text in parts if text.strip()]


def with_outputs(parts):
    """Add the output that the page shows for each part, or "" -> list of (kind, text, output)."""
    found = []
    for kind, text in parts:
        if kind == "text" and found and found[-1][::2] == ("python", ""):
            found[-1] = (*found[-1][:2], text)
        else:
            found.append((kind, text, ""))
    return found


def to_cells(page):
    """Turn a page into the cells of a notebook -> list of dict."""
    cells = [code_cell(SETUP, "")]
    for kind, text, output in with_outputs(split(page)):
        if kind == "python":
            cells.append(code_cell(text, output))
            continue
        lines = (f"```{kind}\n{text}```\n" if kind else text).splitlines(keepends=True)
        if cells[-1]["cell_type"] == "markdown":
            cells[-1]["source"] += ["\n", *lines]
        else:
            cells.append(dict(cell_type="markdown", metadata={}, source=lines))
    return [dict(cell, id=f"cell-{i}") for i, cell in enumerate(cells)]


def code_cell(source, output):
    """Make a code cell and its output."""
    source, lines = source.splitlines(keepends=True), output.splitlines(keepends=True)
    outputs = [dict(output_type="stream", name="stdout", text=lines)] if lines else []
    return dict(cell_type="code", execution_count=None, metadata={}, outputs=outputs, source=source)


def notebook(page):
    """Turn a page into the text of a notebook, in nbformat 4.5."""
    kernel = dict(display_name="Python 3", language="python", name="python3")
    metadata = dict(kernelspec=kernel, language_info=dict(name="python"))
    content = dict(cells=to_cells(page), metadata=metadata, nbformat=4, nbformat_minor=5)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path = PAGE.with_suffix(".ipynb")
    path.write_text(notebook(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(path)
