"""The transformer's masks and parts, and the checkpoint file."""

import hashlib
import os

import pytest
import torch

import data
import model as model_file
from model import BFNTransformer, Config, load, read_checkpoint, save_checkpoint

CONFIG = Config(K=11, beta1=1.0, d_model=32, n_layers=2, n_heads=2)


@pytest.fixture
def model():
    """A network whose zero-initialised parts are random, so that every part matters."""
    torch.manual_seed(0)
    model = BFNTransformer(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_input(*lengths):
    theta = [torch.randn(1, n, CONFIG.K).softmax(-1) for n in lengths]
    return theta, [torch.rand(1, n) for n in lengths]


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6, 3), (1, 1, 1)])
def test_a_packed_row_equals_its_segments_alone(model, lengths):
    """With equal lengths too: a mask that compares lengths would let two equal segments see each other."""
    theta, t = random_input(*lengths)
    segment_ids = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
    packed = model(torch.cat(theta, 1), torch.cat(t, 1), segment_ids).split(lengths, 1)
    for x, times, n, together in zip(theta, t, lengths, packed, strict=True):
        alone = model(x, times, torch.ones(1, n, dtype=torch.long))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_convolution_is_torchs_within_a_segment():
    """And adds to what it reads."""
    torch.manual_seed(0)
    convolution, h = model_file.Convolution(6), torch.randn(2, 7, 6)
    torch.nn.init.normal_(convolution.weight)
    kernel = convolution.weight.T[:, None]  # (D, 1, offsets)
    expected = h + torch.nn.functional.conv1d(h.mT, kernel, padding=4, groups=6).mT
    torch.testing.assert_close(convolution(h, torch.ones(2, 7, dtype=torch.long)), expected)


def test_padding_changes_nothing(model):
    (theta, rest), (t, t_rest) = random_input(6, 4)
    alone = model(theta, t, torch.ones(1, 6, dtype=torch.long))
    padded = model(torch.cat([theta, rest], 1), torch.cat([t, t_rest], 1), torch.tensor([[1] * 6 + [0] * 4]))
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
    with pytest.raises(ValueError, match=r"100.*8"):
        Config(K=11, beta1=1.0, d_model=100, n_heads=8)


@pytest.fixture
def run_dir(tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij\n" * 3)
    (tmp_path / "tokenizer.model").write_bytes(data.train_tokenizer(text, "char", 0))
    checkpoint = dict(
        config=vars(CONFIG),
        tokenizer_hash=hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest(),
        emas=[model.state_dict()],
        model={},
        optimizers=[],
        step=3,
    )
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    return tmp_path


def test_load_gives_back_the_averaged_weights_and_the_tokenizer(run_dir, model):
    loaded, tokenizer, run = load(run_dir)
    assert tokenizer.decode(tokenizer.encode("badge")) == "badge" and run["step"] == 3 and loaded.config == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def same(a, b):
    return str(a) == str(b)


def test_a_damaged_missing_or_newer_checkpoint_is_refused(run_dir, monkeypatch):
    path = run_dir / "best.pt"
    whole, intact = path.read_bytes(), read_checkpoint(path)
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)
    for at in range(0, len(whole), len(whole) // 40):  # a flipped bit anywhere but in what zip files do not read
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            assert same(read_checkpoint(path), intact)
        except ValueError as error:
            assert "damaged" in str(error) or "format" in str(error)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        read_checkpoint(path)
    path.write_bytes(whole)
    monkeypatch.setattr(model_file, "FORMAT", 99)
    with pytest.raises(ValueError, match="this code reads 99"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match="no checkpoint at"):
        read_checkpoint(path)


def test_another_tokenizer_is_refused(run_dir):
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
