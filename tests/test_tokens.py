"""Tokens: what is rendered, and that numbers per token depend on the token's own row alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import nn

from annotate.records import DataError, Message, prompt_id
from reward.batch import Batch, Example, micro_batches
from reward.model import load_policy, load_reward, load_tokenizer, new_reward_model, save
from reward.tokens import (
    batch_of,
    completion_ids,
    encode,
    forward,
    logprobs,
    logprobs_and_values,
    prompt_ids,
    prompts_ids,
    rewards,
    scores,
)
from tests import tiny

FAMILIES = ("llama", "qwen2", "gpt2")
EXAMPLES = [
    Example([5, 6, 7, 8, 9], ([10, 11, 1], [12, 13, 14, 15, 16, 17, 1])),
    Example([20], ([21, 1],)),
    Example(list(range(30, 60)), ([60, 61, 62, 1],)),
]


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory):
    return load_policy(tiny.save_folder(tmp_path_factory.mktemp("policy"), request.param))[0]


@pytest.fixture(scope="module", params=FAMILIES)
def reward_model(request, tmp_path_factory):
    torch.manual_seed(1)
    return new_reward_model(tiny.save_folder(tmp_path_factory.mktemp("reward"), request.param))[0]


def alone(model, prompt, completion, temperature):
    """Oracle: a plain forward pass over one row, the whole softmax, then the chosen entries."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_a_plain_forward_of_each_row_alone(policy, temperature):
    for example, rows in zip(EXAMPLES, logprobs(policy, EXAMPLES, temperature), strict=True):
        for completion, row in zip(example.completions, rows, strict=True):
            with torch.no_grad():
                expected = alone(policy, example.prompt, completion, temperature)
            torch.testing.assert_close(torch.tensor(row), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradient_is_that_of_a_plain_forward(policy, temperature):
    def gradient(total):
        policy.zero_grad()
        total.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    ours = gradient(forward(policy, batch_of(policy, EXAMPLES), temperature)[0].sum())
    rows = [(e.prompt, c) for e in EXAMPLES for c in e.completions]
    theirs = gradient(sum(alone(policy, *row, temperature).sum() for row in rows))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_neither_batch_nor_padding_changes_a_logprob(policy):
    together = forward(policy, Batch.of(EXAMPLES, pad=0))[0]
    other_pad = forward(policy, Batch.of(EXAMPLES, pad=1))[0]  # the stop token as filler
    longer = forward(policy, Batch.of([*EXAMPLES, Example([5] * 80, ([6],))], pad=0))[0]
    torch.testing.assert_close(other_pad, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(longer[:4, : together.shape[1]], together, atol=1e-5, rtol=0)


def test_batch_masks_say_which_tokens_are_the_completions():
    batch = Batch.of(EXAMPLES[:2], pad=99)
    assert batch.targets.tolist() == [10, 11, 1, 12, 13, 14, 15, 16, 17, 1, 21, 1]
    assert batch.mask.sum(1).tolist() == [3, 7, 2]
    assert batch.attention_mask().sum(1).tolist() == [8, 12, 3]
    following = batch.input_ids.roll(-1, 1)[batch.reads]
    assert following.tolist() == batch.targets.tolist()
    assert batch.pad(batch.targets)[2].tolist() == [21, 1, 0, 0, 0, 0, 0]


def test_an_empty_completion_has_no_logprob(policy):
    first, second = logprobs(policy, [Example([5, 6], ([], [7, 1]))])[0]
    assert first == [] and len(second) == 2


def test_values_are_the_head_on_what_the_language_model_head_reads(tmp_path):
    policy, _ = load_policy(tiny.save_folder(tmp_path, "llama"))
    policy.value_head = nn.Linear(16, 1)
    ((row,), *_) = logprobs_and_values(policy, EXAMPLES[1:], 1.0)
    assert row[0] == pytest.approx(logprobs(policy, EXAMPLES[1:])[0][0], abs=1e-6)
    with torch.no_grad():
        states = policy.model(input_ids=torch.tensor([[20, 21, 1]])).last_hidden_state[0]
        expected = policy.value_head(states)[:2, 0]  # the states before the two tokens of the completion
    torch.testing.assert_close(torch.tensor(row[1]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reads", ["reply", "last"])
def test_scores_are_those_of_each_row_alone(reward_model, monkeypatch, reads):
    """Read over the states of the reply's tokens, or at the last token only."""
    monkeypatch.setattr(reward_model.config, "reward_reads", reads)
    together = rewards(reward_model, EXAMPLES)
    for example, row in zip(EXAMPLES, together, strict=True):
        for completion, score in zip(example.completions, row, strict=True):
            with torch.no_grad():
                ids = torch.tensor([example.prompt + completion])
                hidden = reward_model.base_model(input_ids=ids).last_hidden_state
                first = len(example.prompt) if reads == "reply" else -1
                expected = reward_model.score(hidden[0, first:]).mean().item()
            assert score == pytest.approx(expected, abs=1e-5)


def test_neither_padding_nor_its_id_changes_a_score(reward_model, monkeypatch):
    with torch.no_grad():
        together = scores(reward_model, EXAMPLES)
        monkeypatch.setattr(reward_model.config, "pad_token_id", 1)
        other = scores(reward_model, [*EXAMPLES, Example([5] * 80, ([6],))])
    torch.testing.assert_close(other[:4], together, atol=1e-5, rtol=0)


def test_scores_agree_with_transformers_where_pad_is_not_in_the_text(reward_model, monkeypatch):
    """Its own classification reads the last token that is not pad: the same where that is unambiguous."""
    monkeypatch.setattr(reward_model.config, "reward_reads", "last")
    batch = batch_of(reward_model, EXAMPLES)
    with torch.no_grad():
        theirs = reward_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask()).logits[:, 0]
        torch.testing.assert_close(scores(reward_model, EXAMPLES), theirs, atol=1e-5, rtol=0)


def test_the_stop_token_is_scored(reward_model):
    with_stop, without = rewards(reward_model, [Example([5, 6], ([7, 8, 1], [7, 8]))])[0]
    assert with_stop != without


def test_evaluation_leaves_the_training_mode_as_it_was(policy):
    policy.train()
    logprobs(policy, EXAMPLES)
    assert policy.training
    policy.eval()
    logprobs(policy, EXAMPLES)
    assert not policy.training


MESSAGES = [
    Message(role="system", content="Be kind."),
    Message(role="user", content="My kettle broke."),
    Message(role="assistant", content="Which one?"),
    Message(role="user", content="The red one, n° 12."),
]


def test_chat_template_names_the_roles_and_opens_the_reply(tmp_path):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, "llama"))
    assert tokenizer.decode(prompt_ids(tokenizer, MESSAGES)) == (
        "<|system|>Be kind.<|end|><|user|>My kettle broke.<|end|><|assistant|>Which one?<|end|>"
        "<|user|>The red one, n° 12.<|end|><|assistant|>"
    )


def test_added_chat_template_names_the_roles_too(tmp_path):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, "no_template"))
    assert tokenizer.decode(prompt_ids(tokenizer, MESSAGES)) == (
        "system:\nBe kind.\nuser:\nMy kettle broke.\nassistant:\nWhich one?<|end|>\n"
        "user:\nThe red one, n° 12.\nassistant:\n"
    )


