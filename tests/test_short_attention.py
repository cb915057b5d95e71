"""Attention of short rows by whole products: PyTorch's numbers, where training reads no more than a mask."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from reward import short_attention
from reward.batch import Batch, Example
from reward.paths import choose
from reward.short_attention import LONGEST, attention, fits
from reward.tokens import forward
from tests.test_last_layer import EXAMPLES, SIZES, built
from tests.test_padding_free import assert_same, passed


def states(length, heads, width=8, rows=3):
    return torch.randn(rows, length, heads, width).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("of_keys", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(9, 9), (2, 9)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_values_and_gradients_are_those_of_pytorch(of_keys, lengths, scale):
    torch.manual_seed(0)
    q, k, v = states(lengths[0], 4), states(lengths[1], of_keys), states(lengths[1], of_keys, width=6)
    seen = torch.rand(3, 1, *lengths) < 0.6
    seen[..., 0] = True
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    ours = attention(q, k, v, bias, scale)
    torch.testing.assert_close(ours, plain.transpose(1, 2), atol=1e-6, rtol=1e-5)
    grad = torch.randn(ours.shape)
    found = torch.autograd.grad(ours, (q, k, v), grad)
    for mine, theirs in zip(found, torch.autograd.grad(plain, (q, k, v), grad.transpose(1, 2)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_what_it_gives_lies_in_memory_as_pytorchs():
    """Some models take views of it (JetMoE), of a single row without a copy."""
    q, k = states(5, 4, rows=1), states(5, 2, rows=1)
    assert attention(q, k, k, torch.zeros(1, 1, 5, 5), None).is_contiguous()


def test_attention_in_both_directions_is_left_to_pytorch(monkeypatch):
    model = built(LlamaConfig(**SIZES))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    one = [Example([5, 6, 7], ([8, 9, 1],))] * 3  # of one length: no mask
    plain = passed(model, Batch.of(one, 0, padding_free=True))
    monkeypatch.setattr(short_attention, "fits", lambda *_: False)
    assert_same(passed(model, Batch.of(one, 0, padding_free=True)), plain)


def test_only_short_rows_in_training_with_a_mask_alone():
    q, k = states(5, 2), states(LONGEST, 2)
    assert fits(q, k, {"scaling": 0.1, "dropout": 0.0, "position_bias": None})
    assert not fits(q, states(LONGEST + 1, 2), {})
    assert not fits(q.detach(), k, {}) and not fits(q.bfloat16(), k.bfloat16(), {})
    for asked in ({"dropout": 0.1}, {"is_causal": False}, {"position_bias": q}, {"softcap": 30.0}):
        assert not fits(q, k, asked)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(q, k, {})


@pytest.mark.parametrize("several", [True, False])
def test_training_takes_it_and_gets_the_gradient_of_padded_rows(several, monkeypatch):
    model = built(LlamaConfig(**SIZES))
    examples = EXAMPLES if several else [Example(e.prompt, e.completions[:1]) for e in EXAMPLES]
    padded = passed(model, Batch.of(examples, 0))
    path, taken = choose(model, examples), []
    assert path.padding_free and path.shares == several
    monkeypatch.setattr(short_attention, "attention", lambda *given: taken.append(1) or attention(*given))
    ours = Batch.of(examples, 0, shared=several, padding_free=True)
    assert_same(passed(model, ours), padded)
    assert len(taken) == model.config.num_hidden_layers
    with torch.no_grad():
        forward(model, ours)
    assert len(taken) == model.config.num_hidden_layers
