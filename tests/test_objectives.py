"""Objectives: hand-worked, against TRL and transformers on the same model, and against one another."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from annotate.records import Message
from reward.batch import Example
from reward.model import load_policy, load_tokenizer
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages.dpo import PARAMETERS, REFERENCE_FREE
from stages.not_finite import not_finite
from stages.objectives import LOSSES, NLL, Direct, Judged, Pair
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


def judged(policy, reference=None, lengths=None, votes=(1.0, 0.0, 0.0), strength=1.0):
    """One example as the losses read it."""
    policy = torch.tensor([policy])
    return Judged(
        policy,
        torch.zeros_like(policy) if reference is None else torch.tensor([reference]),
        torch.ones_like(policy).long() if lengths is None else torch.tensor([lengths]),
        torch.tensor([votes]),
        torch.tensor([strength]),
    )


def value(name, x, **parameters):
    loss, _ = LOSSES[name](x, **PARAMETERS[name] | parameters)
    return loss.item()


def direct(name, sft_weight=0.0, **parameters):
    return Direct(name, PARAMETERS[name] | parameters, sft_weight)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_settings_offer_what_the_losses_take():
    taken = {name: set(inspect.signature(loss).parameters) - {"x"} for name, loss in LOSSES.items()}
    assert taken == {name: set(parameters) for name, parameters in PARAMETERS.items()}


def test_every_objective_is_derived_and_in_the_table():
    text = Path("stages/objectives.md").read_text()
    for name, parameters in PARAMETERS.items():
        assert f"\n## `{name}`" in text
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(f"`{key}` {default:g}" in row for key, default in parameters.items()), row


def test_dpo_by_hand():
    """Log-ratios 1 and -1, beta 0.1: margin 0.2, loss -log sigmoid(0.2)."""
    x = judged([-10.0, -12.0], [-11.0, -11.0])
    loss, rewards = LOSSES["sigmoid"](x, beta=0.1, label_smoothing=0.0, margin=0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.2)), rel=1e-6)
    assert rewards.tolist() == [pytest.approx([0.1, -0.1])]


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta sigmoid(-margin); Rafailov et al. 2023, the equation below 7."""
    x = judged([-10.0, -12.0], [-11.0, -11.0])
    x.policy.requires_grad_()
    LOSSES["sigmoid"](x, **PARAMETERS["sigmoid"])[0].sum().backward()
    slope = 0.1 / (1 + math.exp(0.2))
    assert x.policy.grad.tolist() == [pytest.approx([-slope, slope], rel=1e-6)]


def test_dpo_without_extras_is_the_plain_formula_to_the_last_bit():
    torch.manual_seed(0)
    x = judged([-1.0, -1.0])._replace(policy=30 * torch.randn(500, 2), reference=30 * torch.randn(500, 2))
    x.policy.requires_grad_()
    loss, _ = LOSSES["sigmoid"](x, **PARAMETERS["sigmoid"])
    rewards = 0.1 * (x.policy - x.reference)
    plain = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
    assert torch.equal(loss, plain)
    gradients = [torch.autograd.grad(one.sum(), x.policy, retain_graph=True)[0] for one in (loss, plain)]
    assert torch.equal(*gradients)


def test_label_smoothing_mixes_the_pair_with_its_flip():
    """cDPO: (1 - e) L(0.2) + e L(-0.2); robust: ((1 - e) L(0.2) - e L(-0.2)) / (1 - 2 e)."""
    x = judged([-10.0, -12.0], [-11.0, -11.0])
    kept, flipped = -math.log(sigmoid(0.2)), -math.log(sigmoid(-0.2))
    assert value("sigmoid", x, label_smoothing=0.1) == pytest.approx(0.9 * kept + 0.1 * flipped, rel=1e-6)
    assert value("robust", x) == pytest.approx((0.9 * kept - 0.1 * flipped) / 0.8, rel=1e-6)
    assert value("robust", x, label_smoothing=0.0) == pytest.approx(kept, rel=1e-6)


def test_robust_is_unbiased():
    """With flips at rate e the expected robust loss is the loss of the true label."""
    kept, flipped = judged([2.0, -1.0]), judged([-1.0, 2.0])
    expected = 0.8 * value("robust", kept, label_smoothing=0.2)
    expected += 0.2 * value("robust", flipped, label_smoothing=0.2)
    assert expected == pytest.approx(value("sigmoid", kept), rel=1e-5)


