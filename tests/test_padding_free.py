"""Rows one behind the other: the numbers of padded rows, and only where a model gives them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from reward.batch import Batch, Example, micro_batches
from reward.padding_free import Layout, Places
from reward.passes import run, trunk
from reward.paths import choose, describe
from reward.tokens import Path, batch_of, forward, grouped, rewards
from tests.test_last_layer import EXAMPLES, SIZES, built

SMALL = {
    name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "intermediate_size")
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(**SMALL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def passed(model, batch):
    """(log-probabilities, gradient of all weights) of one pass."""
    model.zero_grad()
    logps, _ = forward(model, batch)
    logps.square().sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
    assert (ours[1] - theirs[1]).norm() / theirs[1].norm() < 1e-5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layers", ["", "layers"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_gradients_are_those_of_padded_rows(name, head, layers, shared):
    model = built(CONFIGS[name])
    padded = passed(model, Batch.of(EXAMPLES, 0, "cpu", shared))
    model.path = Path(head=head, layers="" if name == "gpt2" else layers)
    batch = Batch.of(EXAMPLES, 0, "cpu", shared, padding_free=True)
    assert batch.input_ids.shape == (1, sum(n for e in EXAMPLES for n in e.row_lengths(shared)))
    assert_same(passed(model, batch), padded)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_found_out_and_used(name):
    model = built(CONFIGS[name])
    padded = passed(model, batch_of(model, EXAMPLES))
    path = choose(model, EXAMPLES)
    assert path.padding_free and ", without padding (" in describe(path)
    assert batch_of(model, EXAMPLES).layout is not None
    assert_same(passed(model, batch_of(model, EXAMPLES)), padded)


def test_one_example_is_enough_to_find_out():
    """A model that carries a state from row to row gives the right numbers for one row alone."""
    model = built(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, pad_token_id=0))
    assert not choose(model, [Example([5, 6, 7], ([8, 9, 1],))]).padding_free


def test_a_model_that_knows_no_layout_stays_padded():
    model = built(CONFIGS["llama"])

    def drop(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "layout"}

    model.model.layers[0].self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    path = choose(model, EXAMPLES)
    assert not path.padding_free and "padded (refused: " in describe(path)
    assert batch_of(model, EXAMPLES).layout is None


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=4096),
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4096),
    ],
)
def test_a_window_is_refused_however_short_the_rows(config):
    """Rows that come later, PPO's replies say, may be longer than it."""
    assert "padded (refused: a sliding window)" in describe(choose(built(config), EXAMPLES))


def test_other_attention_stays_padded():
    model = built(LlamaConfig(**SIZES))
    model.set_attn_implementation("eager")
    assert "padded (refused: attention is eager, not sdpa)" in describe(choose(model, EXAMPLES))


def test_layers_that_run_again_in_backward_get_padded_rows():
    model = built(CONFIGS["llama"]).train()
    padded = passed(model, batch_of(model, EXAMPLES))
    assert choose(model, EXAMPLES).padding_free
    model.activation_checkpointing_enable()
    assert batch_of(model, EXAMPLES).layout is None
    assert_same(passed(model, batch_of(model, EXAMPLES)), padded)


def test_adapters_act():
    model = get_peft_model(built(CONFIGS["llama"]), LoraConfig(target_modules="all-linear", r=2))
    padded = passed(model, batch_of(model, EXAMPLES))
    assert choose(model, EXAMPLES).padding_free
    assert_same(passed(model, batch_of(model, EXAMPLES)), padded)


@pytest.mark.parametrize("reads", ["reply", "last"])
def test_rewards_are_those_of_padded_rows(reads):
    model = built(LlamaConfig(**SIZES, num_labels=1), AutoModelForSequenceClassification)
    model.config.reward_reads = reads
    examples = [*EXAMPLES, Example([5, 6], ([], [7, 8, 1]))]
    padded = rewards(model, examples)
    assert choose(model, EXAMPLES).padding_free
    assert rewards(model, examples) == [pytest.approx(row, abs=1e-5) for row in padded]


