"""What PPO is made of: architectures, references, values, adapters, prompts."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from reward.batch import Example
from reward.model import load_policy, new_reward_model, save
from reward.tokens import batch_of, forward, logprobs
from stages.errors import UserError
from stages.ppo_trainer import PPOConfig, PPOTrainer
from tests import tiny
from tests.test_ppo_trainer import PROMPTS, SMALL, count_77, rows, setting

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "mistral", "phi")


def model_of(kind, tokenizer, tied):
    """Two layers of width 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 128}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    if kind == "phi":
        sizes = sizes | {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("trained", ["whole", "adapters"])
def test_any_architecture_trains(tmp_path, kind, tied, trained):
    """Every update starts at ratio 1, so sampling and training agree; and the weights move."""
    tokenizer = tiny.tokenizer_of()
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        model_of(kind, tokenizer, tied),
        count_77,
        PPOConfig(str(tmp_path), **SMALL | {"total_episodes": 16, "num_ppo_epochs": 1}),
        rows(),
        processing_class=tokenizer,
        peft_config=config if trained == "adapters" else None,
    )
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["ratio"] for line in lines[::2]] == pytest.approx([1, 1], abs=1e-5)
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    of_policy = {k for k in moved if "value_head" not in k}
    assert of_policy and (trained == "whole" or all("lora" in k for k in of_policy))


def test_adapters_off_are_the_reference(tmp_path):
    """Bitwise, before and after training."""
    tiny.save_folder(tmp_path, "llama")
    base = load_policy(tmp_path / "llama")[0]
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = setting(tmp_path, given={"peft_config": config})
    examples = [Example([5, 6, 7], ([8, 9],)), Example([10], ([11, 12, 13],))]
    plain = [pytest.approx(row, abs=1e-5) for (row,) in logprobs(base, examples)]
    assert trainer.actor.reference.measure(examples, 1.0)[0] == plain
    trainer.train()
    assert trainer.actor.reference.measure(examples, 1.0)[0] == plain
    assert [row for (row,) in logprobs(trainer.model, examples)] != plain


def test_a_named_adapter_is_the_reference(tmp_path):
    tiny.save_folder(tmp_path, "llama")
    policy, tokenizer = load_policy(tmp_path / "llama")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = peft.get_peft_model(policy, config)
    torch.manual_seed(3)
    policy.add_adapter("before", config)
    policy.set_adapter("before")
    examples = [Example([5, 6, 7], ([8, 9],))]
    ((expected,),) = logprobs(policy, examples)
    policy.set_adapter("default")
    args = PPOConfig(str(tmp_path / "out"), **SMALL | {"ref_adapter_name": "before"})
    trainer = PPOTrainer(policy, count_77, args, rows(), processing_class=tokenizer)
    trainer.train()
    ((measured,), _) = trainer.actor.reference.measure(examples, 1.0)
    assert measured == pytest.approx(expected, abs=1e-5)
    assert trainer.model.active_adapter == "default"
    with pytest.raises(UserError, match="no adapter named other"):
        args = PPOConfig(str(tmp_path / "out"), **SMALL | {"ref_adapter_name": "other"})
        PPOTrainer(policy, count_77, args, rows(), processing_class=tokenizer)


def test_a_reference_of_its_own(tmp_path):
    other, _ = load_policy(tiny.save_folder(tmp_path, "llama"))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    trainer = setting(tmp_path, count_77, given={"ref_model": other})
    replies = trainer.rollout()
    assert max(map(abs, replies.kl)) > 0.01
    assert not any(p.requires_grad for p in other.parameters())


def test_a_value_model_of_its_own(tmp_path):
    """Its loss moves it alone, at its own rate."""
    tiny.save_folder(tmp_path, "llama")
    value, _ = new_reward_model(tmp_path / "llama")
    trainer = setting(tmp_path, count_77, given={"value_model": value}, value_learning_rate=0.5, optim="sgd")
    replies = trainer.rollout()
    batch = trainer._experience(replies, trainer.score(replies))
    trainer.objective.trains_policy = False
    weight = trainer.objective.weight(batch)
    loss, _ = trainer.objective.loss(trainer.model, batch)
    (loss / weight).backward()
    of_value = {id(p) for p in value.parameters()}
    for p in trainer.model.parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in of_value) or p.grad is None
    groups = [group for group in trainer.create_optimizer().param_groups if group["params"]]
    for group in groups:
        assert group["lr"] == (0.5 if id(group["params"][0]) in of_value else 1e-3)
    assert {group["lr"] for group in groups} == {0.5, 1e-3}