def test_a_stronger_verdict_asks_for_a_larger_margin():
    for strength in (1.0, 2.5):
        x = judged([1.0, -1.0], strength=strength)
        assert value("sigmoid", x, margin=0.3) == pytest.approx(-math.log(sigmoid(0.2 - 0.3 * strength)))
    assert value("sigmoid", x) == pytest.approx(-math.log(sigmoid(0.2)))


def test_hinge_and_ipo_by_hand():
    x = judged([-10.0, -12.0], [-11.0, -11.0], [2, 4])
    assert value("hinge", x) == pytest.approx(1 - 0.2)
    assert value("hinge", x, beta=10.0) == 0
    assert value("ipo", x) == pytest.approx((1 / 2 + 1 / 4 - 5) ** 2)
    assert value("sigmoid_norm", x) == pytest.approx(-math.log(sigmoid(5 * 0.75)), rel=1e-5)


def test_simpo_by_hand():
    """Mean log-probabilities -0.5 and -1, beta 2, gamma 1: -log sigmoid(0). The reference plays no part."""
    for reference in (None, [-3.0, -9.0]):
        x = judged([-2.0, -5.0], reference, [4, 5])
        assert value("simpo", x) == pytest.approx(math.log(2))
        assert value("simpo", x, gamma=0.0) == pytest.approx(-math.log(sigmoid(1.0)))


def test_orpo_by_hand():
    """Geometric means p = 0.5 and 0.2 of the tokens' probabilities: odds 1 and 1/4, ratio 4."""
    x = judged([3 * math.log(0.5), 2 * math.log(0.2)], [-3.0, -9.0], [3, 2])
    expected = math.log(2) - 0.1 * math.log(sigmoid(math.log(4)))
    assert value("orpo", x) == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(value("orpo", judged([0.0, -1e4])))


def test_ties_are_davidson():
    """Worths a = e^0.3, b = e^-0.3: a, b and tie sqrt(a b), over their sum; shares of verdicts weigh them."""
    a, b, tie = math.exp(0.3), math.exp(-0.3), 0.7
    total = a + b + tie
    for votes in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.3, 0.2)):
        x = judged([3.0, -3.0], votes=votes)
        log = sum(v * math.log(p / total) for v, p in zip(votes, (a, tie, b), strict=True))
        assert value("ties", x, tie=tie) == pytest.approx(-log, rel=1e-5)


def test_ties_without_ties_are_dpo():
    x = judged([3.0, -1.0])
    assert value("ties", x, tie=1e-30) == pytest.approx(value("sigmoid", x), rel=1e-5)


def test_a_tie_pulls_the_rewards_together():
    x = judged([3.0, -1.0], votes=(0.0, 1.0, 0.0))
    x.policy.requires_grad_()
    LOSSES["ties"](x, **PARAMETERS["ties"])[0].sum().backward()
    assert x.policy.grad[0, 0] > 0 > x.policy.grad[0, 1]  # descent lowers the higher


def test_plackett_luce_of_two_is_dpo():
    x = judged([-10.0, -12.0], [-11.0, -11.0])
    assert value("plackett_luce", x, beta=0.4) == pytest.approx(value("sigmoid", x, beta=0.4), rel=1e-6)


