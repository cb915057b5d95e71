"""DPO stage: which side is chosen, where it starts, that it learns, and that it can be continued."""

import math

import pytest

from reward.batch import Example
from reward.model import load_policy
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages import dpo
from stages.config import UserError
from stages.objectives import DPO
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
    run = tiny.run_in(path, "dpo")
    judgements = tiny.rows_file(path.parent / "judgements.jsonl", rows)
    dpo.main(dpo.Config(policy=policy, judgements=judgements, **{"trainer": TRAINER} | settings), run)
    return run


def test_it_starts_at_ln_2_and_learns_the_preference(tmp_path, policy):
    run = stage(tmp_path / "run", policy, judged())
    assert run.manifest.metrics["first_batch_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.manifest.metrics["pairs_trained"] == 24
    trained, tokenizer = load_policy(tmp_path / "run/model")
    start, _ = load_policy(policy)
    prompt = prompt_ids(tokenizer, tiny.records(3)[2].prompt)
    rows = [Example(prompt, tuple(completion_ids(tokenizer, text) for text in (KIND, RUDE)))]

    def margin(model):
        ((kind, rude),) = logprobs(model, rows)
        return sum(kind) - sum(rude)

    assert margin(trained) > margin(start) + 5
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert lines.count('"accuracy"') == 12 and '"margin"' in lines and '"logps_chosen_change"' in lines


def test_resumed_is_bitwise_uninterrupted(tmp_path, policy, monkeypatch):
    from stages.engine import Reporting

    stage(tmp_path / "straight", policy, judged())
    real = Reporting.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporting, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", policy, judged())
    assert (tmp_path / "cut/checkpoints/checkpoint-4/complete").exists()
    stage(tmp_path / "cut", policy, judged())
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_the_side_preferred_on_average_is_chosen(tmp_path, policy):
    model, tokenizer = load_policy(policy)
    rows = [tiny.judgement(1, KIND, RUDE, p) for p in (1, 1, -3)]  # leans to the second
    rows += [tiny.judgement(2, KIND, RUDE, p) for p in (2, -1, None)]  # leans to the first
    rows += [tiny.judgement(3, KIND, RUDE, p) for p in (2, -2)]  # a tie
    run = tiny.run_in(tmp_path)
    pairs = dpo.preference_pairs(model, tokenizer, rows, 128, run)
    kind, rude = (completion_ids(tokenizer, text) for text in (KIND, RUDE))
    chosen = {tuple(pair.prompt): pair.completions for pair in pairs}
    asked = [tuple(prompt_ids(tokenizer, rows[i].prompt)) for i in (0, 3)]
    assert chosen == {asked[0]: (rude, kind), asked[1]: (kind, rude)}
    assert run.manifest.metrics["pairs_trained"] == 2
    for pair, (first, second) in zip(pairs, logprobs(model, pairs), strict=True):
        assert pair.reference == (pytest.approx(sum(first)), pytest.approx(sum(second)))


def test_a_wrong_reference_is_noticed(tmp_path, policy):
    model, tokenizer = load_policy(policy)
    other = tiny.model_of("llama", tiny.tokenizer_of(), seed=9)
    run = tiny.run_in(tmp_path)
    good = dpo.preference_pairs(model, tokenizer, judged(), 128, run)
    dpo.check_first_batch(model, DPO(0.1), good[:8], run)
    bad = dpo.preference_pairs(other, tokenizer, judged(), 128, run)
    with pytest.raises(UserError, match=r"first batch has loss .*, not ln 2: policy and reference differ"):
        dpo.check_first_batch(model, DPO(0.1), bad[:8], run)


def test_the_reference_of_a_folder_without_pad_token_is_the_policy(tmp_path):
    """What is added at loading is the same each time."""
    folder = str(tiny.save_folder(tmp_path, "no_pad"))
    run = stage(tmp_path / "run", folder, judged(), trainer=TRAINER | {"max_steps": 1})
    assert run.manifest.metrics["first_batch_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_only_ties(tmp_path, policy):
    with pytest.raises(UserError, match="every judgement is a tie"):
        stage(tmp_path / "run", policy, [tiny.judgement(1, KIND, RUDE, 0)])
    with pytest.raises(UserError, match="no comparison to train on"):
        stage(tmp_path / "run", policy, [tiny.judgement(1, KIND, RUDE, 1, "validation")])
