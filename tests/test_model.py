"""The transformer: its masks and its parts."""

import pytest
import torch
from untrained import random_network

import model as model_file
from model import BFNTransformer, Config

CONFIG = Config(K=11, beta1=1.0, d_model=32, n_layers=2, n_heads=2)


@pytest.fixture
def model():
    return random_network(CONFIG)


def random_input(*lengths):
    theta = [torch.randn(1, n, CONFIG.K).softmax(-1) for n in lengths]
    return theta, [torch.rand(1, n) for n in lengths]


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6, 3), (1, 1, 1)])
def test_a_packed_row_equals_its_segments_alone(model, lengths):
    """With equal lengths too: a mask that compares lengths would let them see each other."""
    theta, t = random_input(*lengths)
    segment_ids = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
    packed = model(torch.cat(theta, 1), torch.cat(t, 1), segment_ids).split(lengths, 1)
    for x, times, n, together in zip(theta, t, lengths, packed, strict=True):
        alone = model(x, times, torch.ones(1, n, dtype=torch.long))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_attention_written_out_in_bfloat16_equals_the_fused_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 24, 8)
    segment_ids = torch.tensor([[1] * 10 + [2] * 9 + [0] * 5, [1] * 24])
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    exact = model_file.attend(q, k, v, mask)
    written_out = model_file.attend(*(x.bfloat16() for x in (q, k, v)), mask)
    assert written_out.dtype == torch.bfloat16
    torch.testing.assert_close(written_out.float(), exact, atol=0.05, rtol=0.05)
    changed = v.clone()
    changed[0, :, 10:] = 9.0  # what the first segment cannot see
    assert torch.equal(
        model_file.attend(*(x.bfloat16() for x in (q, k, changed)), mask)[0, :, :10],
        written_out[0, :, :10],
    )


def test_without_segment_ids_each_row_is_one_segment_and_only_padding_is_refused(model):
    theta, t = random_input(4)
    one = torch.ones(1, 4, dtype=torch.long)
    assert torch.equal(model(*theta, *t), model(*theta, *t, one))
    with pytest.raises(ValueError, match="segment_ids is 0 everywhere"):
        model(*theta, *t, 0 * one)


def test_the_convolution_adds_what_torchs_gives_within_a_segment():
    torch.manual_seed(0)
    convolution, h = model_file.Convolution(6), torch.randn(2, 7, 6)
    torch.nn.init.normal_(convolution.weight)
    kernel = convolution.weight.T[:, None]  # (D, 1, offsets)
    expected = h + torch.nn.functional.conv1d(h.mT, kernel, padding=4, groups=6).mT
    torch.testing.assert_close(convolution(h, torch.ones(2, 7, dtype=torch.long)), expected)


def test_padding_changes_nothing(model):
    (theta, rest), (t, t_rest) = random_input(6, 4)
    alone = model(theta, t, torch.ones(1, 6, dtype=torch.long))
    padded = model(
        torch.cat([theta, rest], 1), torch.cat([t, t_rest], 1), torch.tensor([[1] * 6 + [0] * 4])
    )
    torch.testing.assert_close(padded[:, :6], alone, atol=1e-5, rtol=1e-4)
    assert padded.isfinite().all()


def test_position_and_time_matter(model):
    theta = torch.randn(1, 1, CONFIG.K).softmax(-1).expand(1, 4, CONFIG.K).clone()
    theta[:, 0] = theta[:, 0].roll(1, -1)
    ones = torch.ones(1, 4, dtype=torch.long)
    logits = model(theta, torch.full((1, 4), 0.3), ones)
    assert not torch.allclose(logits[:, 1], logits[:, 3], atol=1e-3)
    assert not torch.allclose(logits, model(theta, torch.full((1, 4), 0.8), ones), atol=1e-3)


def test_the_embedding_of_a_one_hot_is_the_tokens_own(model):
    ids = torch.tensor([[3, 7]])
    theta = torch.nn.functional.one_hot(ids, CONFIG.K).float()
    torch.testing.assert_close(model.embed(theta), model.project(model.embedding(ids)))


def test_the_three_parts_make_the_forward_pass(model):
    (theta,), (t,) = random_input(5)
    segment_ids = torch.tensor([[1, 1, 2, 2, 0]])
    parts = model.head(model.body(model.embed(theta), t, segment_ids), theta)
    assert torch.equal(parts, model(theta, t, segment_ids))


def test_a_new_network_predicts_what_the_evidence_says():
    torch.manual_seed(0)
    (theta,), (t,) = random_input(5)
    logits = BFNTransformer(CONFIG)(theta, t, torch.ones(1, 5, dtype=torch.long))
    torch.testing.assert_close(logits.softmax(-1), theta)


def test_a_width_that_heads_do_not_divide_is_refused():
    for width in (100, 16, 24):
        with pytest.raises(ValueError, match=rf"{width}.*8"):
            Config(K=11, beta1=1.0, d_model=width, n_heads=8)


def test_what_a_position_sees_ends_with_its_segment_in_every_part(model):
    """Changing one segment changes no output of the others, whatever the time."""
    (theta,), (t,) = random_input(9)
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]])
    before = model(theta, t, segment_ids)
    changed_theta, changed_t = theta.clone(), t.clone()
    changed_theta[:, 3:6], changed_t[:, 3:6] = theta[:, 3:6].roll(1, -1), 1 - t[:, 3:6]
    after = model(changed_theta, changed_t, segment_ids)
    others = [0, 1, 2, 6, 7, 8]
    torch.testing.assert_close(after[:, others], before[:, others])
    assert not torch.allclose(after[:, 3:6], before[:, 3:6], atol=1e-3)
