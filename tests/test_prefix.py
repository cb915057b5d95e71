"""The frozen prefix: the numbers and gradients of a plain pass, without running what does not train."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Zamba2Config,
)

from annotate.records import DataError
from reward.batch import Batch, Example, micro_batches
from reward.prefix import Prefix
from reward.tokens import forward

SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": (LlamaConfig, SIZES),
    "qwen2": (Qwen2Config, SIZES),
    "qwen3": (Qwen3Config, SIZES | {"head_dim": 8}),
    "gpt2": (GPT2Config, GPT2),
    "gemma": (GemmaConfig, SIZES | {"head_dim": 8}),
    "mistral": (MistralConfig, SIZES | {"sliding_window": None}),
    "phi": (PhiConfig, SIZES),
}
OTHERS = {  # windows in some layers or in all, several kinds of positions, experts
    "gemma2": (Gemma2Config, SIZES | {"head_dim": 8, "sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, SIZES | {"head_dim": 8, "sliding_window": 8}),
    "mistral": (MistralConfig, SIZES | {"sliding_window": 8}),
    "mixtral": (MixtralConfig, SIZES | {"num_local_experts": 4}),
    "qwen2": (Qwen2Config, SIZES | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
}
KINDS = ["sliding_attention", "full_attention"] * 2
REFUSED = {
    "layers return more than states": (
        BloomConfig,
        {"vocab_size": 96, "hidden_size": 16, "n_layer": 4, "n_head": 2},
    ),
    "upper layers read keys of lower ones": (
        Gemma4TextConfig,
        SIZES | {"head_dim": 8, "num_kv_shared_layers": 2, "layer_types": KINDS},
    ),
}
EXAMPLES = [
    Example([5, 6, 7, 8, 9], ([10, 11, 1], [12, 13, 14, 15, 16, 17, 1])),
    Example([20], ([21, 1],)),
    Example(list(range(30, 60)), ([60, 61, 62, 1],)),
    Example([70, 71], ([72, 73, 74, 1], [1])),
]


def built(config, tied=None):
    cls, sizes = config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        cls(**sizes, **({} if tied is None else {"tie_word_embeddings": tied}))
    )
    model.value_head = nn.Linear(16, 1)
    return model.eval()


@pytest.fixture(params=[f"{name}-{tied}" for name in FAMILIES for tied in ("tied", "untied")])
def model(request):
    name, tied = request.param.split("-")
    model = built(FAMILIES[name], tied == "tied")
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == (tied == "tied")
    return model


@pytest.fixture
def llama():
    return built(FAMILIES["llama"])


def layers_of(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def norm_of(model):
    names = ("norm", "ln_f", "final_layernorm")
    return next(getattr(model.base_model, name) for name in names if hasattr(model.base_model, name))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model, batch):
    logps, values = forward(model, batch)
    return (logps.square() + values.sin()).sum()


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(model, batch, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


@contextmanager
def calls_counted(modules):
    """Of anything in these modules: how often it was called."""
    called = []
    inside = [inner for module in modules for inner in module.modules()]
    hooks = [inner.register_forward_pre_hook(lambda module, _: called.append(module)) for inner in inside]
    yield called
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def equal(model, batch, expected):
    return all(torch.equal(a, b) for a, b in zip(forward(model, batch), expected, strict=True))


def test_the_last_layers_the_norm_and_the_value_head_train(model):
    expected = {f"value_head.{name}" for name in ("weight", "bias")}
    inside = {id(p) for part in (*layers_of(model)[-2:], norm_of(model)) for p in part.parameters()}
    expected |= {name for name, p in model.named_parameters() if id(p) in inside}
    Prefix(model, "last:2")
    assert trained_names(model) == expected


@pytest.mark.parametrize("shared", [False, True])
def test_a_pass_from_kept_states_is_the_plain_pass_to_the_bit(model, shared):
    batch = Batch.of(EXAMPLES, 0, shared=shared)
    expected = forward(model, batch)
    prefix = Prefix(model, "last:2")
    states = prefix.states(batch)
    assert states.shape == (*batch.input_ids.shape, 16) and not states.requires_grad
    with prefix.given(states):
        assert equal(model, batch, expected)
    prefix.check(batch)


@pytest.mark.parametrize("name", OTHERS)
def test_windows_and_experts_work_too(name):
    model, batch = built(OTHERS[name]), Batch.of(EXAMPLES, 0)
    expected = forward(model, batch)
    prefix = Prefix(model, "last:2")
    prefix.check(batch)
    with prefix.given(prefix.states(batch)):
        assert equal(model, batch, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_states_may_be_grouped_anew(model, shared, padding_free):
    prefix = Prefix(model, "last:3")
    whole = Batch.of(EXAMPLES, 0, "cpu", shared, padding_free)
    kept = whole.split(prefix.states(whole))
    assert [len(row) for row in kept] == [n for e in EXAMPLES for n in e.row_lengths(shared)]
    first = [sum(len(e.rows(shared)) for e in EXAMPLES[:i]) for i in range(len(EXAMPLES))]
    groups = list(micro_batches(EXAMPLES, 32, shared))
    assert len(groups) > 1
    for group in groups:
        batch = Batch.of([EXAMPLES[i] for i in group], 0, "cpu", shared, padding_free)
        of_group = [kept[first[i] + r] for i in group for r in range(len(EXAMPLES[i].rows(shared)))]
        with torch.no_grad():
            plain = forward(model, batch)
            with prefix.given(batch.join(of_group)):
                ours = forward(model, batch)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_a_plain_pass_with_the_same_layers_frozen(model):
    batch = Batch.of(EXAMPLES, 0)
    everywhere = gradients(model, batch)
    prefix = Prefix(model, "last:2")
    plain = gradients(model, batch)
    with prefix.given(prefix.states(batch)):
        ours = gradients(model, batch)
    assert ours.keys() == plain.keys() == trained_names(model)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, everywhere[name], atol=1e-5, rtol=1e-5)
    assert sum(float(gradient.norm()) for gradient in ours.values()) > 0.1


def test_layers_recomputed_in_backward_get_the_same_gradients(llama):
    batch = Batch.of(EXAMPLES, 0)
    prefix = Prefix(llama, "last:2")
    plain = gradients(llama, batch)
    llama.activation_checkpointing_enable()
    llama.train()
    with prefix.given(prefix.states(batch)):
        ours = gradients(llama, batch)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-6)


def test_the_reference_stays_the_model_before_training(model):
    batch = Batch.of(EXAMPLES, 0)
    prefix = Prefix(model, "last:2")
    states = prefix.states(batch)
    before, value_head = (
        forward(model, batch),
        {k: v.clone() for k, v in model.value_head.state_dict().items()},
    )
    with prefix.given(states):
        train(model, batch)
    assert not equal(model, batch, before)
    after = forward(model, batch)
    assert torch.equal(prefix.states(batch), states)  # nothing below has moved
    with prefix.given(states):
        assert equal(model, batch, after)
    model.value_head.load_state_dict(value_head)  # no part of the reference
    with prefix.reference():
        assert equal(model, batch, before)
        with prefix.given(states):
            assert equal(model, batch, before)
    with prefix.given(states), prefix.reference():
        assert equal(model, batch, before)


def test_nothing_that_is_skipped_runs(model):
    batch = Batch.of(EXAMPLES, 0)
    prefix = Prefix(model, "last:2")
    lower, top = layers_of(model)[:2], [*layers_of(model)[2:], norm_of(model), model.lm_head]
    with calls_counted(top) as called:
        states = prefix.states(batch)
    assert not called
    with calls_counted(lower) as called, prefix.given(states):
        gradients(model, batch)
    assert not called
    with calls_counted([*layers_of(model)[2:], norm_of(model)]) as called, prefix.reference():
        forward(model, batch)
    assert not called
    with calls_counted([*layers_of(model), norm_of(model)]) as called:
        forward(model, batch)
    assert set(layers_of(model)) < set(called)


def test_all_is_as_before_also_after_an_error(model):
    batch = Batch.of(EXAMPLES, 0)
    prefix = Prefix(model, "last:2")
    modules, weights = list(model.named_modules()), list(model.named_parameters())
    states = prefix.states(batch)
    for context in (lambda: prefix.given(states), prefix.reference, lambda: prefix.given(states[:1])):
        with pytest.raises((ZeroDivisionError, ValueError)), context():
            forward(model, batch)
            raise ZeroDivisionError
    layers_of(model)[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefix.states(batch)
    assert list(model.named_modules()) == modules
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in weights]


def test_states_of_another_batch_are_refused(llama):
    prefix = Prefix(llama, "last:1")
    states = prefix.states(Batch.of(EXAMPLES[:1], 0))
    with pytest.raises(ValueError, match="states of"), prefix.given(states[:1]):
        forward(llama, Batch.of(EXAMPLES[:1], 0))


@pytest.mark.parametrize(
    "text", ["last", "last:", "last:0", "last:4", "last:-1", "last:2.5", "first:2", "2", ""]
)
def test_what_is_not_last_k_is_refused(llama, text):
    with pytest.raises(DataError, match=f"train_layers: '{text}'; give last:k with k from 1 to 3$"):
        Prefix(llama, text)
    assert len(trained_names(llama)) == len(list(llama.parameters()))


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_whose_layers_need_more_is_refused_by_name(name):
    model = built(REFUSED[name])
    with pytest.raises(DataError) as error:
        Prefix(model, "last:2").check(Batch.of(EXAMPLES, 0))
    line = str(error.value)
    assert (
        line.startswith(f"train_layers: {type(model.base_model).__name__} cannot train") and "\n" not in line
    )


def test_layers_that_share_weights_with_lower_ones_are_refused():
    sizes = {"mamba_headdim": 8, "n_mamba_heads": 4, "mamba_d_state": 4}
    model = built((Zamba2Config, SIZES | sizes | {"layers_block_type": ["mamba", "hybrid"] * 2}))
    with pytest.raises(DataError, match=r"Zamba2Model cannot .* alone \(they share weights"):
        Prefix(model, "last:2")


def test_a_difference_is_noticed(llama):
    """A trunk that does something behind its norm, so that without its top it does not give the states."""

    def double(module, args, output):
        output.last_hidden_state = 2 * output.last_hidden_state

    llama.model.register_forward_hook(double)
    with pytest.raises(
        DataError, match=r"LlamaModel .* need more than the states below, differs by .*; leave"
    ):
        Prefix(llama, "last:2").check(Batch.of(EXAMPLES, 0))


def test_of_a_model_with_adapters_those_of_the_last_layers_train(llama):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.value_head = nn.Linear(16, 1)
    batch = Batch.of(EXAMPLES, 0)
    prefix = Prefix(adapted, "last:1")
    states, before = prefix.states(batch), forward(adapted, batch)[0]
    with prefix.given(states):
        train(adapted, batch)
    names = trained_names(adapted) - {"value_head.weight", "value_head.bias"}
    assert len(names) == 4 and all(".layers.3." in name and "lora_" in name for name in names)
    assert not torch.equal(forward(adapted, batch)[0], before)
    with prefix.reference(), prefix.given(states):
        assert torch.equal(forward(adapted, batch)[0], before)
