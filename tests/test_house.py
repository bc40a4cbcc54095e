"""The house: seven files at the top, a wing behind each command, and imports that go one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = "bfn model data train sample evaluate plot".split()
BASE = "common text model bfn data".split()  # what a wing imports, besides itself
WINGS = "training sampling evaluation plotting".split()
MAY_IMPORT = {
    "common": ["common"],
    "text": ["common", "text"],
    "model": [],
    "bfn": ["common.noise"],
    "data": ["model"],
    **{wing: [*BASE, wing] for wing in WINGS},
    "sample": [*BASE, *WINGS],
    "evaluate": [*BASE, *WINGS, "sample"],
    "train": [*BASE, *WINGS, "sample", "evaluate"],
    "plot": [*BASE, *WINGS, "sample", "evaluate"],
    "tools": [*BASE, *WINGS, "sample", "evaluate", "train", "tools"],
    "examples": [*BASE, "examples"],
    "experiments": [*BASE, *WINGS, *TOP, "experiments"],
}
OPTIONAL = "matplotlib PIL safetensors pyarrow torch.utils".split()
OPTIONAL += ["readline", "fcntl", "resource"]  # not on Windows
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])  # without a virtual environment here
CODE = {path: ast.parse(path.read_text()) for path in FILES if "tests" not in path.parts}


def name_of(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", CODE, ids=name_of)


def imports(tree):
    """List the modules that a tree imports, and what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_seven_python_files_stand_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TOP)


@each_file
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = tuple(f"{name}." for name in MAY_IMPORT[room])
    local = [name for name in imports(CODE[path]) if name.split(".")[0] in MAY_IMPORT]
    assert [name for name in local if not f"{name}.".startswith(allowed)] == []


def test_no_files_import_each_other_in_a_circle():
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in CODE}
    reached = {name: set() for name in modules}
    for name, path in modules.items():
        for found in imports(CODE[path]):
            reached[name] |= {found, found.rpartition(".")[0]} & modules.keys()
    for middle in modules:
        for name in modules:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    assert [name for name in modules if name in reached[name]] == []


@each_file
def test_only_optional_libraries_are_imported_within_functions(path):
    functions = [node for node in ast.walk(CODE[path]) if isinstance(node, ast.FunctionDef)]
    found = [name for function in functions for name in imports(function)]
    assert [name for name in found if not name.startswith(tuple(OPTIONAL))] == []


@each_file
def test_no_list_is_multiplied_by_a_truth_value(path):
    products = [n for n in ast.walk(CODE[path]) if isinstance(n, ast.BinOp)]
    lists = [n for n in products if isinstance(n.op, ast.Mult) and isinstance(n.left, ast.List)]
    hidden = ast.Compare | ast.BoolOp | ast.UnaryOp
    found = [n for n in lists if isinstance(n.right, hidden) or "bool" in ast.dump(n.right)]
    assert [n.lineno for n in found] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_line_is_longer_than_100_columns(path):
    lines = path.read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@each_file
def test_commands_import_cli_first_which_ends_them_at_ctrl_c(path):
    if "cli.run(main)" in path.read_text():
        modules = [name.split(".")[0] for name in imports(CODE[path])]
        others = [name for name in modules if name not in sys.stdlib_module_names]
        assert others[0] == "common"
