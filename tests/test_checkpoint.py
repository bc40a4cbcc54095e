"""What is saved, and that a damaged or foreign file is refused."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from untrained import equal, random_network, record

import evaluate
import sample
import train
from common import cli
from common.files import file_hash
from model import BFNTransformer, Config
from text import toy
from text.tokenizer import train_tokenizer
from tools import export
from training import checkpoint, run_folder
from training.checkpoint import load, read_checkpoint, save_checkpoint

CONFIG = Config(K=11, beta1=1.0, d_model=32, n_layers=2, n_heads=2)
ROOT = Path(train.__file__).parent
TOY = ROOT / "examples" / "toy"
OF_RUN = dict(model={}, optimizers=[], best=1.0, identity=dict.fromkeys(run_folder.IDENTITY))


@pytest.fixture
def model():
    return random_network(CONFIG)


@pytest.fixture
def run_dir(tmp_path, model):
    """A run folder with a checkpoint as training writes it, without optimizers."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij\n" * 3)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(text, "char", 0))
    saved = record(
        [model.state_dict()],
        config=vars(CONFIG),
        tokenizer_hash=file_hash(tmp_path / "tokenizer.model"),
        model={},
        optimizers=[],
        step=3,
    )
    save_checkpoint(tmp_path / "best.pt", saved)
    return tmp_path


def test_load_gives_back_the_averaged_weights_and_the_tokenizer(run_dir, model):
    loaded, tokenizer, run = load(run_dir)
    assert (
        tokenizer.decode(tokenizer.encode("badge")) == "badge"
        and run["step"] == 3
        and loaded.config == CONFIG
    )
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_damaged_missing_or_newer_checkpoint_is_refused(run_dir, monkeypatch):
    path = run_dir / "best.pt"
    whole, intact = path.read_bytes(), read_checkpoint(path)
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)
    for i in range(
        0, len(whole), len(whole) // 40
    ):  # a flipped bit; zip files leave some bytes unread
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        try:
            assert equal(read_checkpoint(path), intact)
        except ValueError as error:
            assert "damaged" in str(error) or "format" in str(error)
    incomplete = {name: value for name, value in intact.items() if name != "emas"}
    save_checkpoint(path, incomplete)
    with pytest.raises(ValueError, match=r"not a checkpoint \(ValueError: emas is missing"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(whole)
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with pytest.raises(ValueError, match="this code reads 99"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match="no checkpoint at"):
        read_checkpoint(path)


def write_checkpoints(run_dir, **steps):
    """Write last, best and older checkpoints (older_6, ...) of these steps.

    Those of one step are one file.
    """
    (run_dir / "older").mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        path = (
            checkpoint.older_path(run_dir, step)
            if name.startswith("older")
            else run_dir / f"{name}.pt"
        )
        save_checkpoint(
            path,
            record([{"weight": torch.full((5000,), float(step))}], step=step, **OF_RUN),
        )
        if name == "best" and step == steps["last"]:
            path.unlink()
            os.link(run_dir / "last.pt", path)


DAMAGES = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "without its end": lambda raw: raw[:-1],
    "a flipped bit": lambda raw: (
        raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 16]) + raw[len(raw) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "steps, damaged, expected",
    [
        (dict(last=8, best=8, older_4=4, older_6=6), ["last.pt"], "older/step-0000000006.pt"),
        (
            dict(last=8, best=8, older_4=4, older_6=6),
            ["last.pt", "older/step-0000000006.pt"],
            "older/step-0000000004.pt",
        ),
        (dict(last=8, best=6, older_4=4), ["last.pt"], "best.pt"),
        (dict(last=8, best=4, older_4=4, older_6=6), ["last.pt"], "older/step-0000000006.pt"),
        (dict(last=8, best=6), ["last.pt", "best.pt"], None),
        (dict(last=8, best=8), ["last.pt"], None),
    ],
)
def test_a_damaged_last_checkpoint_is_answered_with_the_command_that_goes_on(
    tmp_path, damage, steps, damaged, expected
):
    run_dir = tmp_path / "a run"
    write_checkpoints(run_dir, **steps)
    for path in (run_dir / name for name in damaged):
        path.write_bytes(
            DAMAGES[damage](path.read_bytes())
        )  # into the file, so links to it are damaged too
    with pytest.raises(ValueError, match=r"last\.pt is damaged") as error:
        run_folder.open_run_folder(run_dir)
    message = str(error.value)
    if expected is None:
        assert message.endswith("there is no other that can be read, give another run folder")
        return
    command, last = shlex.split(message.split("type: ")[1]), str(run_dir / "last.pt")
    assert command == ["rm", "-f", last, "&&", "cp", str(run_dir / expected), last]
    subprocess.run(message.split("type: ")[1], shell=True, check=True)
    assert equal(run_folder.open_run_folder(run_dir), read_checkpoint(run_dir / expected))
    assert f"from step {read_checkpoint(run_dir / 'last.pt')['step']}," in message