def test_a_value_that_starts_as_the_reward_model(tmp_path):
    trainer = setting(tmp_path, value_init="reward")
    reward = trainer.rewards.models[0]
    replies = trainer.rollout()
    example = Example(replies.experience[0].prompt, replies.experience[0].completions)
    batch = batch_of(reward, [example])
    with torch.no_grad():
        states = reward.model(input_ids=batch.input_ids).last_hidden_state
        expected = reward.score(states[batch.reads]).squeeze(-1)
    assert replies.experience[0].old_values == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="value_init=reward needs one reward model"):
        setting(tmp_path, count_77, value_init="reward")


def test_a_value_model_with_two_labels_is_refused(tmp_path):
    folder = tiny.save_folder(tmp_path, "llama")
    wrong = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with pytest.raises(UserError, match="has 2 labels: give one with num_labels=1"):
        setting(tmp_path, count_77, given={"value_model": wrong})


def test_the_saved_policy_has_no_value(tmp_path):
    trainer = setting(tmp_path, count_77)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded, _ = load_policy(tmp_path / "final")
    state = {k: v for k, v in trainer.model.state_dict().items() if "value_head" not in k}
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert hasattr(trainer.model, "value_head")


def test_a_critic_warms_up_alone(tmp_path):
    trainer = setting(tmp_path, value_init="reward", critic_warmup=3)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("value_model") for k in moved)


def test_the_score_after_the_stop_token(tmp_path):
    """A reply that stopped has one more state: it gets the score, and no token of the policy."""
    tiny.save_folder(tmp_path, "llama")
    policy, tokenizer = load_policy(tmp_path / "llama")
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 6
    save(policy, tokenizer, tmp_path / "llama")
    trainer = setting(tmp_path, count_77, score_slot="post_eos", lam=1.0, response_length=16)
    replies = trainer.rollout()
    experience = trainer._experience(replies, trainer.score(replies))
    longer = [e for e, s in zip(experience, replies.samples, strict=True) if len(s.tokens) < 16]
    assert longer and all(e.appended and e.weights[-1] == 0 and e.advantages[-1] == 0 for e in longer)
    assert all(
        len(e.returns) == len(s.tokens) + 1
        for e, s in zip(experience, replies.samples, strict=True)
        if len(s.tokens) < 16
    )
    weight = trainer.objective.weight(experience)
    assert weight == sum(len(s.tokens) for s in replies.samples)
    with torch.no_grad():
        trainer.objective.loss(trainer.model, experience)


def test_answers_of_one_token_and_at_once(tmp_path):
    """All stop at once, or none may say more than a token."""
    tiny.save_folder(tmp_path, "llama")
    policy, tokenizer = load_policy(tmp_path / "llama")
    stops = torch.nn.Linear(16, len(tokenizer))
    with torch.no_grad():
        stops.weight.copy_(policy.lm_head.weight)
        stops.bias.zero_()
        stops.bias[tokenizer.eos_token_id] = 1e4
    policy.lm_head = stops
    trainer = PPOTrainer(
        policy, count_77, PPOConfig(str(tmp_path), **SMALL), rows(), processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["length"] == 1 and trainer.state.log_history[0]["self_stopping"] == 1
    single = setting(tmp_path, count_77, response_length=1)
    single.train()
    assert single.state.global_step == 12


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, "row 1 of the dataset has no prompt"),
        ({"prompt": "hello " * 200}, "row 1 of the dataset: .* exceed the 128 positions"),
    ],
)
def test_prompts_that_cannot_be_answered(tmp_path, row, message):
    policy, tokenizer = load_policy(tiny.save_folder(tmp_path, "llama"))
    dataset = [*rows(PROMPTS[:1]), row]
    with pytest.raises(UserError, match=message) as error:
        PPOTrainer(policy, count_77, PPOConfig(str(tmp_path), **SMALL), dataset, processing_class=tokenizer)
    assert "\n" not in str(error.value)


def test_values_do_not_depend_on_padding(tmp_path):
    trainer = setting(tmp_path, value_init="reward")
    examples = [Example([5, 6, 7], ([8, 9],)), Example([10], ([11, 12, 13, 14],))]
    with torch.no_grad():
        _, together = forward(trainer.model, batch_of(trainer.model, examples))
        _, alone = forward(trainer.model, batch_of(trainer.model, examples[:1]))
    torch.testing.assert_close(together[0, :2], alone[0], atol=1e-5, rtol=1e-5)