def test_rows_of_one_length_need_no_copy():
    model = built(CONFIGS["llama"])
    even = [Example([5, 6, 7], ([8, 9, 1],)), Example([15, 6, 7], ([8, 19, 1],))]
    batches = [Batch.of(even, 0, padding_free=free) for free in (False, True)]
    assert_same(*(passed(model, batch) for batch in reversed(batches)))
    keys = batches[1].layout.keys
    states = torch.randn(1, 12, 2, 4)
    assert keys.pad(states.transpose(1, 2)).data_ptr() == states.data_ptr()


def test_a_pass_that_fails_leaves_the_attention_as_it_was():
    model = built(CONFIGS["llama"])

    def fail(*_):
        raise ValueError("mine")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mine"):
        run(trunk(model), Batch.of(EXAMPLES, 0, padding_free=True))
    hook.remove()
    assert model.config._attn_implementation == "sdpa"


def test_places_are_rows_and_back():
    places = Places.of_rows([2, 3, 1])
    assert places.shape == (3, 3) and places.places.tolist() == [0, 1, 3, 4, 5, 6]
    states = torch.arange(6.0).view(1, 1, 6, 1).requires_grad_()
    rows = places.pad(states)
    assert rows.flatten().tolist() == [0, 1, 0, 2, 3, 4, 5, 0, 0]
    back = places.unpad(rows.transpose(1, 2))
    assert back.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    (back.flatten() * torch.arange(1.0, 7.0)).sum().backward()
    assert states.grad.flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_keys_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="attention to 8 tokens, where rows have 6"):
        Places.of_rows([2, 3, 1]).pad(torch.zeros(1, 2, 8, 4))


def test_what_is_read_alone_sees_what_it_saw():
    places = Places.of_rows([3, 1, 2])
    layout = Layout(places, places).read_at(torch.tensor([1, 2, 5]))
    assert layout.queries.shape == (3, 2) and layout.queries.places.tolist() == [0, 1, 4]
    assert layout.mask[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert layout.mask[2, 0, 0].int().tolist() == [1, 1, 0]


def test_states_are_split_into_rows_and_joined_again():
    for free in (False, True):
        batch = Batch.of(EXAMPLES, 0, padding_free=free)
        states = torch.randn(*batch.input_ids.shape, 4) * (batch.segments > 0)[..., None]
        rows = batch.split(states)
        assert [len(row) for row in rows] == batch.lengths
        assert torch.equal(batch.join(rows), states)


def test_micro_batches_without_padding_are_measured_in_tokens():
    examples = [Example([5] * (i % 29 + 1), ([6] * (i % 5 + 1),)) for i in range(40)]
    groups = list(micro_batches(examples, 100, padding_free=True))
    assert sorted(i for group in groups for i in group) == list(range(40))
    sizes = [sum(examples[i].row_lengths(False)[0] for i in group) for group in groups]
    assert max(sizes) <= 100 and len(groups) < len(list(micro_batches(examples, 100)))


def test_a_long_row_is_not_joined_by_many_short_ones():
    """Each would be padded to it in attention, whose cost grows with the square of the length."""
    examples = [Example([5], ([6] * 8,)) for _ in range(40)] + [Example([5], ([6] * 600,))]
    model = built(CONFIGS["llama"])
    choose(model, examples)
    assert [len(group) for group in grouped(model, examples)] == [40, 1]


def test_half_precision_is_as_near_as_padded_rows_are():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.bfloat16).eval()
    assert choose(model, EXAMPLES).padding_free
    free, _ = forward(model, batch_of(model, EXAMPLES))
    padded, _ = forward(model, Batch.of(EXAMPLES, 0))
    torch.testing.assert_close(free, padded, atol=0.1, rtol=0.05)
