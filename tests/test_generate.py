"""From templates to ids: a text depends on its seed and number only, and keeps what is given."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bfn
import model as model_file
from bfn import Controls
from common.noise import Draws, mix_seed
from sampling import generate as generation
from sampling import prompts
from sampling.generate import Options, fit_lengths, generate, given_log_likelihood
from sampling.prompts import (
    FREE,
    GAP,
    Prompt,
    allowed_tokens,
    make_template,
)
from sampling.terminal import Trace

QUICK = Options(Controls(steps=3))


def sample_prompt(loaded, prompt, seed=0):
    """Sample one prompt -> its template, ids."""
    model, tokenizer, run = loaded
    template = make_template(prompt, tokenizer, run, seed)
    ((ids, _),) = generate(model, tokenizer, [template], seed, QUICK)
    return template, ids


def test_the_same_seed_gives_the_same_text_and_another_seed_a_different_one(loaded):
    assert sample_prompt(loaded, "", 1) == sample_prompt(loaded, "", 1)
    assert sample_prompt(loaded, "", 1)[1] != sample_prompt(loaded, "", 2)[1]


@pytest.mark.parametrize(
    "options",
    [
        Options(Controls(steps=3)),
        Options(Controls(steps=20, corrections=2)),
        Options(Controls(steps=20, corrections=2, until=0.5)),
        *(Options(Controls(name, steps=3)) for name in bfn.SAMPLERS if name != "commit"),
        Options(Controls("sde2", steps=10, until=0.2)),
    ],
    ids=lambda o: (
        f"{o.controls.sampler}-{o.controls.steps}-{o.controls.corrections}-{o.controls.until}"
    ),
)
def test_a_sample_does_not_change_with_its_neighbours(mixing, options):
    """Short texts next to a long one are padded and make fewer calls.

    With `until` they finish at other calls than it.
    """
    model, tokenizer, run = mixing
    templates = [
        make_template("", tokenizer, run, i, length) for i, length in enumerate([4, 30, 3, 17])
    ]
    together = generation.sample_batch(
        model, tokenizer, templates, seeds=[5, 6, 7, 8], options=options
    )
    for template, seed, text in zip(templates, [5, 6, 7, 8], together, strict=True):
        assert generation.sample_batch(model, tokenizer, [template], [seed], options) == [text]
    if options.controls.until:
        n_calls = [calls for _, calls in together]
        assert len(set(n_calls)) > 1 and min(n_calls) < options.controls.steps


def test_the_size_of_the_batches_does_not_change_a_sample(loaded, monkeypatch):
    model, tokenizer, run = loaded
    lengths = [20, 12, 16, 14, 12]
    templates = [
        make_template("the king", tokenizer, run, i, length) for i, length in enumerate(lengths)
    ]
    in_one_batch = list(generate(model, tokenizer, templates, 5, QUICK))
    assert [len(ids) for ids, _ in in_one_batch] == lengths
    monkeypatch.setattr(generation, "SORTED_BATCHES", 2)
    monkeypatch.setitem(model_file.BATCH_ELEMENTS, "cpu", 1)  # batches of one text
    assert list(generate(model, tokenizer, templates, 5, QUICK)) == in_one_batch


def test_the_number_of_a_text_decides_its_random_numbers(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, 0, 12)] * 3
    texts = list(generate(model, tokenizer, templates, 5, QUICK))
    assert texts[0] != texts[1] != texts[2]
    assert list(generate(model, tokenizer, templates[:2], 5, QUICK, numbers=[2, 0])) == [
        texts[2],
        texts[0],
    ]


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_the_evidence_of_a_draft_changes_no_other_draw(loaded, sampler):
    """A draft of strength 0 is no evidence: all that it could change are random numbers."""
    model, tokenizer, _ = loaded
    draft = tuple(tokenizer.encode("the old king sleeps"))
    templates = [[FREE] * len(draft)] * 3
    without = generate(model, tokenizer, templates, 0, Options(Controls(sampler, steps=4)))
    assert list(
        generate(model, tokenizer, templates, 0, Options(Controls(sampler, steps=4), draft=draft))
    ) == list(without)


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_no_random_numbers_are_used_twice(loaded, sampler, monkeypatch):
    model, tokenizer, _ = loaded
    used, real = [], Draws.at

    def at(self, phase, call):
        used.append((phase, call))
        return real(self, phase, call)

    monkeypatch.setattr(Draws, "at", at)
    draft = tuple(tokenizer.encode("the old king sleeps"))
    controls = Controls(sampler, steps=3, corrections=1, until=1e-9)
    options = Options(controls, draft=draft, strength=0.3)
    list(generate(model, tokenizer, [[FREE] * len(draft)], 0, options))
    assert (generation.DRAFT, 0) in used and len(used) == len(set(used)) >= 4


@pytest.mark.parametrize(
    "prompt",
    ["the king", "the ___ sleeps", "the ___{3} sleeps", "___ sleeps today", "the king ___", "___"],
)
def test_given_tokens_come_out_unchanged(loaded, prompt):
    template, ids = sample_prompt(loaded, prompt)
    assert len(ids) == len(template)
    assert all(token == given for token, given in zip(ids, template, strict=True) if given >= 0)


@pytest.mark.parametrize("seed", range(5))
def test_each_gap_is_filled_with_one_word(loaded, seed):
    _, tokenizer, _ = loaded
    _, ids = sample_prompt(loaded, "the ___ sleeps near ___ boat", seed)
    text = tokenizer.decode(ids)
    assert re.fullmatch(r"the \S+ sleeps near \S+ boat", text), text


def test_special_tokens_are_never_drawn(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, 30) for i in range(20)]
    special = {tokenizer.unk, tokenizer.bos}
    for ids, _ in generate(model, tokenizer, templates, 0, QUICK):
        assert not special & set(ids[1:] if tokenizer.bos >= 0 else ids)


@pytest.mark.parametrize("sampler", ["commit", "sde2"])
def test_a_strong_hint_decides_its_position(loaded, sampler):
    model, tokenizer, run = loaded
    template = make_template("", tokenizer, run, 0, 12)
    drawable = allowed_tokens(tokenizer)[-FREE].nonzero().flatten().tolist()
    for wanted in drawable[3:5]:
        hint = torch.full((len(tokenizer),), -30.0).index_fill(0, torch.tensor(wanted), 0.0)
        options = Options(Controls(sampler, steps=3), hints=((2, hint),))
        ((ids, _),) = generate(model, tokenizer, [template], 0, options)
        assert ids[2 + (tokenizer.bos >= 0)] == wanted


def test_a_banned_token_is_never_drawn_but_may_be_given(loaded):
    model, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 25)
    n_given = sum(kind >= 0 for kind in template)
    drawn = {
        k for ids, _ in generate(model, tokenizer, [template] * 20, 0, QUICK) for k in ids[n_given:]
    }
    banned = tuple(sorted(drawn)[:3])
    assert len(banned) == 3
    options = Options(Controls(steps=3, corrections=4), banned=(*banned, template[n_given - 1]))
    for ids, _ in generate(model, tokenizer, [template] * 20, 0, options):
        assert ids[:n_given] == template[:n_given] and not set(options.banned) & set(ids[n_given:])


def test_the_network_is_told_the_time_of_the_draft_but_not_of_a_strength_without_one(loaded):
    """The flag --strength has a default, so it is set without a draft too."""
    model, tokenizer, _ = loaded
    draft, times = tuple(tokenizer.encode("the old king sleeps")), set()
    for options, expected in (
        (Options(strength=0.4), 0.0),
        (Options(draft=draft, strength=0.4), 0.4),
    ):
        times.clear()
        hook = model.register_forward_pre_hook(
            lambda model, inputs: times.update(inputs[1].flatten().tolist())
        )
        list(generate(model, tokenizer, [[FREE] * len(draft)], 0, options))
        hook.remove()
        assert sorted(times) == pytest.approx(
            [expected, 1.0]
        )  # 1: tokens that are given to the next call


def test_each_block_of_a_long_text_begins_with_the_end_of_the_text_so_far(loaded, monkeypatch):
    model, tokenizer, run = loaded
    template = make_template("the king", tokenizer, run, 0, 60)
    monkeypatch.setattr(tokenizer, "eos", -1)
    blocks, real = [], generation.sample_batch

    def record(model, tokenizer, templates, *rest):
        blocks.extend(templates)
        return real(model, tokenizer, templates, *rest)

    monkeypatch.setattr(generation, "sample_batch", record)
    ((ids, calls),) = generation.write_blocks(model, tokenizer, [template], [0], QUICK, 16)
    n_written = sum(k >= 0 for k in template)
    assert len(ids) == 60 and ids[:n_written] == template[:n_written]
    for block in blocks:
        given = [k for k in block if k >= 0]
        assert given == ids[max(0, n_written - 8) : n_written] and len(block) <= 16
        n_written += block.count(FREE)
    assert n_written == 60
    assert calls == sum(min(QUICK.controls.steps, block.count(FREE)) for block in blocks)


def test_a_long_text_changes_none_of_the_short_ones(loaded):
    model, tokenizer, run = loaded
    templates = [
        make_template("the king", tokenizer, run, i, n) for i, n in enumerate((10, 40, 12))
    ]
    mixed = list(generate(model, tokenizer, templates, 3, QUICK, limit=16))
    assert mixed[::2] == list(generate(model, tokenizer, templates[::2], 3, QUICK, numbers=[0, 2]))
    inputs = templates[1:2], [mix_seed(3, 1)], QUICK, 16
    assert mixed[1:2] == generation.write_blocks(model, tokenizer, *inputs)


def test_tracing_shows_only_the_first_text_and_changes_none(loaded, capsys):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate((14, 9, 20))]
    traced = list(generate(model, tokenizer, templates, 0, replace(QUICK, trace=Trace(tokenizer))))
    shown = capsys.readouterr().err.splitlines()
    assert traced == list(generate(model, tokenizer, templates, 0, QUICK))
    assert [line.split("  ")[0] for line in shown] == ["call 1", "call 2", "call 3", "sample"]


# ---------------------------------------------------------------- lengths that fit a prompt

K, L = 4, 5
SHARES = torch.tensor([0.0, 0.0, 0.4, 0.3, 0.2, 0.1])  # of texts with 0, 1, ..., L tokens


def random_language(seed=0):
    """P(text | length) for each length, as tensors (K, K, ..., K)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (2.0 * torch.randn([K] * n, generator=generator)).flatten().softmax(0).view([K] * n)
        for n in range(2, L + 1)
    }


