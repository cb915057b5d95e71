"""Preference losses against hand-worked numbers and the models they contain."""

import math

import pytest
import torch
import torch.nn.functional as F

from reward.losses import (
    Comparison,
    PreferenceLikelihood,
    count_preferences,
    initial_thresholds,
    preference_logprobs,
    preference_loss,
)
from reward.model import new_reward_model
from tests import tiny

INF = math.inf
DIFFERENCES = torch.tensor([-3.0, -0.4, 0.0, 0.7, 2.0])


def counts(**given):
    """counts(m1=2, tie=1, p3=1): how often -1, 0 and 3 were given."""
    names = ("m3", "m2", "m1", "tie", "p1", "p2", "p3")
    return torch.tensor([[float(given.get(name, 0)) for name in names]])


def test_hand_worked():
    """Thresholds 0 and d = 2: weights exp(y) for y = -3..3, so P(3) = e^3 / (sum of e^-3 .. e^3)."""
    total = sum(math.exp(y) for y in range(-3, 4))
    logp = preference_logprobs(torch.tensor([2.0]), torch.zeros(4))
    assert logp[0].exp().tolist() == pytest.approx([math.exp(y) / total for y in range(-3, 4)], rel=1e-6)
    loss = preference_loss(torch.tensor([2.0]), counts(p3=2, m1=1), torch.zeros(4))
    assert loss.item() == pytest.approx(-2 * (3 - math.log(total)) - (-1 - math.log(total)), rel=1e-6)


def test_with_one_strength_it_is_bradley_terry():
    thresholds = torch.tensor([-INF, 0.3, -INF, -INF])
    first = preference_loss(DIFFERENCES, counts(p1=1).expand(5, 7), thresholds)
    second = preference_loss(DIFFERENCES, counts(m1=1).expand(5, 7), thresholds)
    torch.testing.assert_close(first, -F.logsigmoid(DIFFERENCES))
    torch.testing.assert_close(second, -F.logsigmoid(-DIFFERENCES))


def test_with_ties_it_is_davidson():
    """P(tie) = nu sqrt(a b) / (a + b + nu sqrt(a b)) with worths a = e^r; nu = exp(t0 - t1)."""
    thresholds = torch.tensor([0.5, -0.2, -INF, -INF])
    nu = math.exp(0.7)
    a, b = torch.exp(DIFFERENCES + 1.0), torch.exp(torch.ones(5))
    total = a + b + nu * (a * b).sqrt()
    logp = preference_logprobs(DIFFERENCES, thresholds).exp()
    torch.testing.assert_close(logp[:, 3], nu * (a * b).sqrt() / total)
    torch.testing.assert_close(logp[:, 4], a / total)
    torch.testing.assert_close(logp[:, 2], b / total)


def test_probabilities_sum_to_one_and_mirror():
    thresholds = torch.tensor([0.1, 0.4, -0.3, -1.0])
    p = preference_logprobs(DIFFERENCES, thresholds).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    torch.testing.assert_close(p, preference_logprobs(-DIFFERENCES, thresholds).exp().flip(1))


def test_the_gradient_pulls_up_the_preferred_side_more_for_a_stronger_verdict():
    gradients = []
    for given in (counts(tie=1), counts(p1=1), counts(p3=1)):
        difference = torch.zeros(1, requires_grad=True)
        preference_loss(difference, given, torch.zeros(4)).sum().backward()
        gradients.append(difference.grad.item())
    assert gradients == pytest.approx([0.0, -0.5, -1.5], abs=1e-6)  # E[y]/2 - y/2 with E[y] = 0


def test_loss_and_gradient_are_finite_with_strengths_that_never_occur():
    difference = torch.tensor([1.0], requires_grad=True)
    thresholds = torch.tensor([-INF, 0.0, -INF, 0.2])
    preference_loss(difference, counts(p1=1), thresholds).sum().backward()
    assert torch.isfinite(difference.grad).all()


def test_counts_leave_out_judgements_without_a_verdict():
    rows = [tiny.judgement(0, "a", "b", p) for p in (3, 3, 0, -1, None)]
    assert count_preferences(rows) == (0, 0, 1, 1, 0, 0, 2)


def test_initial_thresholds_are_log_frequencies_per_side():
    rows = [
        Comparison([1], ([2], [3]), (0, 0, 2, 1, 0, 0, 1)),
        Comparison([1], ([2], [3]), (0, 0, 1, 0, 3, 0, 0)),
    ]
    expected = [math.log(1 / 8), math.log(6 / 2 / 8), -INF, math.log(1 / 2 / 8)]
    assert initial_thresholds(rows).tolist() == pytest.approx(expected)


def test_initial_thresholds_give_the_observed_frequencies_to_equal_rewards():
    rows = [Comparison([1], ([2], [3]), (1, 2, 3, 4, 5, 6, 7))]
    p = preference_logprobs(torch.zeros(1), initial_thresholds(rows)).exp()[0]
    assert p[3].item() == pytest.approx(4 / 28) and (p[0] + p[6]).item() == pytest.approx(8 / 28)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return new_reward_model(tiny.save_folder(tmp_path_factory.mktemp("rm"), "llama"))[0]


def test_objective_is_the_likelihood_of_the_scores(model):
    from reward.tokens import rewards

    examples = [
        Comparison([5, 6], ([7, 1], [8, 9, 1]), (0, 0, 2, 1, 0, 0, 1)),
        Comparison([5], ([7, 1], [8, 1]), (0, 0, 1, 0, 3, 0, 0)),
    ]
    objective = PreferenceLikelihood(model, examples)
    loss, metrics = objective.loss(model, examples)
    difference = torch.tensor([a - b for a, b in rewards(model, examples)])
    given = torch.tensor([e.counts for e in examples], dtype=torch.float32)
    expected = preference_loss(difference, given, initial_thresholds(examples)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.weight(examples) == 8
    wins = [(2, 1), (1, 3)]
    right = sum(w[1] if d > 0 else w[0] for w, d in zip(wins, difference.tolist(), strict=True))
    assert metrics["accuracy"].item() / 8 == pytest.approx(right / 7)
    loss.backward()
    assert torch.isfinite(model.thresholds.grad).all() and model.thresholds.grad[2] == 0
    kept = objective.detach(model)
    assert kept[2] is None and kept[0] == pytest.approx(math.log(1 / 8)) and not hasattr(model, "thresholds")