def test_plackett_luce_by_hand_and_padded():
    """Rewards 2, 1, 0: e^2 / (e^2 + e + 1) * e / (e + 1). A pair beside it is padded and unchanged."""
    e = math.e
    x = judged([2.0, 1.0, 0.0])
    assert value("plackett_luce", x, beta=1.0) == pytest.approx(
        -math.log(e**2 / (e**2 + e + 1) * e / (e + 1))
    )
    both = Judged(
        torch.tensor([[2.0, 1.0, 0.0], [3.0, 1.0, 0.0]], requires_grad=True),
        torch.zeros(2, 3),
        torch.tensor([[4, 4, 4], [4, 4, 0]]),
        torch.zeros(2, 3),
        torch.ones(2),
    )
    loss, _ = LOSSES["plackett_luce"](both, beta=1.0)
    pair = judged([3.0, 1.0])
    expected = [value("plackett_luce", one, beta=1.0) for one in (x, pair)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    loss.sum().backward()
    slope = sigmoid(-2)
    assert both.policy.grad[1].tolist() == pytest.approx([-slope, slope, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sigmoid", {"beta": 0.05}, math.log(2)),
        ("sigmoid", {"label_smoothing": 0.3}, math.log(2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("robust", {}, math.log(2)),
        ("hinge", {}, 1.0),
        ("ipo", {"beta": 0.2}, 1 / (4 * 0.2**2)),
        ("ties", {"tie": 2.0}, math.log(4)),
        ("plackett_luce", {}, math.log(2)),
    ],
)
def test_where_a_policy_that_is_its_reference_starts(folder, policy, name, parameters, expected):
    rows, objective = pairs(load_tokenizer(folder)[0], policy), direct(name, **parameters)
    loss, metrics = objective.loss(policy, rows)
    assert loss.item() / objective.weight(rows) == pytest.approx(expected, rel=1e-4)
    assert objective.start(rows) == pytest.approx(expected, rel=1e-6)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-3)
    assert metrics["logps_chosen_change"].item() == pytest.approx(0, abs=1e-4)


def test_a_tie_is_half_right(folder, policy, reference):
    rows = [replace(pair, strength=0.0) for pair in pairs(load_tokenizer(folder)[0], reference)]
    assert direct("ties").loss(policy, rows)[1]["accuracy"] == 1.5


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_without_a_reference_no_change_is_logged(folder, policy, reference, name):
    rows = [Pair(row.prompt, row.completions) for row in pairs(load_tokenizer(folder)[0], reference)]
    loss, metrics = direct(name).loss(policy, rows)
    assert math.isfinite(loss.item())
    assert {"logps_chosen", "logps_rejected"} <= metrics.keys() and "logps_chosen_change" not in metrics


def test_a_loss_that_is_not_finite_is_put_down_to_its_task(folder, policy, reference):
    good, bad, other = pairs(load_tokenizer(folder)[0], reference)
    bad = Pair(bad.prompt, bad.completions, (math.nan, 0.0), task="here")
    assert not_finite(direct("sigmoid"), policy, [good, bad, other]) == ["here"]


def test_of_a_tie_no_reply_is_held_up(folder, policy, reference):
    tie = replace(pairs(load_tokenizer(folder)[0], reference)[0], votes=(0.5, 0.0, 0.5), strength=0.0)
    other_way = replace(tie, completions=tie.completions[::-1], reference=tie.reference[::-1])
    objective = direct("ties", sft_weight=1.0)
    one, other = (objective.loss(policy, [row])[0].item() for row in (tie, other_way))
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "sft_weight", "size"),
    [
        ("sigmoid", {"beta": 0.3}, 0.0, 3),
        ("sigmoid_norm", {"beta": 2.0}, 0.0, 3),
        ("hinge", {"beta": 0.01}, 0.0, 3),
        ("ipo", {"beta": 0.3}, 0.0, 3),
        ("robust", {"beta": 0.3, "label_smoothing": 0.2}, 0.0, 3),
        ("sigmoid", {"beta": 0.3}, 0.7, 1),
        ("ipo", {"beta": 0.3}, 0.7, 1),
    ],
)
def test_it_is_that_of_trl(folder, policy, reference, tmp_path, name, parameters, sft_weight, size):
    """Loss and gradient. TRL's `sft` weighs the tokens of a batch alike, ours the pairs: one pair a batch."""
    tokenizer, _ = load_tokenizer(folder)
    types = {"loss_type": [name, "sft"], "loss_weights": [1.0, sft_weight]} if sft_weight else {}
    trainer = of_trl(folder, policy, reference, tmp_path, size, {"loss_type": [name]} | types | parameters)
    policy.zero_grad()
    theirs = sum(trainer.compute_loss(policy, batch) for batch in trainer.get_train_dataloader()) * size / 3
    theirs.backward()
    of_theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    objective, rows = direct(name, sft_weight, **parameters), pairs(tokenizer, reference)
    policy.zero_grad()
    loss = objective.loss(policy, rows)[0] / objective.weight(rows)
    loss.backward()
    of_ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(theirs.item() - objective.start(rows)) > 0.01
    assert (of_ours - of_theirs).norm() / of_theirs.norm() < 1e-5


def of_trl(folder, policy, reference, path, size, settings):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": f"My {word} broke."}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for word, (chosen, rejected) in zip(("lamp", "pan", "clock"), TEXTS, strict=True)
    ]
    args = DPOConfig(
        output_dir=str(path),
        per_device_train_batch_size=size,
        report_to="none",
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder)[0],
    )


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