LANGUAGE = random_language()


class ExactNetwork(torch.nn.Module):
    """Answers with the exact conditional of each position, given the one-hot ones."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(K=K, d_model=1, s1=3.0)
        self.n_rows = 0
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, theta, t, segment_ids):
        logits = torch.zeros(theta.shape)
        self.n_rows += len(theta)
        for row, n in enumerate(segment_ids.sum(1).tolist()):
            joint = LANGUAGE[n].clone()
            for d in range(n):
                shape = [1] * n
                shape[d] = K
                joint = joint * theta[row, d].view(shape)
            for d in range(n):
                others = [i for i in range(n) if i != d]
                logits[row, d] = joint.sum(others).clamp(min=1e-30).log()
        return logits


class Letters:
    """A tokenizer of the letters a to d, without bos and eos."""

    def __init__(self):
        self.bos = self.eos = -1
        self.labels = {}
        self.adds_prefix, self.joins_space, self.continues_words = False, False, True

    def encode(self, text):
        return ["abcd".index(c) for c in text]

    def unknown_pieces(self, text):
        return []

    def add_marks(self, ids, **which):
        return ids


def templates_of(given):
    return [given + [FREE] * (n - len(given)) for n in range(max(2, len(given) + 1), L + 1)]


def probability_of_beginning(given, n):
    """P(a text of length n begins so)."""
    return LANGUAGE[n][tuple(given)].sum().item()


@pytest.mark.parametrize("given", [[0], [2, 1], [3, 3, 0]])
def test_the_likelihood_of_given_tokens_is_exact_for_the_exact_network(given):
    found = given_log_likelihood(ExactNetwork(), Letters(), templates_of(given)).exp().tolist()
    assert found == pytest.approx(
        [probability_of_beginning(given, len(t)) for t in templates_of(given)], rel=1e-4
    )


def test_given_tokens_between_gaps_count_wherever_they_stand():
    templates = [[GAP, 1, GAP, 2], [GAP, GAP, 1, GAP, 2]]
    exact = [LANGUAGE[4][:, 1, :, 2].sum().item(), LANGUAGE[5][:, :, 1, :, 2].sum().item()]
    assert given_log_likelihood(
        ExactNetwork(), Letters(), templates
    ).exp().tolist() == pytest.approx(exact, rel=1e-4)


def test_lengths_given_a_prompt_follow_the_exact_conditional():
    given = [2, 1]
    templates = templates_of(given)
    weights = [SHARES[len(t)].item() for t in templates]
    fitted = fit_lengths(ExactNetwork(), Letters(), Prompt(templates, weights)).weights
    exact = np.array(
        [
            w * probability_of_beginning(given, len(t))
            for t, w in zip(templates, weights, strict=True)
        ]
    )
    np.testing.assert_allclose(np.array(fitted) / sum(fitted), exact / exact.sum(), rtol=1e-4)
    assert (
        abs(np.array(weights) / sum(weights) - exact / exact.sum()).max() > 0.05
    )  # the prompt tells something


def test_without_given_tokens_or_with_one_candidate_nothing_is_computed():
    network = ExactNetwork()
    for templates in ([[FREE] * 2, [FREE] * 3], [[1, FREE]]):
        prompt = Prompt(templates, [1.0] * len(templates))
        assert fit_lengths(network, Letters(), prompt) == prompt
    assert network.n_rows == 0


def test_long_prompts_and_many_lengths_take_a_bounded_number_of_calls(monkeypatch):
    """Several tokens a call, and only some lengths; log P of the others is interpolated."""
    monkeypatch.setattr(generation, "MAX_CALLS", 2)
    monkeypatch.setattr(generation, "MAX_CANDIDATES", 2)
    network, templates = ExactNetwork(), templates_of([0])
    prompt = Prompt(templates, [1.0] * len(templates))
    fitted = fit_lengths(network, Letters(), prompt).weights
    assert network.n_rows <= 2 * 2 and len(fitted) == len(templates) == 4
    log_w = np.log(fitted)
    np.testing.assert_allclose(log_w[1:3], np.interp([1, 2], [0, 3], log_w[[0, 3]]), atol=1e-9)


def test_the_same_prompt_has_the_same_likelihood_next_to_longer_templates():
    alone = given_log_likelihood(ExactNetwork(), Letters(), [[1, 2, FREE]])
    together = given_log_likelihood(ExactNetwork(), Letters(), [[0, 1, 2, 3, FREE], [1, 2, FREE]])
    torch.testing.assert_close(alone[0], together[1])


def test_a_gap_with_a_range_has_a_template_for_each_size_and_the_lightest_are_left_out(monkeypatch):
    run = dict(args=dict(sequence_length=9), lengths=[0, 0, 0, 5, 0, 2, 1], word_lengths=[0, 1])
    prompt = prompts.Prompt.read("a___{1-4}b", Letters(), run)
    # No text has 4 tokens.
    assert prompt.templates == [[0, GAP, 1], [0, GAP, GAP, GAP, 1], [0, *[GAP] * 4, 1]]
    assert prompt.weights == [5, 2, 1]
    monkeypatch.setattr(prompts, "MAX_CANDIDATES", 3)
    assert len(prompts.parse_prompt("___{1-9}___{1-9}", Letters(), [0, 1])[0]) == 3
