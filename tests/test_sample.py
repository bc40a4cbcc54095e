"""The sampling command, and the same from Python."""

import json
import re
import sys

import numpy as np
import pytest
import torch

import bfn
import data
import evaluate
import sample
from common import cli
from common.noise import mix_seed
from sample import Sampler
from sampling.generate import generate
from sampling.prompts import (
    make_template,
)
from text import cache
from text.tokenizer import one_line


def run_command(monkeypatch, capsys, *argv):
    """Run sample.py -> the lines of its standard output."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    cli.run(sample.main)
    return capsys.readouterr().out.splitlines()


def run_failing_command(monkeypatch, capsys, *argv):
    """Run sample.py with flags that it refuses -> its one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, capsys, *argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and not output.out
    return output.err


def test_a_sample_of_a_model_of_lines_is_printed_on_one_line():
    assert sample.lay_out("a\u2028b\x0cc\r\nd", {"args": {"example": "line"}}) == "a b c d"
    assert sample.lay_out("a\nb", {"args": {"example": "paragraph"}}) == "a\nb"


def test_texts_of_several_lines_are_printed_with_a_separator_and_written_as_json(
    poems, monkeypatch, capsys, tmp_path
):
    prompt = r"--prompt=the king\nsleeps ___{2}"
    lines = run_command(
        monkeypatch,
        capsys,
        f"-mdir={poems}",
        prompt,
        "--num_samples=2",
        f"--output={tmp_path / 'out'}",
    )
    records = [json.loads(line) for line in open(tmp_path / "out")]
    assert (
        lines.count(sample.SEPARATOR) == 2
        and lines[:1] == ["the king"]
        and lines[1].startswith("sleeps")
    )
    for record in records:
        assert (
            record["text"].startswith("the king\nsleeps")
            and record["prompt"] == "the king\nsleeps ___{2}"
        )


def test_a_draft_of_several_lines_is_read_with_its_line_breaks(poems, monkeypatch, capsys):
    drafts = []
    monkeypatch.setattr(sample.Sampler, "read_draft", lambda self, text: drafts.append(text) or ())
    run_command(
        monkeypatch,
        capsys,
        f"-mdir={poems}",
        r"--draft=the king\nsleeps",
        "--num_samples=1",
        "--steps=1",
    )
    assert drafts == ["the king\nsleeps"]


def test_a_stronger_draft_keeps_more_of_its_text(run_dir, loaded, monkeypatch, capsys, tmp_path):
    _, tokenizer, _ = loaded
    text, n_kept = "the old king sleeps", []
    draft = tokenizer.add_marks(tokenizer.encode(text))
    flags = [
        f"-mdir={run_dir}",
        f"--draft={text}",
        "--num_samples=20",
        "--steps=4",
        f"--output={tmp_path / 'out'}",
    ]
    for strength in (0.01, 0.6, 0.99):
        run_command(monkeypatch, capsys, *flags, f"--strength={strength}")
        texts = [json.loads(line)["ids"] for line in open(tmp_path / "out")]
        assert len(texts) == 20 and all(len(ids) == len(draft) for ids in texts)
        assert tokenizer.bos < 0 or all(ids[0] == tokenizer.bos for ids in texts)
        n_kept.append(sum(a == b for ids in texts for a, b in zip(ids, draft, strict=True)))
    assert n_kept[0] < n_kept[1] < n_kept[2]


def test_the_command_samples_a_prompt_with_a_gap_next_to_a_long_text(run_dir, monkeypatch, capsys):
    flags = [f"-mdir={run_dir}", "--num_samples=1", "--steps=3", "--prompt=the ___ walks"]
    (text,) = run_command(monkeypatch, capsys, *flags)
    assert run_command(monkeypatch, capsys, *flags, "--prompt=anna", "--length=50")[0] == text


