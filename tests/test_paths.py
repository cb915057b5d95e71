"""Shared rows and the head apart: the numbers of plain rows, and used only where a model gives them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPT2LMHeadModel, MistralConfig

from reward.batch import Batch, Example, micro_batches
from reward.head import head_logprobs
from reward.model import load_policy, new_reward_model
from reward.paths import choose, chosen, describe
from reward.tokens import batch_of, forward, logprobs, rewards, scores
from tests import tiny

EXAMPLES = [
    Example([5, 6, 7, 8, 9], ([10, 11, 1], [12, 13, 14, 15, 16, 17, 1])),
    Example([20], ([21, 1], [22, 23, 1], [1])),
    Example(list(range(30, 60)), ([60, 61, 62, 1],)),
]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(params=[0, 2**24], ids=["chunks made again", "kept"])
def large(request, monkeypatch):
    monkeypatch.setattr("reward.head.LARGE", request.param)


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def flat(nested):
    return torch.tensor([x for rows in nested for row in rows for x in row])


@pytest.fixture(scope="module", params=("llama", "qwen2", "gpt2"))
def folder(request, tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("folder"), request.param)


def test_shared_rows_give_the_logprobs_of_plain_rows(folder):
    model, _ = load_policy(folder)
    plain = flat(logprobs(model, EXAMPLES))
    assert choose(model, EXAMPLES).shares
    assert len(batch_of(model, EXAMPLES).lengths) == 3
    torch.testing.assert_close(flat(logprobs(model, EXAMPLES)), plain, atol=1e-5, rtol=0)


def test_shared_rows_give_the_scores_of_plain_rows(folder):
    model, _ = new_reward_model(folder)
    plain = rewards(model, EXAMPLES)
    path = choose(model, EXAMPLES)
    assert path.shares and not path.head
    assert rewards(model, EXAMPLES) == [pytest.approx(row, abs=1e-5) for row in plain]


def gradient_of(model, batch):
    model.zero_grad()
    forward(model, batch)[0].square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_rows_and_the_head_apart_give_the_gradient_of_plain_rows(folder, attention, large):
    model, _ = load_policy(folder)
    model.set_attn_implementation(attention)
    plain = gradient_of(model, batch_of(model, EXAMPLES))
    path = choose(model, EXAMPLES)
    assert path.shares and path.head and bool(path.layers) != isinstance(model, GPT2LMHeadModel)
    fast = gradient_of(model, batch_of(model, EXAMPLES))
    assert (fast - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_the_head_apart_is_log_softmax(monkeypatch, large, temperature, biased):
    monkeypatch.setattr("reward.head.CHUNK", 150)
    monkeypatch.setattr("reward.head.ROWS", 1)  # three rows at a time
    torch.manual_seed(0)
    states, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((11, 8), (50, 8), (50,)))
    targets, grad = torch.randint(50, (11,)), torch.randn(11)
    given = (states, weight, bias)[: 2 + biased]
    ours = head_logprobs(states, weight, targets, temperature, bias if biased else None)
    of_ours = torch.autograd.grad(ours, given, grad)
    logits = torch.nn.functional.linear(*given) / temperature
    theirs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(of_ours, torch.autograd.grad(theirs, given, grad))


def test_no_gradient_is_made_for_a_frozen_head():
    states, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    head_logprobs(states, weight, torch.tensor([1, 2, 3, 4])).sum().backward()
    assert states.grad is not None and weight.grad is None


def test_the_head_apart_works_in_half_precision(large):
    states, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = head_logprobs(states, weight, torch.tensor([1, 2, 3, 4]))
    logps.sum().backward()
    exact = (states @ weight.T).log_softmax(1)[range(4), [1, 2, 3, 4]]
    assert logps.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(logps, exact, atol=0.1, rtol=0.05)


def test_a_sliding_window_is_noticed_only_in_rows_longer_than_it():
    config = MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=32, sliding_window=16)
    short = [Example([5, 6, 7], ([8, 9, 1], [10, 1]))]
    assert choose(built(config), short).shares
    long = [Example(list(range(5, 45)), ([8, 9, 10, 1], [10, 11, 1]))]
    path = choose(built(config), long)
    assert not path.shares and "a row for each completion (differs by" in describe(path)


def test_alibi_is_noticed():
    model = built(BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0))
    plain = flat(logprobs(model, EXAMPLES))
    assert not choose(model, EXAMPLES).shares
    torch.testing.assert_close(flat(logprobs(model, EXAMPLES)), plain)


def test_a_head_that_caps_its_logits_is_noticed():
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=32)
    config.final_logit_softcapping = 0.05
    model = built(config)
    plain = flat(logprobs(model, EXAMPLES))
    assert not choose(model, EXAMPLES).head
    torch.testing.assert_close(flat(logprobs(model, EXAMPLES)), plain, atol=1e-5, rtol=0)


def test_a_cap_that_small_logits_do_not_reach_is_noticed():
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=32)
    config.final_logit_softcapping = 1e4
    path = choose(built(config), EXAMPLES)
    assert not path.head and "logits are capped" in path.why[2]


def test_longer_rows_are_tried_again():
    config = MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=32, sliding_window=16)
    model = built(config)
    short = [Example([5, 6, 7], ([8, 9, 1], [10, 1]))]
    assert chosen(model, short).path.shares and chosen(model, short[:1]).path.length == 6
    assert not chosen(model, [*short, Example(list(range(5, 45)), ([8, 9, 1], [10, 1]))]).path.shares
    assert chosen(model, short).path.length == 43


def test_a_model_that_refuses_such_masks_keeps_plain_rows():
    model = built(BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0))

    def refuses(module, args, kwargs):
        if kwargs["attention_mask"].dim() == 4:
            raise ValueError("only masks of two dimensions\nand more")

    model.transformer.register_forward_pre_hook(refuses, with_kwargs=True)
    assert "(refused: only masks of two dimensions)" in describe(choose(model, EXAMPLES))


def test_one_completion_a_prompt_has_nothing_to_share(folder):
    model, _ = load_policy(folder)
    path = choose(model, EXAMPLES[2:])
    assert not path.shares and path.head and "one completion a prompt" in describe(path)


def test_a_shared_row_holds_the_prompt_once():
    batch = Batch.of(EXAMPLES[:1], pad=0, shared=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 1, 9, 12, 13, 14, 15, 16, 17, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.input_ids.roll(-1, 1)[batch.reads].tolist() == batch.targets.tolist()
    seen = batch.attention_mask()[0, 0]
    assert seen[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 8]


def test_a_row_to_be_scored_repeats_nothing():
    batch = Batch.of(EXAMPLES[:1], pad=0, shared=True, scored=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 1, 12, 13, 14, 15, 16, 17, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.input_ids[batch.reads].tolist() == batch.targets.tolist() and batch.lengths == [15]
    seen = batch.attention_mask()[0, 0]
    assert seen[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8]


@pytest.mark.parametrize("reads", ["reply", "last"])
def test_rewards_have_the_gradient_of_plain_rows(folder, reads):
    model, _ = new_reward_model(folder)
    model.config.reward_reads = reads
    gradients = []
    for _ in range(2):
        model.zero_grad()
        scores(model, EXAMPLES).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert choose(model, EXAMPLES).shares
    plain, shared = gradients
    assert (shared - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_hold_every_example_once_within_the_budget(shared):
    examples = [Example([5] * (i % 7 + 1), ([6] * (i % 5), [7] * 3)) for i in range(40)]
    groups = list(micro_batches(examples, 60, shared))
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        rows = Batch.of([examples[i] for i in group], pad=0, shared=shared).input_ids
        assert rows.numel() <= 60 or len(group) == 1


def test_the_value_head_reads_the_same_states_with_the_head_apart(folder):
    model, _ = load_policy(folder)
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    plain = forward(model, batch_of(model, EXAMPLES))
    choose(model, EXAMPLES)
    for ours, theirs in zip(forward(model, batch_of(model, EXAMPLES)), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
