"""The last layer where it is read alone: the whole layer's numbers, and only where a model allows it."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    Qwen3Config,
)

from reward.batch import Batch, Example
from reward.last_layer import layers_of, reading
from reward.passes import run, trunk
from reward.paths import choose, describe
from reward.prefix import Prefix
from reward.tokens import forward, rewards

EXAMPLES = [
    Example([5, 6, 7, 8, 9], ([10, 11, 1], [12, 13, 14, 15, 16, 17, 1])),
    Example([20], ([21, 1], [22, 23, 1])),
    Example(list(range(30, 60)), ([60, 61, 62, 1], [1])),
]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.5),  # which clips queries in place
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return built(CONFIGS[request.param])


def built(config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(config)


def passed(model, examples=EXAMPLES, shared=False):
    """(log-probabilities, gradient of all weights, shape of the last layer's states) of one pass."""
    shapes = []
    hook = layers_of(trunk(model))[1][-1].register_forward_hook(lambda *of: shapes.append(of[2].shape[:2]))
    model.zero_grad()
    logps, _ = forward(model, Batch.of(examples, 0, shared=shared))
    logps.square().sum().backward()
    hook.remove()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logps.detach(), gradient, tuple(shapes[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_numbers_and_gradients_are_those_of_the_whole_layer(model, attention):
    model.set_attn_implementation(attention)
    whole, of_whole, _ = passed(model)
    path = choose(model, EXAMPLES)
    assert path.layers == "layers" and "works where it is read alone" in describe(path)
    alone, of_alone, shape = passed(model)
    assert shape == (6, 7)  # of 34 positions the most that a row is read at
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert (of_alone - of_whole).norm() / of_whole.norm() < 1e-5


def test_rows_may_be_shared_at_the_same_time():
    model = built(CONFIGS["llama"])
    whole, of_whole, _ = passed(model, shared=True)
    assert choose(model, EXAMPLES).shares
    alone, of_alone, shape = passed(model, shared=True)
    assert shape == (3, 10)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert (of_alone - of_whole).norm() / of_whole.norm() < 1e-5


@pytest.mark.parametrize("reads", ["reply", "last"])
def test_rewards_are_those_of_the_whole_layer(reads):
    model = built(LlamaConfig(**SIZES, num_labels=1), AutoModelForSequenceClassification)
    model.config.reward_reads = reads
    examples = [*EXAMPLES, Example([5, 6], ([], [7, 8, 1]))]
    whole = rewards(model, examples)
    choose(model, EXAMPLES)
    assert model.path.layers
    assert rewards(model, examples) == [pytest.approx(row, abs=1e-5) for row in whole]
    assert whole[3][0] == 0.0  # an empty completion has no token to read


def test_adapters_act_in_the_last_layer():
    model = get_peft_model(built(CONFIGS["llama"]), LoraConfig(target_modules="all-linear", r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    whole, of_whole, _ = passed(model)
    assert choose(model, EXAMPLES).layers
    alone, of_alone, shape = passed(model)
    assert shape == (6, 7)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert (of_alone - of_whole).norm() / of_whole.norm() < 1e-5


def test_states_of_frozen_layers_enter_it():
    model = built(CONFIGS["llama"])
    batch = Batch.of(EXAMPLES, 0)
    whole, _ = forward(model, batch)
    choose(model, EXAMPLES)
    prefix = Prefix(model, "last:1")
    with prefix.given(prefix.states(batch)), prefix.reference():
        torch.testing.assert_close(forward(model, batch)[0], whole, atol=1e-5, rtol=0)


def test_a_layer_that_is_read_almost_everywhere_works_everywhere():
    model = built(CONFIGS["llama"])
    choose(model, EXAMPLES)
    *_, shape = passed(model, EXAMPLES[1:2])
    assert shape == (2, 3)


def test_a_layer_that_runs_again_in_backward_works_everywhere():
    model = built(CONFIGS["llama"]).train()
    whole, of_whole, _ = passed(model)
    choose(model, EXAMPLES)
    model.activation_checkpointing_enable()
    again, of_again, shape = passed(model)
    assert shape == (6, 34)
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)
    assert (of_again - of_whole).norm() / of_whole.norm() < 1e-5


def test_nothing_is_left_behind_by_a_pass_that_fails():
    model = built(CONFIGS["llama"])
    batch = Batch.of(EXAMPLES, 0)
    with pytest.raises(ValueError, match="mine"), reading(trunk(model), "layers", batch.reads):
        raise ValueError("mine")
    assert run(trunk(model), batch).last_hidden_state.shape[:2] == batch.input_ids.shape


def test_a_model_without_such_a_layer_is_left_whole():
    model = built(BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0))
    assert choose(model, EXAMPLES).layers == ""
    assert "the last layer works everywhere (refused: " in describe(model.path)
    nothing = nn.Module()
    nothing.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    assert layers_of(nothing) is None


def test_the_pass_for_keys_makes_no_queries():
    model, batch, seen = built(CONFIGS["llama"]), Batch.of(EXAMPLES, 0, shared=True), []
    queries = trunk(model).layers[-1].self_attn.q_proj
    queries.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    with reading(trunk(model), "layers", batch.reads & ~batch.reads.roll(1, dims=1)):
        run(trunk(model), batch)
    assert seen == [1, 2]  # one for the keys; then those that are read, of two completions
    run(trunk(model), batch)
    assert seen[2:] == [batch.input_ids.shape[1]]
