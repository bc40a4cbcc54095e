"""What the README promises: its commands exist, its recipes work as written, its links lead on."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from test_docs import commands, parse
from untrained import make_run

import bfn
import model as model_file
import train
from model import BFNTransformer, Config
from text import toy

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "ideas.md").read_text()


def recipe(start, n_lines):
    """Lines of the examples in docs/ideas.md, from the one that starts so."""
    lines = RECIPES.splitlines()
    i = next(i for i, line in enumerate(lines) if line.startswith(start))
    return "\n".join(lines[i : i + n_lines])


def test_every_command_has_flags_that_exist():
    found = commands(README)
    assert len(found) >= 20 and sum(line.startswith("-m ") for line in found) >= 8
    for line in found:
        parse(line)


def test_files_pictures_and_links_exist():
    for path in re.findall(r"`([\w/]+\.py|\w+/)`|\]\((?!http)([^)#\s]+)", README):
        assert (ROOT / max(path)).exists(), path
    for path in re.findall(r"((?:tests|experiments|training)/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    lines = (ROOT / "docs" / "results.md").read_text().splitlines()
    titles = [line.lstrip("# ").lower() for line in lines if line[:1] == "#"]
    sections = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]
    for link in re.findall(r"docs/results\.md#([\w-]+)", README):
        assert link in sections, link


def test_the_table_of_files_has_at_most_13_rows_and_names_each_file_and_folder_of_code():
    _, section = README.split("## Files, in reading order\n")
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) <= 13
    tops = {path.name for path in ROOT.glob("*.py")}
    tops |= {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert tops == set(re.findall(r"`(\w+(?:\.py|/))`", "\n".join(rows)))


def test_it_is_short_enough_to_be_read():
    assert len(README.split()) <= 1500


def test_the_lines_of_python_print_texts_and_a_likelihood(tmp_path, capsys):
    lines = README[README.index("    from sample import Sampler\n") :].split("\n\n`model.fill")[0]
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(300))
    code = re.sub("^    ", "", lines, flags=re.MULTILINE).replace("runs/demo", str(run_dir))
    exec(code, {})  # noqa: S102
    texts, log_p = capsys.readouterr().out.splitlines()
    assert texts.count("the ") >= 8 and float(log_p.strip("[]")) < 0


def test_the_recipe_for_another_loss_works(monkeypatch):
    namespace = dict(vars(bfn))
    exec(recipe("def training_loss", 2), namespace)  # noqa: S102
    monkeypatch.setattr(bfn, "training_loss", namespace["training_loss"])
    log_p, ids = torch.randn(2, 3, 5).log_softmax(-1), torch.randint(5, (2, 3))
    assert torch.equal(
        bfn.training_loss(log_p, ids, torch.rand(2, 3), 3.0), bfn.cross_entropy(log_p, ids)
    )


def test_the_recipe_for_a_sampler_commits_from_left_to_right():
    namespace = dict(vars(bfn), SAMPLERS=dict(bfn.SAMPLERS))
    exec(recipe("def leftmost", 3), namespace)  # noqa: S102
    seen = []
    controls = bfn.Controls(
        "left_to_right", 4, watch=lambda t, p, given: seen.append((t[0] == 1).tolist())
    )
    ids = torch.zeros(1, 8, dtype=torch.long)
    task = bfn.Task(
        lambda theta, t: theta, ids, ids.bool(), 3.0, 2, controls, bfn.Draws(bfn.draw_keys(1, 8))
    )
    namespace["SAMPLERS"]["left_to_right"](task)
    assert seen == [[i < n for i in range(8)] for n in (0, 2, 4, 6)]


def test_the_recipe_for_a_gate_in_the_mlp_trains(monkeypatch):
    source = inspect.getsource(model_file.MLP)
    source = source.replace("nn.init.zeros_", recipe("self.gate", 1) + "\n        nn.init.zeros_")
    body = source.index("        h = F.relu")
    source = source[:body] + "        " + recipe("return self.down", 1)
    namespace = dict(vars(model_file))
    exec(source, namespace)  # noqa: S102
    monkeypatch.setattr(model_file, "MLP", namespace["MLP"])
    network = BFNTransformer(Config(K=5, beta1=1.0, d_model=32, n_layers=1, n_heads=2))
    torch.nn.init.normal_(network.blocks[0].mlp.down.weight)
    torch.nn.init.normal_(network.linear_out.weight)
    assert any(p is network.blocks[0].mlp.gate.weight for p in network.layer_matrices())
    network(
        torch.rand(1, 3, 5), torch.rand(1, 3), torch.ones(1, 3).long()
    ).square().sum().backward()
    assert network.blocks[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["no_cross_entropy", "no_convolution", "adamw"])
def test_the_variants_that_are_named_exist(name):
    source = (ROOT / "experiments" / "compare.py").read_text()
    assert f"def {name}(args)" in source and name in README