def test_going_back_leaves_the_best_checkpoint_alone(tmp_path):
    """Also if last.pt is a link to it."""
    write_checkpoints(tmp_path, last=6, best=6, older_4=4)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    best = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").rename(tmp_path / "away.pt")
    way = checkpoint.way_back(tmp_path)
    (tmp_path / "away.pt").rename(tmp_path / "best.pt")
    subprocess.run(way.split("type: ")[1], shell=True, check=True)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 4
    assert (tmp_path / "best.pt").read_bytes() == best


def test_a_folder_with_only_older_checkpoints_is_not_taken_for_a_new_run(tmp_path):
    write_checkpoints(tmp_path, older_4=4, older_6=6)
    with pytest.raises(
        ValueError,
        match=r"no last\.pt: to go on from step 6, type: rm .* cp \S+older/step-0000000006\.pt ",
    ):
        run_folder.open_run_folder(tmp_path)


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


def test_weights_of_an_edited_network_are_refused_in_one_line(run_dir, monkeypatch):
    monkeypatch.setattr("model.MLP.__init__", lambda self, d_model: torch.nn.Module.__init__(self))
    with pytest.raises(ValueError, match=r"do not fit the network in model\.py"):
        load(run_dir)


def test_equal_sees_any_difference():
    """The comparison that the tests of resuming rely on."""
    one = {"a": [torch.tensor([1.0, 2.0]), 3], "b": "x"}
    assert equal(one, {"a": [torch.tensor([1.0, 2.0]), 3], "b": "x"})
    for other in (
        {"a": [torch.tensor([1.0, 2.0 + 2e-7]), 3], "b": "x"},
        {"a": [one["a"][0], 4], "b": "x"},
        {"a": one["a"]},
    ):
        assert not equal(one, other)