def test_the_trace_ends_with_the_text_that_is_printed(run_dir, monkeypatch, capsys):
    """The network is untrained, so the likeliest tokens are not the ones that are drawn."""
    argv = [
        "sample.py",
        f"-mdir={run_dir}",
        "--num_samples=1",
        "--steps=3",
        "--prompt=the_\u5468 ___{9}",
        "--trace",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    output = capsys.readouterr()
    assert output.err.endswith(f"\nsample  {output.out}") and output.out.startswith("the_\u5468")


def test_the_examples_of_training_are_free_or_continue_validation_texts(run_dir, loaded, tmp_path):
    model, tokenizer, run = loaded
    tokens = cache.load_corpus(run_dir / "text.txt", tokenizer, tmp_path)
    lines = Sampler(model, tokenizer, run).examples(tokens, n=5, seed=3)
    free = [make_template("", tokenizer, run, mix_seed(3, i)) for i in range(2)]
    assert lines[:2] == [
        one_line(tokenizer.decode(ids)) for ids, _ in generate(model, tokenizer, free, 3)
    ]
    plan = data.plan_validation(tokens, 32)
    for i, line in list(enumerate(lines))[2:]:
        start, length = plan.starts[i], plan.lengths[i]
        assert line.startswith(
            f"[{tokenizer.decode(tokens.ids[start : start + length // 3].tolist())}] "
        )
    assert len(lines) == 5


# ---------------------------------------------------------------- the command


def test_the_command_prints_samples_and_nothing_else(run_dir, monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffanna ___\n\n___ walks\n")  # with a byte order mark
    flags = [
        f"-mdir={run_dir}",
        "--num_samples=2",
        "--steps=3",
        "--device=cpu",
        "--prompt=the",
        f"--prompt_file={prompts}",
    ]
    lines = run_command(monkeypatch, capsys, *flags, f"--output={tmp_path / 'out'}")
    records = [json.loads(line) for line in open(tmp_path / "out")]
    assert len(lines) == 6 and lines == [record["text"] for record in records]
    assert [record["prompt"] for record in records] == ["the"] * 2 + ["anna ___"] * 2 + [
        "___ walks"
    ] * 2
    assert lines == run_command(monkeypatch, capsys, *flags, "--trace")


def test_a_file_without_prompts_is_refused(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    for name, message in (("empty", "no prompts in"), ("missing", "no file of prompts at")):
        assert message in run_failing_command(
            monkeypatch, capsys, f"-mdir={run_dir}", f"--prompt_file={tmp_path / name}"
        )


def test_unknown_words_get_a_warning_and_are_printed_as_written(run_dir, monkeypatch, capsys):
    """bpe spells them in bytes."""
    argv = [
        "sample.py",
        f"-mdir={run_dir}",
        "--num_samples=1",
        "--steps=2",
        "--prompt=the_\u5468 ___ the zq\u672b",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    output = capsys.readouterr()
    assert ("does not know" in output.err) == (run_dir.name != "bpe")
    assert re.fullmatch("the_\u5468 \\S+ the zq\u672b\n", output.out)


def test_all_bad_lines_of_a_file_of_prompts_are_named_at_once(
    run_dir, monkeypatch, capsys, tmp_path
):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfanna ___\r\n\n___{x}\n \nthe ___{40}\ncaf\xe9\nanna\n")
    error = run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", f"--prompt_file={path}")
    assert re.findall(r"line (\d+): (\S+)", error) == [
        ("3", "'___{x}':"),
        ("5", "'the"),
        ("6", "'caf\\udce9'"),
    ]


@pytest.mark.parametrize("flag", ["--draft", "--ban", "--hint"])
def test_text_that_is_not_unicode_gets_one_line(run_dir, monkeypatch, capsys, flag):
    assert "is not UTF-8: convert it" in run_failing_command(
        monkeypatch, capsys, f"-mdir={run_dir}", f"{flag}=caf\udce9"
    )


def test_a_prompt_that_is_not_unicode_gets_one_line(run_dir, monkeypatch, capsys):
    assert "is not UTF-8" in run_failing_command(
        monkeypatch, capsys, f"-mdir={run_dir}", "--prompt=caf\udce9"
    )


def test_output_never_overwrites_the_prompts_or_the_run(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("anna\n")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    for path in (tmp_path / "prompts.txt", run_dir / "best.pt", run_dir / "metrics.jsonl"):
        before = path.read_bytes()
        flags = [
            f"-mdir={run_dir}",
            f"--prompt_file={tmp_path / 'prompts.txt'}",
            f"--output={path}",
        ]
        assert "give another name" in run_failing_command(monkeypatch, capsys, *flags)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top_p=0"], "must be above 0"),
        (["--length=70", "--trace"], "--hint and --trace need texts of at most 32 tokens"),
        (["--prompt=the ___ sleeps ___{40}", "--length=60"], "the model was trained on 32"),
        (["--draft=the king", "--length=9"], "--draft is the whole text"),
        (["--draft= "], "--draft is empty"),
        ([f"--draft={'the king ' * 20}"], "the model was trained on at most 32"),
    ],
)
def test_flags_that_do_not_go_together_get_one_line(run_dir, monkeypatch, capsys, flags, message):
    assert message in run_failing_command(
        monkeypatch, capsys, f"-mdir={run_dir}", "--steps=2", *flags
    )


def test_a_folder_without_a_run_gets_one_line(monkeypatch, capsys, tmp_path):
    assert "no checkpoint at" in run_failing_command(monkeypatch, capsys, f"-mdir={tmp_path}")


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_all_controls_go_together_on_the_command_line(
    run_dir, loaded, monkeypatch, capsys, tmp_path, sampler
):
    _, tokenizer, _ = loaded
    token = tokenizer.pieces[tokenizer.encode("the")[0]].removeprefix("\u2581")
    flags = [
        f"-mdir={run_dir}",
        "--num_samples=2",
        "--steps=4",
        f"--output={tmp_path / 'out'}",
    ]
    flags += [
        "--temperature=0.8",
        "--top_p=0.9",
        "--until=0.5",
        f"--hint=1:{token}=0.5",
        f"--ban={token}",
    ]
    flags += [f"--sampler={sampler}"]
    if sampler == "pace":
        flags.append("--corrections=1")
    for text in ("--length=12", "--draft=the king sleeps"):
        lines = run_command(monkeypatch, capsys, *flags, text)
        records = [json.loads(line) for line in open(tmp_path / "out")]
        assert lines == [record["text"] for record in records] and len(lines) == 2
        assert all(1 <= record["calls"] <= 5 for record in records)


def test_the_command_writes_texts_longer_than_the_trained_length(
    run_dir, monkeypatch, capsys, tmp_path
):
    flags = [
        f"-mdir={run_dir}",
        "--num_samples=1",
        "--steps=2",
        "--length=70",
        f"--output={tmp_path / 'out'}",
    ]
    assert len(run_command(monkeypatch, capsys, *flags)) == 1
    assert len(json.loads((tmp_path / "out").read_text())["ids"]) > 16


def test_solver_is_another_name_for_sampler():
    assert sample.flags().parse_args(["--solver=sde2"]) == sample.flags().parse_args(
        ["--sampler=sde2"]
    )


@pytest.mark.parametrize("command, flag", [(sample, "--steps"), (evaluate, "--n_steps")])
def test_more_than_a_million_steps_are_refused(command, flag):
    with pytest.raises(ValueError, match="must be at most 1000000"):
        command.flags().parse_args(["-d=x"] * (command is evaluate) + [f"{flag}=1000001"])


# ---------------------------------------------------------------- from Python


def test_the_object_and_the_command_write_the_same_texts(run_dir, monkeypatch, capsys):
    flags = [
        "--num_samples=3",
        "--steps=4",
        "--seed=5",
        "--prompt=the ___ sleeps",
        "--ban=the",
    ]
    model = sample.Sampler.load(run_dir)
    banned = [] if "char" in str(run_dir) or "bpe" in str(run_dir) else ["the"]
    flags = flags if banned else [flag for flag in flags if flag != "--ban=the"]
    texts = model("the ___ sleeps", n=3, seed=5, steps=4, ban=banned)
    assert texts == run_command(monkeypatch, capsys, f"-mdir={run_dir}", *flags)


def test_log_likelihoods_are_those_of_the_function_for_each_text_alone(mixing):
    model = sample.Sampler(*mixing)
    texts = ["the king sleeps", "anna sees the lamp"]
    log_p = model.log_likelihood(texts, calls=2)
    for text, value in zip(texts, log_p, strict=True):
        ids = torch.tensor([model.encode(text, "it")])
        given = ids == model.tokenizer.bos
        config = model.model.config
        assert value == pytest.approx(
            bfn.log_likelihood(model.model, ids, given, config.s1, config.K, 2).sum().item(),
            rel=1e-5,
        )
    with pytest.raises(
        ValueError, match="the text takes .* tokens, the model was trained on at most 32"
    ):
        model.log_likelihood(["the king " * 40])


def test_text_that_costs_nothing_in_a_log_likelihood_is_named(mixing, capsys):
    """BPE writes each byte, so it knows all."""
    model, text = sample.Sampler(*mixing), "the \u4e2d sleeps"
    model.log_likelihood([text], calls=2)
    is_named = "the tokenizer does not know '\u4e2d'" in capsys.readouterr().err
    assert is_named == bool(model.tokenizer.unknown_pieces(text))


def test_filling_keeps_given_tokens_and_draws_no_mark_before_the_end(mixing):
    model = sample.Sampler(*mixing)
    ids = torch.randint(
        3, model.model.config.K, (4, 12), generator=torch.Generator().manual_seed(0)
    )
    given = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    filled = model.fill(ids.tolist(), given.tolist(), seed=2, steps=4)
    marks = torch.tensor([model.tokenizer.bos, model.tokenizer.eos])
    assert (filled[given] == ids[given]).all()
    assert not torch.isin(filled[:, :-1][~given[:, :-1]], marks).any()
    assert (model.fill(ids, given, seed=2, steps=4) == filled).all() and (
        model.fill(ids, given, seed=3, steps=4) != filled
    ).any()


def test_a_guide_sees_texts_of_one_length_and_steers_them(mixing):
    model, wanted = sample.Sampler(*mixing), 7
    shapes = []

    def guide(z, t):
        shapes.append(z.shape)
        return z[..., wanted].sum(1)

    def share(texts):
        return np.mean([k == wanted for _, ids, _ in texts for k in ids])

    prompts = ["the king", "anna"] * 4
    plain, steered = (
        list(model.stream(prompts, steps=8)),
        list(model.stream(prompts, steps=8, guide=guide)),
    )
    assert share(steered) > share(plain) + 0.1
    assert len(set(shapes)) > 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler="bogus"), "sampler='bogus' is out of range"),
        (dict(steps=0), "steps=0"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (
            dict(top_p=2.0, scale=-1.0),
            "top_p=2.0 is out of range; scale=-1.0 is out of range",
        ),
        (dict(draft="the king", prompt="anna"), "a draft is the whole text"),
        (dict(label="x"), "was not trained with --labelled"),
    ],
)
def test_the_object_refuses_what_the_command_refuses(loaded, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample.Sampler(*loaded)(**options)


def test_the_object_takes_empty_lists_and_no_texts_in_place_of_lists(loaded):
    model = sample.Sampler(*loaded)
    assert (
        model("the king", n=0) == []
        and list(model.stream([])) == []
        and len(model.log_likelihood([])) == 0
    )
    for wrong in (
        lambda: model.log_likelihood("the king"),
        lambda: model.stream("the king"),
        lambda: model.log_likelihood(["a"], 0),
    ):
        with pytest.raises(ValueError, match="give a list"):
            wrong()
    for ids, given in (
        ([1, 2], [True, False]),
        ([[1, 2]], [[True]]),
        ([[1, 10**6]], [[True, True]]),
        ([[-7, 2]], [[True, True]]),
    ):
        with pytest.raises(ValueError, match="ids"):
            model.fill(ids, given)


def test_a_guide_chooses_lengths_that_its_label_has(mixing):
    model = sample.Sampler(*mixing)
    lengths = sorted({len(ids) for _, ids, _ in model.stream([""] * 40, steps=1, corrections=0)})

    def guide(z, t):
        return 0 * z.sum((1, 2)) - 30.0 * (z.shape[1] != lengths[0])

    assert len(lengths) > 1
    assert {
        len(ids) for _, ids, _ in model.stream([""] * 40, steps=1, corrections=0, guide=guide)
    } == {lengths[0]}


# ---------------------------------------------------------------- inputs that are none


@pytest.mark.parametrize(
    "options",
    [
        dict(n=-1),
        dict(ban="the"),
        dict(ban=[5]),
        dict(hint=[5]),
        dict(hint="3:the=0.5"),
        dict(draft=5),
        dict(argmax="no"),
        dict(seed=5.0),
        dict(seed="1"),
        dict(n="2"),
        dict(length=5.0),
    ],
    ids=str,
)
def test_a_wrong_input_from_python_is_a_value_error(loaded, options):
    sampler = sample.Sampler(*loaded)
    with pytest.raises(ValueError, match="n=-1|give texts|out of range|not a whole number"):
        sampler("", **options)


def test_fill_takes_the_types_of_the_token_cache_and_refuses_no_tokens(loaded):
    sampler = sample.Sampler(*loaded)
    ids, given = np.zeros((2, 4), np.uint16), np.zeros((2, 4), bool)
    filled = sampler.fill(ids, given, seed=np.int64(1), steps=2)
    assert filled.shape == (2, 4) and torch.equal(filled, sampler.fill(ids, given, 1, steps=2))
    with pytest.raises(ValueError, match="same shape"):
        sampler.fill(np.zeros((2, 0), int), np.zeros((2, 0), bool))


@pytest.mark.parametrize("flag", ["--prompt=a", "--num_samples=2", "--output=x.jsonl", "--seed=1"])
def test_proofreading_refuses_flags_of_sampling(run_dir, monkeypatch, capsys, flag):
    error = run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", "--check=a", flag)
    assert f"leave {flag.split('=')[0]} out" in error


@pytest.mark.parametrize(
    "flags",
    [
        ["--corrections=2", "--sampler=commit"],
        ["--temperature=0.5", "--argmax"],
        ["--top_p=0.5", "--argmax"],
    ],
)
def test_flags_that_do_nothing_beside_others_are_refused(run_dir, monkeypatch, capsys, flags):
    error = run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", *flags)
    assert f"{flags[0].split('=')[0]} does nothing with {flags[1]}: leave it out" in error


@pytest.mark.parametrize("flag, needed", [("--json", "--check"), ("--scale=2", "--classifier")])
def test_flags_that_would_do_nothing_are_refused(run_dir, monkeypatch, capsys, flag, needed):
    error = run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", flag)
    assert f"{flag.split('=')[0]} does nothing without {needed}" in error
