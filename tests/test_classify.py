"""Classifiers of noisy texts: training, files, and steering by them."""

import pytest
import torch
from untrained import make_run, run_command

import sample
from sampling import guidance
from text import toy
from tools import classify


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "word", "word", toy.corpus(300))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Labelled texts whose label is a name in them."""
    path = tmp_path_factory.mktemp("texts") / "names.tsv"
    lines = [line for line in toy.corpus(900).splitlines() if line.split()[0] in ("anna", "david")]
    path.write_text("".join(f"{line.split()[0]}\t{line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(run_dir, texts):
    sampler = sample.Sampler.load(run_dir, device="cpu")
    examples = classify.read_labelled(texts, sampler)
    train, held_out = classify.split(examples, 0)
    return sampler, classify.train(sampler, train, ["anna", "david"], 100, 0), held_out


def test_a_name_is_recognised_once_the_text_is_clear_and_not_before(trained):
    sampler, classifier, held_out = trained
    assert classify.accuracy(classifier, held_out, sampler, 1.0, 0) > 0.9
    assert classify.accuracy(classifier, held_out, sampler, 0.0, 0) < 0.8


def test_padding_does_not_change_a_label(trained):
    sampler, classifier, held_out = trained
    longest = max(held_out, key=lambda example: len(example[1]))
    shortest = min(held_out, key=lambda example: len(example[1]))
    with torch.no_grad():
        alone, _ = classify.read_noisy(classifier, [shortest], sampler, torch.ones_like)
        padded, _ = classify.read_noisy(
            classifier, [longest, shortest], sampler, torch.ones_like
        )
    torch.testing.assert_close(padded[1], alone[0], atol=1e-4, rtol=1e-4)


def test_the_classifier_finds_its_label_in_samples_that_it_steered(trained):
    sampler, classifier, _ = trained

    def share(label, scale):
        drawn = sampler.stream(
            [""] * 64, length=8, steps=8, guide=classifier.guide(label), scale=scale
        )
        samples = [(label, ids) for _, ids, _ in drawn]
        return classify.accuracy(classifier, samples, sampler, 1.0, 0)

    assert share("anna", 0.0) + share("david", 0.0) == 1
    assert share("anna", 4.0) + share("david", 4.0) > 1.2


def test_the_held_out_texts_are_a_tenth_of_each_label(trained, texts):
    sampler, _, held_out = trained
    examples = classify.read_labelled(texts, sampler)
    train, same = classify.split(examples, 0)
    assert sorted(map(str, train + same)) == sorted(map(str, examples)) and same == held_out
    for label in ("anna", "david"):
        n = sum(example[0] == label for example in examples)
        assert sum(example[0] == label for example in held_out) == round(0.1 * n)


def test_the_commands_write_a_classifier_and_sample_with_it(
    run_dir, texts, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "names.pt"
    flags = [f"-mdir={run_dir}", f"-d={texts}", f"--output={path}", "--steps=4", "--device=cpu"]
    lines, _, code = run_command(classify.main, monkeypatch, capsys, *flags)
    assert code == 0 and [line.split()[:3] for line in lines[2:8]] == [
        ["t", "=", f"{i / 5:.1f}"] for i in range(6)
    ]
    again, _, _ = run_command(classify.main, monkeypatch, capsys, *flags)  # replaces its own file
    assert again == lines
    flags = [
        f"-mdir={run_dir}",
        f"--classifier={path}",
        "--label=anna",
        "--num_samples=2",
        "--steps=3",
        "--device=cpu",
    ]
    steered, _, code = run_command(sample.main, monkeypatch, capsys, *flags)
    assert code == 0 and len(steered) == 2
    _, error, code = run_command(sample.main, monkeypatch, capsys, *flags[:2], "--label=emma")
    assert code == 2 and "the classifier knows no label 'emma', only anna, david" in error


def test_the_model_is_not_changed(run_dir, trained):
    sampler, _, _ = trained
    fresh = sample.Sampler.load(run_dir, device="cpu").model.state_dict()
    assert all(
        torch.equal(value, fresh[name]) for name, value in sampler.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("anna sleeps\n", "line 1 is not label<TAB>text"),
        ("a\tanna sleeps\n\na\t \n", "example 2 has a label and no text"),
        ("a\tanna sleeps\na\tthe king\n", "needs two or more labels"),
        ("", "needs two or more labels with at least two texts each, here: none"),
        (f"a\t{'the king ' * 40}\n", "example 1 takes 82 tokens"),
    ],
)
def test_texts_that_are_not_labelled_get_one_line(
    run_dir, tmp_path, monkeypatch, capsys, content, message
):
    (tmp_path / "texts.tsv").write_text(content)
    flags = [f"-mdir={run_dir}", f"-d={tmp_path / 'texts.tsv'}", f"--output={tmp_path / 'out.pt'}"]
    _, error, code = run_command(classify.main, monkeypatch, capsys, *flags)
    assert (
        code == 2
        and message in error
        and error.count("\n") == 1
        and not (tmp_path / "out.pt").exists()
    )


def test_a_classifier_that_is_damaged_missing_or_of_another_model_gets_one_line(
    run_dir, trained, tmp_path
):
    sampler, classifier, _ = trained
    path = tmp_path / "c.pt"
    with pytest.raises(ValueError, match="no classifier at"):
        guidance.load_classifier(path, sampler)
    guidance.save_classifier(path, classifier, "another tokenizer")
    with pytest.raises(ValueError, match="is of another model"):
        guidance.load_classifier(path, sampler)
    guidance.save_classifier(path, classifier, sampler.run["tokenizer_hash"])
    loaded = guidance.load_classifier(path, sampler)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), classifier.parameters(), strict=True)
    )
    for n in (0, 100, path.stat().st_size - 50):
        path.write_bytes(path.read_bytes()[:n])
        with pytest.raises(ValueError, match="is damaged, or no file of tools.classify"):
            guidance.load_classifier(path, sampler)