@pytest.mark.parametrize("name", tiny.FOLDERS)
def test_a_reply_ends_in_the_stop_token_and_comes_back_byte_for_byte(tmp_path, name):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, name))
    text = " Sure: café, 12,5 kg\n\nand 'quotes' ."
    ids = completion_ids(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["llama", "no_template"])
def test_prompt_and_reply_are_what_the_template_makes_of_the_whole_conversation(tmp_path, name):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, name))
    ours = prompt_ids(tokenizer, MESSAGES) + completion_ids(tokenizer, "I am sorry.")
    whole = tokenizer.apply_chat_template(
        [m.model_dump() for m in MESSAGES] + [{"role": "assistant", "content": "I am sorry."}],
        return_dict=False,
    )
    assert whole[: len(ours)] == ours


def test_no_bos_is_doubled_where_the_tokenizer_adds_one_itself(tmp_path):
    folder = tiny.save_folder(tmp_path, "no_template")
    tokenizer, _ = load_tokenizer(folder)
    bos = "<|system|>"
    tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer, notes = load_tokenizer(folder)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id and "chat template added" in notes
    ids = prompt_ids(tokenizer, MESSAGES) + completion_ids(tokenizer, "Sorry.")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, "llama"))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}a"
    )
    plain = [Message(role="user", content="Hm?")]
    system = [Message(role="system", content="Be brief."), *plain]
    assert prompts_ids(tokenizer, [plain, plain]) == 2 * [prompt_ids(tokenizer, plain)]
    said = f"prompt {prompt_id(system)}: the chat template refuses it .System role not supported"
    with pytest.raises(DataError, match=said):
        prompts_ids(tokenizer, [plain, system])


def test_a_row_is_encoded_as_its_parts_are(tmp_path):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, "llama"))
    other = [Message(role="user", content="Hm?")]
    rows = [(MESSAGES, ["Yes.", "No."]), (other, ["No."]), (MESSAGES, [""])]
    expected = [
        Example(prompt_ids(tokenizer, prompt), tuple(completion_ids(tokenizer, text) for text in texts))
        for prompt, texts in rows
    ]
    assert encode(tokenizer, rows) == expected and encode(tokenizer, []) == []


def test_a_saved_reward_model_scores_the_same(reward_model, tmp_path):
    tokenizer, _ = load_tokenizer(tiny.save_folder(tmp_path, "llama"))
    save(reward_model, tokenizer, tmp_path / "saved")
    if reward_model.config.model_type == "llama":
        assert rewards(load_reward(tmp_path / "saved")[0], EXAMPLES) == rewards(reward_model, EXAMPLES)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3)), max_size=30),
    st.integers(1, 200),
)
def test_micro_batches_hold_every_example_once_under_the_budget(sizes, budget):
    examples = [Example([2] * p, tuple([3] * c for _ in range(k))) for p, c, k in sizes]
    groups = list(micro_batches(examples, budget))
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))
    for group in groups:
        batch = Batch.of([examples[i] for i in group], pad=0)
        assert batch.input_ids.numel() <= budget or len(group) == 1
