"""Sampler: the distribution, its independence of the batch, and the log-probabilities it records."""

import pytest
import torch
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from annotate.records import DataError
from reward.batch import Example
from reward.model import load_policy
from reward.sampler import BLOCK, Sampler, draw
from reward.tokens import logprobs
from tests import tiny

FAMILIES = ("llama", "qwen2", "gpt2")
PROMPTS = [list(range(5, 5 + length)) for length in (3, 17, 1, 9, 30, 4, 4, 12)]
KEYS = [f"key-{i}" for i in range(len(PROMPTS))]


def load(family, folder):
    """A policy that stops after some tokens: its stop token is likely after some and not after others."""
    model, tokenizer = load_policy(tiny.save_folder(folder, family))
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 6
    return model, tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load("llama", tmp_path_factory.mktemp("policy"))


def test_temperature_to_zero_is_greedy_generation(policy):
    model, tokenizer = policy
    samples = Sampler(model, tokenizer, 20, temperature=1e-6).sample(PROMPTS, KEYS)
    greedy = GenerationConfig(
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        theirs = model.generate(torch.tensor([prompt]), generation_config=greedy)
        assert sample.tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("vocabulary", [50, 2 * BLOCK, 3 * BLOCK + 7])
def test_draws_have_the_frequencies_of_the_softmax(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocabulary, generator=generator).mul(2) + 30
    uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
    parts = [draw(logits.expand(len(part), -1), part) for part in uniform.split(20_000)]
    drawn, logps = (torch.cat(both) for both in zip(*parts, strict=True))
    logp = logits[0].log_softmax(-1)
    torch.testing.assert_close(logps, logp[drawn], atol=1e-5, rtol=0)
    frequency = drawn.bincount(minlength=vocabulary) / len(drawn)
    assert (frequency - logp.exp()).abs().max() < 0.005


def test_a_draw_is_where_the_running_sum_passes_the_uniform():
    """Against one running sum over the whole row."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)).mul(3)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniform[:, None]).squeeze(1)
    assert (draw(logits, uniform)[0] == plain).all()


def test_inverse_cdf_at_its_ends():
    logits = torch.tensor([[float("-inf"), 0.5, 0.5, float("-inf")]])
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64))[0].item() == 1
    assert draw(logits, torch.tensor([1 - 1e-16], dtype=torch.float64))[0].item() == 2
    only = torch.full((1, 3 * BLOCK), float("-inf"))
    only[0, BLOCK - 1] = 0.0  # the last of its block, and blocks without any weight behind it
    for uniform in (0.0, 0.5, 1 - 1e-16):
        assert draw(only, torch.tensor([uniform], dtype=torch.float64))[0].item() == BLOCK - 1


def test_first_tokens_have_the_frequencies_of_the_model(llama):
    model, tokenizer = llama
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    sampler = Sampler(model, tokenizer, 1, temperature=0.7, batch_size=1000)
    samples = sampler.sample([PROMPTS[0]] * 4000, [f"draw-{i}" for i in range(4000)])
    frequency = torch.tensor([s.tokens[0] for s in samples]).bincount(minlength=len(expected)) / 4000
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((frequency - expected).abs() < 5 * deviation + 1e-3).all()


def test_draws_do_not_depend_on_who_shares_the_batch(policy):
    together = Sampler(*policy, 20).sample(PROMPTS, KEYS)
    for batch_size in (1, 3):
        assert tokens(Sampler(*policy, 20, batch_size=batch_size).sample(PROMPTS, KEYS)) == tokens(together)
    backwards = Sampler(*policy, 20).sample(PROMPTS[::-1], KEYS[::-1])
    assert tokens(backwards[::-1]) == tokens(together)
    alone = [Sampler(*policy, 20).sample([p], [k])[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert tokens(alone) == tokens(together)
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("with_values", [False, True])
def test_a_prompt_that_comes_several_times_is_read_once(policy, with_values):
    model, tokenizer = policy
    prompts, keys = [p for p in PROMPTS for _ in range(3)], [f"{k}/{i}" for k in KEYS for i in range(3)]
    read: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    if with_values:
        model.value_head = torch.nn.Linear(model.config.hidden_size, 1)
    try:
        sampler = Sampler(model, tokenizer, 20)
        together = sampler.sample(prompts, keys)
        assert read[:2] == [(len(set(map(tuple, PROMPTS))), max(map(len, PROMPTS))), (len(prompts), 1)]
        alone = [sampler.sample([p], [k])[0] for p, k in zip(prompts, keys, strict=True)]
    finally:
        hook.remove()
        if with_values:
            del model.value_head
    assert tokens(together) == tokens(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.values == pytest.approx(other.values, abs=1e-5) and bool(one.values) == with_values


def test_room_in_the_cache_changes_no_bit(policy, monkeypatch):
    model, tokenizer = policy
    monkeypatch.setattr("reward.decoding.ROOM", 3)
    roomy = Sampler(model, tokenizer, 20).sample(PROMPTS, KEYS)
    assert max(len(sample.tokens) for sample in roomy) > 6  # room was made more than once
    monkeypatch.setattr("reward.decoding._with_room", lambda cache: cache)
    assert Sampler(model, tokenizer, 20).sample(PROMPTS, KEYS) == roomy


def test_another_key_draws_another_reply(llama):
    first, second = Sampler(*llama, 20).sample([PROMPTS[2]] * 2, ["a", "b"])
    assert first.tokens != second.tokens


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_logprobs_are_the_teacher_forced_ones(policy, temperature):
    """Also of rows that go on after others have left the cache."""
    model, tokenizer = policy
    samples = Sampler(model, tokenizer, 25, temperature).sample(PROMPTS * 3, [f"t{i}" for i in range(24)])
    examples = [Example(p, (s.tokens,)) for p, s in zip(PROMPTS * 3, samples, strict=True)]
    for sample, (forced,) in zip(samples, logprobs(model, examples, temperature), strict=True):
        assert sample.logprobs == pytest.approx(forced, abs=1e-5)


def test_a_reply_ends_at_its_stop_token_or_at_the_limit(llama):
    samples = Sampler(*llama, 25).sample(PROMPTS * 5, [f"s{i}" for i in range(40)])
    stop = llama[1].eos_token_id
    assert {s.stopped for s in samples} == {True, False}
    for sample in samples:
        assert sample.tokens.count(stop) == sample.stopped
        assert sample.tokens[-1] == stop if sample.stopped else len(sample.tokens) == 25
        assert len(sample.logprobs) == len(sample.tokens)


def test_text_is_the_reply_without_its_stop_token(llama):
    model, tokenizer = llama
    sampler = Sampler(model, tokenizer, 25)
    for sample in sampler.sample(PROMPTS * 3, [f"x{i}" for i in range(24)]):
        assert ("<|end|>" in tokenizer.decode(sample.tokens)) == sample.stopped
        assert "<|end|>" not in sampler.text(sample)


def test_a_prompt_without_room_for_the_reply_is_named_in_one_line(llama):
    with pytest.raises(DataError, match=r"prompt long: 110 tokens and 20 .* exceed the 128") as error:
        Sampler(*llama, 20).sample([[5], [5] * 110], ["short", "long"])
    assert "\n" not in str(error.value)
    assert len(Sampler(*llama, 18).sample([[5] * 110], ["fits"])) == 1


def test_sampling_leaves_the_training_mode_and_tells_the_bar(llama):
    model, tokenizer = llama
    seen = []

    class Bar:
        def advance(self, steps=1, /, **shown):
            seen.append(steps)

    model.train()
    Sampler(model, tokenizer, 3, batch_size=3).sample(PROMPTS, KEYS, Bar())
    assert model.training and seen == [3, 3, 2]
    model.eval()
    assert Sampler(model, tokenizer, 3).sample([], []) == []


def tokens(samples):
    return [s.tokens for s in samples]


def test_rows_of_a_model_without_keys_are_read_again():
    """Mamba returns no `past_key_values`: repeated prompts, rows that end early, the log-probabilities."""
    tokenizer = tiny.tokenizer_of()
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2)
    sampler = Sampler(MambaForCausalLM(config), tokenizer, 20)
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(3)]
    keys = [f"{key}/{i}" for key in KEYS[:4] for i in range(3)]
    sampler.stop = sampler.sample(prompts[:1], keys[:1])[0].tokens[2]
    together = sampler.sample(prompts, keys)
    assert {len(sample.tokens) for sample in together} > {20}
    alone = [sampler.sample([p], [k])[0] for p, k in zip(prompts, keys, strict=True)]
    assert tokens(together) == tokens(alone)
    rows = [Example(p, (sample.tokens,)) for p, sample in zip(prompts, together, strict=True)]
    for sample, (exact,) in zip(together, logprobs(sampler.model, rows), strict=True):
        assert sample.logprobs == pytest.approx(exact, abs=1e-4)


def test_states_of_convolutions_go_with_their_rows():
    """A cache with more than keys and values, as of LFM2: repeated prompts, and rows that end early."""
    tokenizer = tiny.tokenizer_of()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(Lfm2Config(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **layers))
    sampler = Sampler(model, tokenizer, 20)
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(3)]
    keys = [f"{key}/{i}" for key in KEYS[:4] for i in range(3)]
    sampler.stop = sampler.sample(prompts[:1], keys[:1])[0].tokens[2]
    together = sampler.sample(prompts, keys)
    assert {len(sample.tokens) for sample in together} > {20}
    assert tokens(together) == tokens(
        [sampler.sample([p], [k])[0] for p, k in zip(prompts, keys, strict=True)]
    )
