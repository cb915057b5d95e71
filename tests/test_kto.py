"""KTO stage: which replies are good, where it starts, that it learns, and that it can be continued."""

import json
from types import SimpleNamespace

import pytest

from reward.batch import Example
from reward.model import load_policy
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages import kto
from stages.config import UserError
from tests import tiny

KIND, RUDE = "We are sorry and send a new one.", "No, go away."
TRAINER = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "save_steps": 4,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("policy"), "llama"))


def judged(count=24):
    return [
        tiny.judgement(i, *((KIND, RUDE, 1 + i % 3) if i % 2 else (RUDE, KIND, -1 - i % 3)))
        for i in range(count)
    ]


def stage(path, policy, rows, **settings):
    run = tiny.run_in(path, "kto")
    judgements = tiny.rows_file(path.parent / "judgements.jsonl", rows)
    kto.main(kto.Config(policy=policy, judgements=judgements, **{"trainer": TRAINER} | settings), run)
    return run


def logged(path):
    """All but TRL's count of tokens, which begins anew."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "num_tokens"} for line in lines]


def test_it_starts_at_one_half_and_learns_what_is_good(tmp_path, policy):
    run = stage(tmp_path / "run", policy, judged())
    lines = logged(tmp_path / "run")
    assert len(lines) == 12 and lines[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert run.manifest.metrics["rows"] == 48 and run.manifest.metrics["ties"] == 0
    trained, tokenizer = load_policy(tmp_path / "run/model")
    start, _ = load_policy(policy)
    prompt = prompt_ids(tokenizer, tiny.records(3)[2].prompt)
    rows = [Example(prompt, tuple(completion_ids(tokenizer, text) for text in (KIND, RUDE)))]

    def margin(model):
        ((kind, rude),) = logprobs(model, rows)
        return sum(kind) - sum(rude)

    assert margin(trained) > margin(start) + 5


def test_the_side_preferred_on_average_is_good_and_ties_are_counted(tmp_path, policy):
    _, tokenizer = load_policy(policy)
    rows = [tiny.judgement(1, KIND, RUDE, p) for p in (1, 1, -3)]  # leans to the second
    rows += [tiny.judgement(2, KIND, RUDE, p) for p in (2, -1, None)]  # leans to the first
    rows += [tiny.judgement(3, KIND, RUDE, p) for p in (2, -2)]  # a tie
    run = tiny.run_in(tmp_path)
    made = kto.unpaired(tokenizer, rows, 128, run)
    kind, rude = (completion_ids(tokenizer, text) for text in (KIND, RUDE))
    first, second = (prompt_ids(tokenizer, rows[i].prompt) for i in (0, 3))
    found = {(tuple(r["prompt_ids"]), tuple(r["completion_ids"])): r["label"] for r in made}
    assert found == {
        (tuple(first), tuple(kind)): False,
        (tuple(first), tuple(rude)): True,
        (tuple(second), tuple(kind)): True,
        (tuple(second), tuple(rude)): False,
    }
    assert run.manifest.metrics["ties"] == 1 and run.manifest.metrics["rows"] == 4
    assert all(row["completion_ids"][-1] == tokenizer.eos_token_id for row in made)


def test_kl_is_taken_from_the_neighbour_in_the_batch():
    rows = [{"prompt_ids": [i], "completion_ids": [10 + i], "label": True} for i in range(10)]
    made = kto.arranged(rows, SimpleNamespace(seed=0, per_device_train_batch_size=4))
    assert sorted(row["prompt_ids"] for row in made) == [[i] for i in range(10)]
    assert [row["prompt_ids"] for row in made] != [[i] for i in range(10)]
    for start in (0, 4, 8):
        batch = made[start : start + 4]
        replies = [row["completion_ids"] for row in batch]
        assert [row["KL_completion_ids"] for row in batch] == replies[-1:] + replies[:-1]


def test_resumed_is_bitwise_uninterrupted(tmp_path, policy, monkeypatch):
    from stages.engine import Reporting

    stage(tmp_path / "straight", policy, judged())
    real = Reporting.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 9:  # in the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporting, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", policy, judged())
    assert (tmp_path / "cut/checkpoints/checkpoint-8/complete").exists()
    stage(tmp_path / "cut", policy, judged())
    weights = "model/model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert logged(tmp_path / "cut") == logged(tmp_path / "straight")


def test_a_folder_without_pad_token(tmp_path):
    folder = str(tiny.save_folder(tmp_path, "no_pad"))
    stage(tmp_path / "run", folder, judged(), trainer=TRAINER | {"max_steps": 1})
    assert logged(tmp_path / "run")[0]["loss"] == pytest.approx(0.5, abs=1e-4)


def test_only_ties(tmp_path, policy):
    with pytest.raises(UserError, match="every judgement is a tie"):
        stage(tmp_path / "run", policy, [tiny.judgement(1, KIND, RUDE, 0)])
    with pytest.raises(UserError, match="no comparison to train on"):
        stage(tmp_path / "run", policy, [tiny.judgement(1, KIND, RUDE, 1, "validation")])
