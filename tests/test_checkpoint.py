"""What is saved, and that a damaged or foreign file is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from untrained import equal, random_network

import checkpoint as checkpoint_file
import cli
from checkpoint import load, read_checkpoint, save_checkpoint
from model import Config
from text import file_hash, train_tokenizer

CONFIG = Config(K=11, beta1=1.0, d_model=32, n_layers=2, n_heads=2)


@pytest.fixture
def model():
    return random_network(CONFIG)


@pytest.fixture
def run_dir(tmp_path, model):
    """A run folder with a checkpoint as training writes it, without optimizers."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij\n" * 3)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(text, "char", 0))
    saved = dict(
        config=vars(CONFIG),
        tokenizer_hash=file_hash(tmp_path / "tokenizer.model"),
        emas=[model.state_dict()],
        model={},
        optimizers=[],
        step=3,
    )
    save_checkpoint(tmp_path / "best.pt", saved)
    return tmp_path


def test_load_gives_back_the_averaged_weights_and_the_tokenizer(run_dir, model):
    loaded, tokenizer, run = load(run_dir)
    assert tokenizer.decode(tokenizer.encode("badge")) == "badge" and run["step"] == 3 and loaded.config == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_is_the_same_model_in_a_smaller_file(run_dir, model, tmp_path, monkeypatch, capsys, dtype):
    run = read_checkpoint(run_dir / "best.pt")
    save_checkpoint(run_dir / "best.pt", {**run, "model": model.state_dict(), "emas": [run["emas"][0]] * 2})
    out = tmp_path / "models" / "shared"
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "export", str(run_dir), str(out), f"--dtype={dtype}"])
    cli.run(checkpoint_file.main)
    assert {path.name for path in out.iterdir()} == {"best.pt", "tokenizer.model"}
    exported, tokenizer, run = load(out)
    assert run["step"] == 3 and tokenizer.decode(tokenizer.encode("badge")) == "badge"
    for name, value in model.state_dict().items():
        kept = value.to(getattr(torch, dtype)).to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(exported.state_dict()[name], kept)
    assert (out / "best.pt").stat().st_size < (run_dir / "best.pt").stat().st_size / 2
    with pytest.raises(SystemExit) as error:
        cli.run(checkpoint_file.main)
    assert error.value.code == 2 and "exists already: give another folder" in capsys.readouterr().err
    (out / "best.pt").rename(out / "last.pt")
    with pytest.raises(ValueError, match="was exported and cannot be resumed: give another -mdir and --init_from"):
        checkpoint_file.open_run_folder(out)


def test_a_damaged_missing_or_newer_checkpoint_is_refused(run_dir, monkeypatch):
    path = run_dir / "best.pt"
    whole, intact = path.read_bytes(), read_checkpoint(path)
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)
    for i in range(0, len(whole), len(whole) // 40):  # a flipped bit; zip files leave some bytes unread
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        try:
            assert equal(read_checkpoint(path), intact)
        except ValueError as error:
            assert "damaged" in str(error) or "format" in str(error)
    incomplete = {name: value for name, value in intact.items() if name != "emas"}
    save_checkpoint(path, incomplete)
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint \(KeyError\)"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(whole)
    monkeypatch.setattr(checkpoint_file, "FORMAT", 99)
    with pytest.raises(ValueError, match="this code reads 99"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match="no checkpoint at"):
        read_checkpoint(path)


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(run_dir):
    with open(run_dir / "tokenizer.model", "ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match="not the tokenizer"):
        load(run_dir)


def test_a_write_that_fails_leaves_the_earlier_checkpoint(run_dir, monkeypatch):
    before = (run_dir / "best.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run_dir / "best.pt", {"step": 4})
    assert (run_dir / "best.pt").read_bytes() == before
    assert not list(run_dir.glob("*.tmp"))


def test_a_checkpoint_of_the_earlier_format_loads_under_its_new_names(run_dir, model):
    """Format 4 had other names for the position embedding and the MLP."""
    renamed = {"position.": "place.", ".mlp.": ".forward_layer.", ".film_mlp.": ".film_forward."}
    saved = read_checkpoint(run_dir / "best.pt")
    weights = saved["emas"][0]
    for new, old in renamed.items():
        assert any(new in name for name in weights)
        weights = {name.replace(new, old): value for name, value in weights.items()}
    torch.save({**saved, "format": 4, "model": weights, "emas": [weights]}, run_dir / "best.pt")
    loaded, _, _ = load(run_dir)
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert read_checkpoint(run_dir / "best.pt")["model"].keys() == model.state_dict().keys()


def test_weights_of_an_edited_network_are_refused_in_one_line(run_dir, monkeypatch):
    monkeypatch.setattr("model.MLP.__init__", lambda self, d_model: torch.nn.Module.__init__(self))
    with pytest.raises(ValueError, match=r"do not fit the network in model\.py"):
        load(run_dir)


def test_equal_sees_any_difference():
    """The comparison that the tests of resuming rely on."""
    one = {"a": [torch.tensor([1.0, 2.0]), 3], "b": "x"}
    assert equal(one, {"a": [torch.tensor([1.0, 2.0]), 3], "b": "x"})
    for other in ({"a": [torch.tensor([1.0, 2.0 + 2e-7]), 3], "b": "x"}, {"a": [one["a"][0], 4], "b": "x"}, {"a": one["a"]}):
        assert not equal(one, other)


@pytest.mark.parametrize("closed, out, err", [(">&-", "", "error\n"), ("2>&-", "text\n", ""), (">&- 2>&-", "", "")])
def test_a_closed_stream_takes_nothing_and_no_other_file_gets_it(tmp_path, closed, out, err):
    """Without care, the next file that is opened has the number of the closed stream."""
    (tmp_path / "command.py").write_text(
        "import os, sys, cli\n"
        "def main():\n"
        "    with open('file', 'w') as file:\n"
        "        os.write(2, b'error\\n')\n"
        "        print('text')\n"
        "        file.write('mine')\n"
        "cli.run(main)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parent))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} command.py {closed}"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert (tmp_path / "file").read_text() == "mine"
