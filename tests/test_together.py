"""Comparisons that share completions: one example, with the loss and the gradient that they have apart."""

import math
from dataclasses import replace

import pytest
import torch

from reward.batch import Example
from reward.losses import Comparison, PreferenceLikelihood
from reward.model import load_policy, new_reward_model
from reward.paths import choose
from reward.together import Together, each_once, of_parts, parts, together
from stages.dpo import PARAMETERS
from stages.not_finite import not_finite
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


def same(objective, model, apart, shortcuts):
    """Loss, gradient and metrics are those of the pairs apart; the weight too."""
    alone = losses(objective, model, apart)
    one = together(apart)
    assert objective.weight(one) == objective.weight(apart) and len(one) < len(apart)
    if shortcuts:
        path = choose(model, one)
        assert path.shares and path.padding_free and path.layers
    for joint, of_parts_alone in zip(losses(objective, model, one), alone, strict=True):
        if isinstance(joint, dict):
            assert joint == pytest.approx(of_parts_alone, rel=1e-3)
        else:
            torch.testing.assert_close(joint, of_parts_alone, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shortcuts", [False, True])
def test_a_reward_model_learns_the_same_from_them(folder, shortcuts):
    torch.manual_seed(0)
    model = new_reward_model(folder)[0]
    same(PreferenceLikelihood(model, compared()), model, compared(), shortcuts)


def judged():
    return [
        Pair(c.prompt, c.completions, (-3.0, -2.5), (0.5, 0.25, 0.25), 1.0 + i, c.task)
        for i, c in enumerate(compared())
    ]


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_policy_learns_the_same_from_them(folder, name, shortcuts):
    same(Direct(name, PARAMETERS[name], sft_weight=0.3), load_policy(folder)[0], judged(), shortcuts)


def test_what_is_not_finite_stays_with_its_own(folder):
    model = load_policy(folder)[0]
    pairs = judged()
    pairs[1] = replace(pairs[1], reference=(math.nan, 0.0))
    assert not_finite(Direct("sigmoid", PARAMETERS["sigmoid"]), model, together(pairs)) == ["23"]
    values = torch.tensor([0.0, math.inf, 2.0, 3.0, 4.0, 5.0])
    assert of_parts(together(compared()), values).isfinite().sum() == 8


def test_what_is_long_is_cut():
    """A chain of 30 pairs, each sharing a reply with the next."""
    chain = [Comparison([5], ([10 + i, 1], [11 + i, 1]), COUNTS[0], str(i)) for i in range(30)]
    groups = together(chain)
    assert parts(groups) == chain and [len(group.completions) for group in groups] == [9, 9, 9, 7]
    seen = []

    def work(examples):
        seen.extend(examples)
        return [[completion[0] for completion in example.completions] for example in examples]

    assert each_once(chain, work) == [[10 + i, 11 + i] for i in range(30)]
    assert [len(example.completions) for example in seen] == [9, 9, 9, 4]


def test_what_comes_again_is_computed_once():
    seen = []

    def work(examples):
        seen.extend(examples)
        return [[float(sum(completion)) for completion in example.completions] for example in examples]

    found = each_once(compared(), work)
    assert found == [[sum(c) for c in example.completions] for example in compared()]
    assert seen == [Example([5, 6, 4], REPLIES), Example([5], OTHER.completions)]
