"""The pages in docs/ do what they show: blocks run, commands and links exist, the notebook fits."""

import gzip
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import notebook as notebook_file
import pytest
import torch

from text import toy

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"\bpython ((?:-m (?:tools|examples|experiments)\.\w+|\w+\.py)\b[^\n`&|;#]*)")
SIZES = "--max_steps=2 --vocab_size=300 -mdim=16 -nl=1 --compile=off --fused=off"
QUICK = {  # flags that make a command quick; other commands are only parsed
    "tools.stats": "",
    "tools.normalize": "",
    "tools.export": "",
    "tools.classify": "--steps=2",
    "examples.moons": "--max_steps=2",
    "plot": "",
    "sample": "--num_samples=1 --steps=2",
    "train": SIZES,
}
INPUTS = "model_dir", "run_dir", "run_dirs", "data_path", "files"  # flags of what a command reads
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PICTURE_BYTES = 120_000
SENTENCES = toy.corpus(100).splitlines()

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def parts_of(page):
    return notebook_file.split(page.read_text())


def commands(text):
    return COMMAND.findall(text.replace("\\\n", " "))


def parse(command):
    """Parse the flags of a command as its module does -> the module, its words, what it reads."""
    words = shlex.split(command)
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    words = words[2 if words[0] == "-m" else 1 :]
    module = importlib.import_module(name)
    if not hasattr(module, "flags"):
        assert not words, f"{name} has no flags"
        return module, words, []
    if name == "plot":
        args = vars(module.flags(words[0]).parse_args(words[1:]))
    elif (other := getattr(module, "OTHER", {}).get(words[0] if words else "")) is not None:
        args = vars(other.flags().parse_args(words[1:]))
    else:
        args = vars(module.flags().parse_args(words))
    read = [args[flag] for flag in INPUTS if args.get(flag)]
    return (
        module,
        words,
        [p for paths in read for p in (paths if isinstance(paths, list) else [paths])],
    )


def is_same(printed, shown):
    """Whether words are the same, and numbers up to one unit in the last digit shown.

    Processors round differently.
    """
    if NUMBER.sub("0", printed).split() != NUMBER.sub("0", shown).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(
        abs(float(a) - float(b)) < 1.01 * 10.0 ** -len(b.partition(".")[2]) for a, b in pairs
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary folder that looks like the repository's, with the texts that a reader brings."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "TEXTS").mkdir()
    with gzip.open(tmp_path / "TEXTS" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": sentence}) + "\n" for sentence in SENTENCES)
    (tmp_path / "MORE.txt").write_text("\n".join(SENTENCES) + "\n")
    (tmp_path / "LABELLED.tsv").write_text(
        "".join(f"{'LABEL' if i % 2 else 'other'}\t{s}\n" for i, s in enumerate(SENTENCES))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    return tmp_path


def test_outputs_are_compared_by_words_and_by_digits():
    assert is_same("a 1.234, 12 of 100\n", "a  1.233, 13 of 100")
    assert not is_same("a 1.234", "a 1.232")
    assert not is_same("a 1.2", "b 1.2")
    assert not is_same("a 1.2 3", "a 1.2")


@each_page
def test_every_fence_is_of_a_kind_that_is_tested(page):
    """`python edit` is a change to a file: tests/test_readme.py makes it."""
    assert {kind for kind, _ in parts_of(page)} <= {"", "python", "python edit", "text", "sh"}


@pytest.mark.slow
@each_page
def test_the_page_runs_from_top_to_bottom_and_prints_what_it_shows(
    page, folder, capsys, monkeypatch
):
    """As a reader would: in one folder, its blocks in one session, its commands made quick."""
    namespace = {}
    for kind, text, output in notebook_file.with_outputs(parts_of(page)):
        if kind == "python":
            name = f"{page.name}: {text.splitlines()[0]} ..."
            exec(compile(text, name, "exec"), namespace)  # noqa: S102
            printed = capsys.readouterr().out
            assert not output or is_same(printed, output), (
                f"{page.name} shows\n{output}and this was printed:\n{printed}"
            )
        if kind == "sh":
            for command in commands(text):
                run_quickly(command, monkeypatch)
            capsys.readouterr()


def run_quickly(command, monkeypatch):
    module, words, _ = parse(command)
    name = module.__name__
    if name in QUICK:
        words = [word for word in words if not word.startswith("--minutes")]
        monkeypatch.setattr(sys, "argv", [name, *words, *QUICK[name].split()])
        with torch.random.fork_rng():  # a reader's command is a separate process
            module.main()
        for path in re.findall(r"--output=(\S+)", command):
            assert Path(path).stat().st_size > 0


def test_commands_are_found_with_their_flags_as_files_and_as_modules():
    text = "`python train.py -d=A` then\n    python -m tools.stats A \\\n  --example=file\n"
    text += "python -m pytest -q; python pip.txt"
    assert [line.split() for line in commands(text)] == [
        ["train.py", "-d=A"],
        ["-m", "tools.stats", "A", "--example=file"],
    ]
    assert parse("-m tools.stats A --example=file")[1] == ["A", "--example=file"]
    for wrong in ("-m tools.stats A --exampel=file", "train.py --gone"):
        with pytest.raises(ValueError, match="unknown flag"):
            parse(wrong)


@each_page
def test_every_command_has_flags_and_files_that_exist(page):
    text = page.read_text()
    for command in commands(text):
        for path in map(str, parse(command)[2]):
            assert (
                path.startswith("runs/") or path.split(".")[0].isupper() or (ROOT / path).exists()
            ), command
    for words in re.findall(r"python -m pytest ([^\n`]*)", text):
        assert all((ROOT / word).exists() for word in words.split() if word.endswith(".py")), words


@each_page
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, section = target.partition("#")
        path = page.parent / path
        assert path.exists(), target
        assert path.suffix != ".png" or path.stat().st_size < PICTURE_BYTES, (
            f"{target} is too large"
        )
        titles = (
            [line.lstrip("# ").lower() for line in path.read_text().splitlines() if line[:1] == "#"]
            if section
            else []
        )
        assert not section or section in [
            re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles
        ], target


def test_the_results_are_at_most_4000_words():
    """Older figures belong in experiments/RECORD.md."""
    assert len((ROOT / "docs" / "results.md").read_text().split()) <= 4000


def test_the_notebook_is_the_page():
    """So its cells run from top to bottom: they are the page's blocks, after SETUP."""
    page, path = notebook_file.PAGE, notebook_file.PAGE.with_suffix(".ipynb")
    assert path.read_text() == notebook_file.notebook(page.read_text()), (
        "run: python tests/notebook.py"
    )
    cells = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert cells == [
        notebook_file.SETUP,
        *(text for kind, text in parts_of(page) if kind == "python"),
    ]


def test_the_notebook_finds_the_repository_from_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.chdir(ROOT / "docs")
    exec(notebook_file.SETUP, {})  # noqa: S102
    assert Path.cwd() == ROOT and sys.path == [str(ROOT)]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no bfn.py .* open the notebook"):
        exec(notebook_file.SETUP, {})  # noqa: S102


def test_the_notebook_runs_in_jupyter():
    """With the outputs that it shows."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    path = notebook_file.PAGE.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    shown = [
        [output.text for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert all(is_same(a, "".join(b)) for a, b in zip(printed, shown, strict=True) if b)
