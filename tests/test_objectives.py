"""DPO and likelihood: hand-worked, and against TRL and transformers on the same model."""

import math

import pytest
import torch

from annotate.records import Message
from reward.batch import Example
from reward.model import load_policy, load_tokenizer
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages.objectives import DPO, NLL, Pair, dpo_loss
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("policy"), "llama")


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)[0]


@pytest.fixture(scope="module")
def reference():
    return tiny.model_of("llama", tiny.tokenizer_of(), seed=1)


TEXTS = [
    ("Sorry about the lamp.", "No."),
    ("We will send a new pan today.", "Go away, Ann."),
    ("Yes.", "Oh!"),
]


def pairs(tokenizer, reference):
    asked = [[Message(role="user", content=f"My {word} broke.")] for word in ("lamp", "pan", "clock")]
    rows = [
        Example(prompt_ids(tokenizer, prompt), tuple(completion_ids(tokenizer, text) for text in texts))
        for prompt, texts in zip(asked, TEXTS, strict=True)
    ]
    return [
        Pair(row.prompt, row.completions, (sum(chosen), sum(rejected)))
        for row, (chosen, rejected) in zip(rows, logprobs(reference, rows), strict=True)
    ]


def test_dpo_by_hand():
    """Log-ratios 1 and -1, beta 0.1: margin 0.2, loss -log sigmoid(0.2)."""
    loss, rewards = dpo_loss(torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.0]]), 0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.2)), rel=1e-6)
    assert rewards.tolist() == [pytest.approx([0.1, -0.1])]


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta sigmoid(-margin); Rafailov et al. 2023, the equation below 7."""
    policy = torch.tensor([[-10.0, -12.0]], requires_grad=True)
    dpo_loss(policy, torch.tensor([[-11.0, -11.0]]), 0.1)[0].sum().backward()
    slope = 0.1 / (1 + math.exp(0.2))
    assert policy.grad.tolist() == [pytest.approx([-slope, slope], rel=1e-6)]


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_dpo_starts_at_ln_2(folder, policy, beta):
    rows = pairs(load_tokenizer(folder)[0], policy)
    loss, metrics = DPO(beta).loss(policy, rows)
    assert loss.item() / DPO(beta).weight(rows) == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-4)
    assert metrics["logps_chosen_change"].item() == pytest.approx(0, abs=1e-4)


def test_dpo_is_that_of_trl(folder, policy, reference, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, _ = load_tokenizer(folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"My {word} broke."}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for word, (chosen, rejected) in zip(("lamp", "pan", "clock"), TEXTS, strict=True)
    ]
    args = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        per_device_train_batch_size=3,
        report_to="none",
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.zero_grad()
    theirs = trainer.compute_loss(policy, batch)
    theirs.backward()
    of_theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    ours = pairs(tokenizer, reference)
    policy.zero_grad()
    loss, _ = DPO(0.3).loss(policy, ours)
    (loss / 3).backward()
    of_ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (
        loss.item() / 3 == pytest.approx(theirs.item(), rel=1e-5) and abs(theirs.item() - math.log(2)) > 0.01
    )
    assert (of_ours - of_theirs).norm() / of_theirs.norm() < 1e-5


def test_likelihood_is_that_of_transformers(policy):
    rows = [Example([5, 6, 7], ([8, 9, 1],)), Example([5], ([10, 11, 12, 13, 1],))]
    loss, _ = NLL().loss(policy, rows)
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.prompt + row.completions[0]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(row.prompt), -100)
        expected += policy(input_ids=ids, labels=labels).loss.item() * len(row.completions[0])
    assert NLL().weight(rows) == 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)