@pytest.mark.parametrize(
    "closed, out, err", [(">&-", "", "error\n"), ("2>&-", "text\n", ""), (">&- 2>&-", "", "")]
)
def test_a_closed_stream_takes_nothing_and_no_other_file_gets_it(tmp_path, closed, out, err):
    """Without care, the next file that is opened has the number of the closed stream."""
    (tmp_path / "command.py").write_text(
        "import os, sys\n"
        "from common import cli\n"
        "def main():\n"
        "    with open('file', 'w') as file:\n"
        "        os.write(2, b'error\\n')\n"
        "        print('text')\n"
        "        file.write('mine')\n"
        "cli.run(main)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} command.py {closed}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- exported models


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder as training writes it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text(toy.corpus(300))
    train_for(folder, "run", f"-d={folder / 'corpus.txt'}", "--tokenizer=word")
    return folder / "run"


def train_for(folder, name, *flags, steps=8):
    """Train a tiny model in `folder / name`."""
    tiny = "-mdim=32 -nl=2 -nh=2 -bsz=4 -slen=32 -nex=2 -lgi=1 -vli=4 -smi=100 -svi=100".split()
    tiny += ["-lr=0.003", "-ema=0.5,0.9", "-wd=0"]
    with pytest.MonkeyPatch.context() as patch:
        words = [
            "train.py",
            f"-mdir={folder / name}",
            f"--cache_dir={folder / 'cache'}",
            f"--max_steps={steps}",
            *tiny,
            *flags,
        ]
        patch.setattr(sys, "argv", words)
        train.main()


@pytest.fixture
def out(trained, tmp_path):
    """An exported folder."""
    export.export(trained, tmp_path / "models" / "out")
    return tmp_path / "models" / "out"


def run_command(monkeypatch, capsys, module, *flags):
    """Run a command -> exit code, what it printed, its errors."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, flags)])
    capsys.readouterr()
    code = 0
    try:
        cli.run(module.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def logits_of(network):
    """What a network says of random distributions."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.rand(2, 7, network.config.K, generator=generator).softmax(-1)
    with torch.no_grad():
        return network(theta, torch.rand(2, 7, generator=generator))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_gives_the_same_logits(trained, tmp_path, monkeypatch, capsys, dtype):
    """Bit for bit in float32; in bfloat16, those of the rounded weights."""
    out = tmp_path / "models" / "shared"
    flags = trained, out, f"--dtype={dtype}"
    assert run_command(monkeypatch, capsys, export, *flags)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(checkpoint.EXPORTED_FILES)
    network, tokenizer, run = load(trained)
    network.load_state_dict(
        {name: weight.to(getattr(torch, dtype)) for name, weight in network.state_dict().items()}
    )
    exported, its_tokenizer, its_run = load(out)
    assert (
        torch.equal(logits_of(exported), logits_of(network)) and exported.config == network.config
    )
    assert its_tokenizer.hash == tokenizer.hash
    for name in run.keys() - {"args"}:
        assert equal(its_run[name], run[name]), name
    assert its_run["args"] == run["args"] | dict(
        data_path="corpus.txt", model_dir="run", cache_dir="cache"
    )
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, _, errors = run_command(monkeypatch, capsys, export, *flags)
    assert code == 2 and "exists already: give another folder" in errors
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_the_commands_do_the_same_with_an_exported_model_as_with_its_run(
    trained, out, tmp_path, monkeypatch, capsys
):
    (tmp_path / "text.txt").write_text(toy.corpus(20, seed=1))
    printed = []
    for folder in (trained, out):
        sampled = run_command(
            monkeypatch,
            capsys,
            sample,
            f"-mdir={folder}",
            "--num_samples=3",
            "--steps=4",
            "--prompt=the",
        )
        measure = (
            f"-mdir={folder}",
            f"-d={tmp_path / 'text.txt'}",
            "--draws=2",
            "--all",
            f"--cache_dir={tmp_path}",
        )
        measured = run_command(monkeypatch, capsys, evaluate, *measure, "--json")
        assert sampled[0] == measured[0] == 0
        printed.append((sampled[1], measured[1]))
        train_for(
            tmp_path,
            f"from-{folder.name}",
            f"-d={tmp_path / 'text.txt'}",
            f"--init_from={folder}",
            steps=2,
        )
    assert printed[0] == printed[1]
    one, other = (
        read_checkpoint(tmp_path / f"from-{folder.name}" / "last.pt") for folder in (trained, out)
    )
    assert equal(one["model"], other["model"]) and equal(one["emas"], other["emas"])


def test_the_card_gives_samples_figures_and_flags_and_no_path_of_the_machine(
    trained, out, monkeypatch, capsys
):
    export = (out / "README.md").read_text()
    samples = run_command(monkeypatch, capsys, sample, f"-mdir={out}", "--num_samples=2")[1]
    assert "".join(f"    {line}".rstrip() + "\n" for line in samples.splitlines()) in export
    figures = next(
        m
        for m in checkpoint.read_metrics(trained)
        if m["step"] == load(out)[2]["step"] and "val_bits_per_char" in m
    )
    names = "bound_nats_per_token bound_bits_per_token bits_per_char exact_nats_per_token"
    for name in [*names.split(), "exact_bits_per_char"]:
        assert f"| {figures[f'val_{name}']:.4f} |" in export, name
        assert load(out)[2]["figures"][name.removeprefix("val_")] == figures[f"val_{name}"]
    assert "`corpus.txt`" in export and "training text has 293 examples, " in export
    for path in out.iterdir():
        assert str(trained.parent).encode() not in path.read_bytes(), path


def test_the_card_of_a_card_keeps_the_figures(out):
    export.export(out, out.parent / "again", torch.bfloat16)
    table = (out / "README.md").read_text().split("## Figures")[1].split("## Training")[0]
    assert table in (out.parent / "again" / "README.md").read_text()


def test_the_command_in_the_card_trains_with_the_same_flags(trained):
    args = load(trained)[2]["args"]
    assert_same_flags(args)
    assert_same_flags(load(TOY)[2]["args"])


def assert_same_flags(args):
    """Compare the flags of a run with those that train.py makes of the command in its card."""
    words = shlex.split(export.training_command(args).replace("\\\n", ""))
    again = vars(train.complete(train.flags().parse_args(words[2:])))
    different = {name for name in args if args[name] != again.get(name)}
    assert different <= {
        "model_dir",
        "cache_dir",
        "device",
        "minutes",
        "vocab_size",
        "val_tokens",
    }, different


def test_a_damaged_foreign_or_missing_file_is_an_error_of_one_line(
    out, tmp_path, monkeypatch, capsys
):
    """Also of every command that reads the folder."""
    intact = {path.name: path.read_bytes() for path in out.iterdir()}
    weights = intact["model.safetensors"]
    other = tmp_path / "other.txt"
    other.write_text("some other words\n" * 3)
    foreign = dict(architectures=["Other"], vocab_size=83)
    damaged = [
        ("model.safetensors", weights[:-1], "written for another"),
        ("model.safetensors", weights[: len(weights) // 2], "written for another"),
        ("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 16]), "written for another"),
        ("model.safetensors", b"", "written for another"),
        ("model.safetensors", None, "No such file"),
        ("config.json", None, "No such file"),
        ("config.json", b"", "JSONDecodeError"),
        ("config.json", intact["config.json"][:-20], "JSONDecodeError"),
        ("config.json", b"\xff\xfe", "UnicodeDecodeError"),
        ("config.json", b"[]", "is missing"),
        ("config.json", json.dumps(foreign).encode(), "format is missing"),
        ("tokenizer.model", None, "missing or not the tokenizer"),
        ("tokenizer.model", train_tokenizer(other, "char", 0), "missing or not the tokenizer"),
    ]
    for name, content, message in damaged:
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(out)
        (out / name).write_bytes(intact[name])
    load(out)
    (out / "model.safetensors").write_bytes(weights[:100])
    for module, *flags in (
        (sample,),
        (evaluate, f"-d={other}"),
        (train, f"-d={other}", f"--init_from={out}"),
    ):
        code, printed, errors = run_command(
            monkeypatch,
            capsys,
            module,
            f"-mdir={out if len(flags) < 2 else tmp_path / 'x'}",
            *flags,
        )
        assert (
            code == 2
            and not printed
            and len(errors.splitlines()) == 1
            and "damaged or not an exported model" in errors
        )


def test_a_hostile_config_is_an_error_of_one_line_and_takes_no_memory(out, monkeypatch):
    """The hash of the weights is recomputed, as whoever writes such files would."""
    intact, library = (
        json.loads((out / "config.json").read_text()),
        pytest.importorskip("safetensors.torch"),
    )
    weights = library.load_file(out / "model.safetensors")

    def refused(message, content=None, weights_file=None, **changes):
        if weights_file is not None:
            (out / "model.safetensors").write_bytes(weights_file)
        changes = dict(weights_hash=file_hash(out / "model.safetensors")) | changes
        (out / "config.json").write_text(content or json.dumps({**intact, **changes}))
        with pytest.raises(ValueError, match=message):
            load(out)

    def built(config):
        assert torch.empty(0).device.type == "meta"
        return BFNTransformer(config)

    monkeypatch.setattr(checkpoint, "BFNTransformer", built)

    for name in (checkpoint.EXPORTED | checkpoint.RUN).keys() - {"emas"}:
        refused(
            f"{name} is missing",
            **{name: {"a": 1}} if name not in ("args", "config") else {name: [1]},
        )
    for name in checkpoint.ARGS:
        refused(f"{name} is missing", args={**intact["args"], name: [{}]})
    refused("word_lengths is missing", word_lengths=["__import__('os')"])
    refused("K is missing", config={})
    refused("unexpected keyword", config={**intact["config"], "hook": 1})
    refused("format 4", format=4)
    refused("RecursionError", content="[" * 100_000)
    refused("digits", content="1" * 5000)
    for changed in (
        dict(K=-1),
        dict(d_model=0),
        dict(n_layers=0),
        dict(n_layers=10**12),
        dict(n_heads=0),
        dict(beta1=-1.0),
    ):
        refused("damaged or not an exported model", config={**intact["config"], **changed})
    refused("a size is not that of a network", args={**intact["args"], "sequence_length": -1})
    for changed in (
        dict(K=10**12),
        dict(d_model=2**40),
        dict(d_model=10**5, n_heads=4),
        dict(K=2**62),
        dict(n_layers=3),
    ):
        refused(r"do not fit the network in model\.py", config={**intact["config"], **changed})
    shapes = dict(weights, **{"linear_out.bias": torch.zeros(3)})
    refused("do not fit the network", weights_file=library.save(shapes))
    refused(
        "do not fit the network",
        weights_file=library.save({n: w for n, w in weights.items() if n != "linear_out.bias"}),
    )
    refused(
        "do not fit the network", weights_file=library.save({**weights, "more": torch.zeros(3)})
    )
    refused(
        "do not fit the network",
        weights_file=library.save({n: w.long() for n, w in weights.items()}),
    )
    refused("SafetensorError", weights_file=b"\x80\x04.")
    refused("SafetensorError", weights_file=(2**60).to_bytes(8, "little") + b"{}")


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export.export(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_an_exported_folder(out, monkeypatch, capsys):
    with pytest.raises(
        ValueError, match="was exported and cannot be resumed: give another -mdir and --init_from"
    ):
        run_folder.open_run_folder(out)
    for name in checkpoint.EXPORTED_FILES:
        code, _, errors = run_command(
            monkeypatch, capsys, sample, f"-mdir={out}", f"--output={out / name}"
        )
        assert code == 2 and "exists already and is not of an earlier" in errors


def test_only_exported_models_need_safetensors(trained, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    load(trained)
    for needs in (lambda: load(out), lambda: export.export(trained, out.parent / "more")):
        with pytest.raises(ValueError, match="pip install safetensors"):
            needs()


def test_weights_that_share_memory_are_exported(trained, tmp_path, monkeypatch):
    """As after an edit that ties the output to the embedding."""
    real = BFNTransformer.__init__

    def tied(self, config):
        real(self, config)
        self.linear_out.weight = self.embedding.weight

    monkeypatch.setattr(BFNTransformer, "__init__", tied)
    export.export(trained, tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out")[0]), logits_of(load(trained)[0]))


def test_the_model_in_the_repository_speaks_its_language(monkeypatch, capsys, tmp_path):
    assert sum(path.stat().st_size for path in TOY.iterdir()) < 2e6
    texts = run_command(monkeypatch, capsys, sample, f"-mdir={TOY}", "--num_samples=16")[
        1
    ].splitlines()
    assert len(texts) == 16 and sum(map(toy.is_grammatical, texts)) >= 12
    (tmp_path / "new.txt").write_text(toy.corpus(20, seed=5))
    flags = (
        f"-mdir={TOY}",
        f"-d={tmp_path / 'new.txt'}",
        "--max_tokens=100",
        "--draws=1",
        f"--cache_dir={tmp_path}",
    )
    assert "bound" in run_command(monkeypatch, capsys, evaluate, *flags)[1]


@pytest.mark.slow
def test_the_command_runs_as_a_program(trained, tmp_path):
    words = sys.executable, "-m", "tools.export", trained, tmp_path / "out"
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr and "MB of weights" in done.stdout


# ---------------------------------------------------------------- records of another type, and NaN


@pytest.mark.parametrize("name", [*checkpoint.RESUMED, "args", "config", "emas", "step", "lengths"])
@pytest.mark.parametrize("value", [None, "7", [], ...])
def test_a_run_resumes_only_from_a_whole_record(trained, tmp_path, name, value):
    shutil.copytree(trained, tmp_path / "run")
    saved = read_checkpoint(trained / "last.pt") | {name: value}
    if value is ...:
        del saved[name]
    (tmp_path / "run" / "last.pt").unlink()  # a link
    torch.save(saved, tmp_path / "run" / "last.pt")
    if value == [] and name in ("optimizers",):
        return  # a list of none: refused when it is put back
    with pytest.raises(ValueError, match="to go on from step"):
        run_folder.open_run_folder(tmp_path / "run")


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), 1e308, 0.0, -1.0])
def test_a_network_with_an_impossible_beta_is_refused(run_dir, beta):
    saved = read_checkpoint(run_dir / "best.pt")
    saved["config"]["beta1"] = beta
    save_checkpoint(run_dir / "best.pt", saved)
    with pytest.raises(ValueError, match="not that of a network|answers with what is no number"):
        load(run_dir)


def test_a_network_that_answers_with_nan_is_refused(run_dir):
    saved = read_checkpoint(run_dir / "best.pt")
    next(iter(saved["emas"][0].values())).fill_(float("nan"))
    save_checkpoint(run_dir / "best.pt", saved)
    with pytest.raises(ValueError, match="answers with what is no number"):
        load(run_dir)


def test_a_tokenizer_of_another_size_than_the_network_is_refused(run_dir):
    saved = read_checkpoint(run_dir / "best.pt")
    text = run_dir / "other.txt"
    text.write_text("abc\n")
    (run_dir / "tokenizer.model").write_bytes(train_tokenizer(text, "char", 0))
    saved["tokenizer_hash"] = file_hash(run_dir / "tokenizer.model")
    save_checkpoint(run_dir / "best.pt", saved)
    with pytest.raises(ValueError, match="tokens, the network"):
        load(run_dir)


@pytest.mark.parametrize(
    "line", ["[" * 9999, '{"step": "3"}', '{"step": 3, "loss": "x"}', "[1]", "7"]
)
def test_figures_that_are_none_are_refused_in_one_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl is not of a run"):
        checkpoint.read_metrics(tmp_path)


def test_no_step_is_saved_after_a_norm_that_is_not_finite(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    real = train.update_weights

    def spoilt(state, args):
        return real(state, args) * (float("nan") if state.step >= 5 else 1.0)

    monkeypatch.setattr(train, "update_weights", spoilt)
    flags = f"-d={tmp_path / 'corpus.txt'}", "--tokenizer=word", "-svi=1", "-lgi=40"
    with pytest.raises(ValueError, match="not finite at step 6"):
        train_for(tmp_path, "run", *flags, steps=30)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5
    assert len(checkpoint.older_checkpoints(tmp_path / "run")) == 2
