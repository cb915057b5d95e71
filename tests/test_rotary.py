"""Positions in fewer passes: the model's own numbers, and only where its function is the usual one."""

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from transformers import CohereConfig, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from reward.batch import Batch
from reward.passes import run, trunk
from reward.paths import choose, describe
from reward.rotary import _Rotation, rotating
from tests.test_last_layer import EXAMPLES, SIZES, built
from tests.test_padding_free import SMALL

CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "phi3, half of each head": Phi3Config(**SIZES, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }),
}  # fmt: skip


def states_and_gradient(model):
    model.zero_grad()
    states = run(trunk(model), Batch.of(EXAMPLES, 0)).last_hidden_state
    states.square().mean().backward()
    return states.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_has_the_models_own_numbers(name):
    model = built(CONFIGS[name])
    plain = states_and_gradient(model)
    with rotating(trunk(model)):
        ours = states_and_gradient(model)
    torch.testing.assert_close(ours[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (ours[1] - plain[1]).norm() / plain[1].norm() < 1e-5
    path = choose(model, EXAMPLES)
    assert path.rotary and "; positions act in fewer passes (differs by " in describe(path)


def test_the_function_itself_to_the_last_digits():
    torch.manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    found = []
    for turn in (modeling_llama.apply_rotary_pos_emb, _Rotation(modeling_llama.apply_rotary_pos_emb)):
        turned = turn(q, k, cos, sin)
        found.append([*turned, *torch.autograd.grad(sum(x.square().sum() for x in turned), (q, k))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-6)


def test_halves_that_take_turns_are_found_out():
    """Cohere pairs neighbours, under the same name."""
    path = choose(built(CohereConfig(**SIZES)), EXAMPLES)
    assert not path.rotary and path.why[4].startswith("differs by")


def test_no_such_function():
    path = choose(built(GPT2Config(**SMALL)), EXAMPLES)
    assert not path.rotary and path.why[4] == "refused: not by the usual function on a CPU"


def test_it_is_not_taken_untried():
    """Where activations are checkpointed a pass is the plain one, so comparing it would show nothing."""
    model = built(CohereConfig(**SIZES))
    model.activation_checkpointing_enable()
    path = choose(model, EXAMPLES)
    assert not path.rotary and path.why[4] == "refused: backward runs layers again"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_models_function_is_back_after_a_pass_that_fails(checkpointed):
    model, own = built(CONFIGS["llama"]), modeling_llama.apply_rotary_pos_emb
    if checkpointed:
        model.activation_checkpointing_enable()
    with pytest.raises(ZeroDivisionError), rotating(trunk(model)):
        assert (modeling_llama.apply_rotary_pos_emb is own) == checkpointed
        _ = 1 / 0
    assert modeling_llama.apply_rotary_pos_emb is own
