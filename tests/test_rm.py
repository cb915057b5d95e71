"""Reward model stage: what it learns from, what it leaves out, and how it is measured."""

import pytest
import torch

from reward.model import load_policy, load_reward
from stages import rm
from stages.config import UserError
from tests import tiny

TRAINER = {
    "max_steps": 40,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-2,
    "save_steps": 10,
    "logging_steps": 10,
}
KIND, RUDE = "We are sorry and send a new one.", "No, go away."


def judged(count=60, flip=False):
    """Kind beats rude, whichever comes first; every third with another strength, some ties, some held out."""
    rows = []
    for i in range(count):
        first, second = (KIND, RUDE) if i % 2 else (RUDE, KIND)
        better = 1 if (first == KIND) != flip else -1
        preference = better * (1 + i % 3) if i % 10 else 0
        rows.append(tiny.judgement(i, first, second, preference, "train" if i % 4 else "test"))
    return rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("policy"), "llama"))


def stage(path, policy, rows, gate="stop", **settings):
    run = tiny.run_in(path / "run", "rm", gate=gate)
    torch.manual_seed(0)
    config = rm.Config(
        policy=policy,
        judgements=tiny.rows_file(path / "judgements.jsonl", rows),
        **{"trainer": TRAINER} | settings,
    )
    rm.main(config, run)
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory, policy):
    return stage(tmp_path_factory.mktemp("rm"), policy, judged(120), gate="warn")


def test_it_learns_the_preference_and_is_measured_on_held_out_judgements(done):
    found = done.manifest.metrics
    held_out = [j for j in judged(120) if j.split == "test" and j.preference]
    assert found["held_out"] == len(held_out)
    assert found["accuracy"] == 1.0 and found["accuracy_low"] > 0.5
    assert found["longer_wins"] == 1.0 and found["bag_of_words"] == 1.0  # trivial judges see it as well
    assert not done.manifest.gates["reward model above chance"].passed  # so it is no better than they are
    assert done.manifest.facts["labelled_by"] == {"simulated": 90}


def test_it_trains_in_bf16_and_is_saved_as_it_scores_in_full_precision(tmp_path, policy):
    run = stage(tmp_path, policy, judged(24), gate="warn", trainer=TRAINER | {"bf16": True, "use_cpu": True})
    assert run.manifest.metrics["pairs"] and (run.path / "model").is_dir()


def test_the_saved_model_scores_kind_above_rude(done, policy):
    from reward.batch import Example
    from reward.tokens import completion_ids, prompt_ids, rewards

    model, tokenizer = load_reward(done.path / "model")
    rows = [tiny.judgement(1000 + i, KIND, RUDE, None) for i in range(5)]
    examples = [
        Example(prompt_ids(tokenizer, j.prompt), tuple(completion_ids(tokenizer, t) for t in j.completions))
        for j in rows
    ]
    assert all(kind > rude for kind, rude in rewards(model, examples))
    assert not hasattr(model, "thresholds") and model.config.num_labels == 1


def test_thresholds_are_kept_and_not_in_the_model(done):
    thresholds = done.manifest.facts["thresholds"]
    assert len(thresholds) == 4 and all(isinstance(t, float) for t in thresholds)


def test_strengths_that_never_occur_have_no_threshold(tmp_path, policy):
    rows = [tiny.judgement(i, KIND, RUDE, 1, "train" if i % 2 else "test") for i in range(8)]
    run = stage(tmp_path, policy, rows, gate="warn", trainer=TRAINER | {"max_steps": 2})
    thresholds = run.manifest.facts["thresholds"]
    assert thresholds[0] is None and thresholds[2:] == [None, None] and thresholds[1] is not None


def test_judgements_of_one_pair_become_one_example_with_counts(tmp_path, policy):
    _, tokenizer = load_policy(policy)
    rows = [tiny.judgement(1, KIND, RUDE, p) for p in (3, 3, 0, None)]
    rows += [tiny.judgement(2, KIND, RUDE, None), tiny.judgement(3, KIND + " word" * 40, RUDE, 1)]
    three = rows[0].model_copy(update={"completions": ["a", "b", "c"], "preference": None})
    run = tiny.run_in(tmp_path, "rm")
    (example,) = rm.comparisons(tokenizer, [*rows, three], 60, run)
    assert example.counts == (0, 0, 0, 1, 0, 0, 2)
    assert tokenizer.decode(example.completions[0]) == KIND + "<|end|>"
    dropped = {name: count for name, count in run.manifest.facts["dropped"].items() if count}
    assert dropped == {"too_long": 1, "no_verdict": 1, "not_a_pair": 1}
    assert run.manifest.facts["dropped_tasks"]["too_long"] == [rows[5].task]
    assert run.manifest.metrics["pairs"] == 1


def test_accuracy_below_chance_stops_the_run(tmp_path, policy):
    rows = [j for j in judged() if j.split == "train"] + [j for j in judged(flip=True) if j.split == "test"]
    with pytest.raises(
        UserError, match=r"reward model above chance: held-out accuracy 0.000 \[0\.\d+, 0\.\d+\]"
    ):
        stage(tmp_path, policy, rows)


def test_a_head_that_was_lost_on_the_way_is_noticed(policy):
    from reward.batch import Example
    from reward.model import new_reward_model

    one, other = (new_reward_model(policy)[0] for _ in range(2))
    rows = [Example([5, 6], ([7, 1], [8, 1]))]
    rm.check_reload(one, one, rows)
    with pytest.raises(UserError, match="does not score as the trained one did"):
        rm.check_reload(one, other, rows)
    with torch.no_grad():
        other.load_state_dict(one.state_dict())
        rm.check_reload(one, other, rows)
        other.score.weight[0, 0] *= 1 + 1e-6  # rounding: the same weights elsewhere in memory may do as much
    rm.check_reload(one, other, rows)


def test_nothing_to_train_on(tmp_path, policy):
    for rows in ([], [tiny.judgement(1, KIND, RUDE, None)], [tiny.judgement(1, KIND, RUDE, 1, "test")]):
        with pytest.raises(UserError, match="no comparison to train on"):
            stage(tmp_path, policy, rows)


def test_nothing_held_out_is_said(tmp_path, policy):
    rows = [j for j in judged() if j.split == "train"]
    run = stage(tmp_path, policy, rows, gate="warn", trainer=TRAINER | {"max_steps": 1})
    assert run.manifest.gates["reward model above chance"].message == "no held-out judgement to measure it on"


def test_only_ties_are_no_crash(tmp_path, policy):
    ties = [tiny.judgement(i, KIND, RUDE, 0) for i in range(6)]
    held_out = [tiny.judgement(i, KIND, RUDE, 1, "test") for i in range(10, 14)]
    run = stage(tmp_path, policy, ties + held_out, gate="warn", trainer=TRAINER | {"max_steps": 2})
    assert run.manifest.metrics["bag_of_words"] == 0.5
