"""Comparisons that share completions: one example, with the loss and the gradient that they have apart."""

import pytest
import torch

from reward.batch import Example
from reward.losses import Comparison, PreferenceLikelihood
from reward.model import load_policy, new_reward_model
from reward.together import Together, each_once, of_parts, parts, together
from stages.dpo import PARAMETERS
from stages.objectives import Direct, Pair
from tests import tiny

REPLIES = ([7, 1], [8, 9, 1], [10, 11, 12, 1], [13, 1])
EDGES = [(0, 1), (2, 3), (1, 2), (0, 3)]
COUNTS = [(0, 0, 2, 1, 0, 0, 1), (1, 0, 0, 0, 2, 0, 0), (0, 0, 1, 0, 0, 1, 0), (0, 0, 0, 1, 3, 0, 0)]
OTHER = Comparison([5], ([7, 1], [8, 1]), (0, 0, 1, 0, 3, 0, 0), "other")


def compared():
    """Four pairs of four replies to a prompt, and in their midst a pair of another prompt."""
    pairs = [
        Comparison([5, 6, 4], (REPLIES[i], REPLIES[j]), counts, f"{i}{j}")
        for (i, j), counts in zip(EDGES, COUNTS, strict=True)
    ]
    return [pairs[0], pairs[1], OTHER, *pairs[2:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("together"), "llama")


def test_pairs_that_completions_link_are_one_example():
    group, other = together(compared())
    assert isinstance(group, Together) and other is OTHER
    assert [part.task for part in group.parts] == ["01", "23", "12", "03"]
    assert list(group.completions) == list(REPLIES) and group.prompt == [5, 6, 4]
    assert [part.task for part in parts([other, group])] == ["other", "01", "23", "12", "03"]


def test_nothing_together_is_nothing():
    assert together([]) == []


def test_pairs_of_one_prompt_that_share_nothing_stay_apart():
    apart = [Comparison([5], (REPLIES[i], REPLIES[i + 1]), COUNTS[0]) for i in (0, 2)]
    assert together(apart) == apart
    values = torch.arange(4.0)
    assert of_parts(apart, values) is values


def test_values_go_to_every_part():
    group, other = together(compared())
    found = of_parts([other, group], torch.arange(6.0))
    assert found.tolist() == [0, 1, *(2.0 + i for edge in EDGES for i in edge)]


def losses(objective, model, examples):
    model.zero_grad()
    loss, metrics = objective.loss(model, examples)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), grads, {name: float(value) for name, value in metrics.items()}


def same(objective, model, apart):
    """Loss, gradient and metrics are those of the pairs apart; the weight too."""
    one = together(apart)
    assert objective.weight(one) == objective.weight(apart) and len(one) < len(apart)
    for joint, alone in zip(losses(objective, model, one), losses(objective, model, apart), strict=True):
        if isinstance(joint, dict):
            assert joint == pytest.approx(alone, rel=1e-4)
        else:
            torch.testing.assert_close(joint, alone, rtol=1e-4, atol=1e-5)


def test_a_reward_model_learns_the_same_from_them(folder):
    torch.manual_seed(0)
    model = new_reward_model(folder)[0]
    same(PreferenceLikelihood(model, compared()), model, compared())


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "ties", "simpo"])
def test_a_policy_learns_the_same_from_them(folder, name):
    model = load_policy(folder)[0]
    pairs = [
        Pair(c.prompt, c.completions, (-3.0, -2.5), (0.5, 0.25, 0.25), 1.0 + i, c.task)
        for i, c in enumerate(compared())
    ]
    same(Direct(name, PARAMETERS[name], sft_weight=0.3), model, pairs)


def test_what_comes_again_is_computed_once():
    seen = []

    def work(examples):
        seen.extend(examples)
        return [[float(sum(completion)) for completion in example.completions] for example in examples]

    found = each_once(compared(), work)
    assert found == [[sum(c) for c in example.completions] for example in compared()]
    assert seen == [Example([5, 6, 4], REPLIES), Example([5], OTHER.completions)]
