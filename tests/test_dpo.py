"""DPO stage: what it learns from, where it starts, that it learns, stops and can be continued."""

import json
import math

import numpy
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from reward.batch import Example
from reward.model import load_policy
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages import dpo
from stages.config import UserError
from stages.held_out import HeldOut, drift, falls
from stages.objectives import Direct
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


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Where the reference's log-probabilities are kept."""
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


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


def config(policy, **settings):
    return dpo.Config(policy=policy, judgements="none", **settings)


def pairs_of(policy, tokenizer, rows, run, limit=128, **settings):
    return dpo.judged_pairs(config(policy, **settings), tokenizer, rows, limit, run)


LEANING = [tiny.judgement(1, KIND, RUDE, p) for p in (1, 1, -3)]  # to the second
LEANING += [tiny.judgement(2, KIND, RUDE, p) for p in (2, -1, None)]  # to the first
LEANING += [tiny.judgement(3, KIND, RUDE, p) for p in (2, -2, 0)]  # a tie


def test_the_side_preferred_on_average_is_chosen(tmp_path, policy):
    model, tokenizer = load_policy(policy)
    run = tiny.run_in(tmp_path)
    pairs = dpo.with_reference(model, policy, pairs_of(policy, tokenizer, LEANING, run), run)
    kind, rude = (completion_ids(tokenizer, text) for text in (KIND, RUDE))
    found = {tuple(pair.prompt): (pair.completions, pair.votes, pair.strength) for pair in pairs}
    asked = [tuple(prompt_ids(tokenizer, LEANING[i].prompt)) for i in (0, 3)]
    assert found == {
        asked[0]: ((rude, kind), (1 / 3, 0, 2 / 3), 1 / 3),
        asked[1]: ((kind, rude), (1 / 2, 0, 1 / 2), 1 / 2),
    }
    assert {pair.task for pair in pairs} == {LEANING[0].task, LEANING[3].task}
    assert run.manifest.metrics["ties_left_out"] == 1
    for pair, (first, second) in zip(pairs, logprobs(model, pairs), strict=True):
        assert pair.reference == (pytest.approx(sum(first)), pytest.approx(sum(second)))


def test_the_objective_ties_keeps_them(tmp_path, policy):
    _, tokenizer = load_policy(policy)
    run = tiny.run_in(tmp_path)
    pairs = pairs_of(policy, tokenizer, LEANING, run, objective="ties")
    (tie,) = [pair for pair in pairs if pair.strength == 0]
    assert len(pairs) == 3 and tie.votes == (1 / 3, 1 / 3, 1 / 3)
    assert run.manifest.metrics["ties_left_out"] == 0


def test_rankings_are_best_first_by_mean_rank(tmp_path, policy):
    _, tokenizer = load_policy(policy)

    def ranked(i, *rankings, texts=("a", "b", "c")):
        row = tiny.judgement(i, "x", "y", None)
        return [row.model_copy(update={"completions": list(texts), "ranking": r}) for r in rankings]

    rows = ranked(1, [3, 1, 2], [2, 1, 3], [3, 2, 1])  # sums 8, 4, 6
    rows += ranked(2, [1, 2, 3], [2, 1, 3])  # a and b are level
    rows += ranked(3, None) + ranked(4, [1, 2, 3], texts=("a", "a", "b"))
    rows += [tiny.judgement(5, KIND, RUDE, -2)]
    run = tiny.run_in(tmp_path)
    pairs = pairs_of(policy, tokenizer, rows, run, objective="plackett_luce")
    texts = [[tokenizer.decode(ids[:-1]) for ids in pair.completions] for pair in pairs]
    assert sorted(texts) == [[RUDE, KIND], ["b", "c", "a"]]
    dropped = {name: count for name, count in run.manifest.facts["dropped"].items() if count}
    assert dropped == {"tied": 1, "no_verdict": 1, "identical": 1}
    assert run.manifest.facts["dropped_tasks"]["tied"] == [rows[3].task]


def test_what_cannot_be_learned_from_is_counted_and_named(tmp_path, policy, capsys):
    _, tokenizer = load_policy(policy)
    rows = [
        tiny.judgement(0, KIND, RUDE, 1),
        tiny.judgement(1, KIND, KIND, 1),
        tiny.judgement(2, "", RUDE, 1),
    ]
    rows += [tiny.judgement(3, KIND + " word" * 40, RUDE, 1)]
    long = rows[0].model_copy(
        update={"prompt": [rows[0].prompt[0].model_copy(update={"content": "my lamp " * 90})]}
    )
    run = tiny.run_in(tmp_path)
    pairs = pairs_of(policy, tokenizer, [*rows, long], run, limit=60)
    assert {pair.task for pair in pairs} == {rows[0].task, rows[2].task}
    assert run.manifest.facts["dropped_tasks"] == {
        "prompt_too_long": [long.task],
        "too_long": [rows[3].task],
        "identical": [rows[1].task],
    }
    assert run.manifest.metrics["empty_replies"] == 1
    said = capsys.readouterr()
    assert all(row.task in said.out + said.err for row in (long, rows[1], rows[2]))


def test_a_wrong_reference_is_noticed(tmp_path, policy):
    model, tokenizer = load_policy(policy)
    other = tiny.model_of("llama", tiny.tokenizer_of(), seed=9)
    run = tiny.run_in(tmp_path)
    plain = pairs_of(policy, tokenizer, judged(), run)
    good, bad = (dpo.with_reference(one, policy, plain, run) for one in (model, other))
    assert good == bad, "the same folder counts, which is why the first batch is checked"
    (tmp_path / "runs/.reference").rename(tmp_path / "away")
    bad = dpo.with_reference(other, policy, plain, run)
    for name in ("sigmoid", "ipo", "hinge"):
        objective = Direct(name, dpo.PARAMETERS[name])
        dpo.check_first_batch(model, objective, good[:8], run)
        with pytest.raises(UserError, match=r"first batch has loss .*, not .*: policy and reference differ"):
            dpo.check_first_batch(model, objective, bad[:8], run)


def test_a_reference_that_is_not_finite_is_put_down_to_its_task(tmp_path, policy):
    model, tokenizer = load_policy(policy)
    run = tiny.run_in(tmp_path)
    pairs = pairs_of(policy, tokenizer, judged(4), run)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=f"task {pairs[0].task}: its replies have log-probabilities"):
        dpo.with_reference(model, policy, pairs, run)
    free = Direct("simpo", dpo.PARAMETERS["simpo"])
    with pytest.raises(UserError, match=f"not finite: .*{pairs[1].task}"):
        dpo.check_first_batch(model, free, pairs, run)
    assert not (tmp_path / "runs").exists()


def test_the_reference_is_computed_once(tmp_path, policy, runs):
    rows = judged()
    short = TRAINER | {"max_steps": 3}  # one pass
    first = stage(tmp_path / "first", policy, rows, trainer=short)
    again = stage(tmp_path / "again", policy, rows, trainer=short, objective="ipo", beta=0.3)
    fewer = stage(tmp_path / "fewer", policy, rows[:20], trainer=short)
    computed = [run.manifest.metrics.get("reference_computed") for run in (first, again, fewer)]
    assert computed == [48, None, 40]
    (one, _) = files = sorted((runs / ".reference").glob("*"))
    assert all(file.suffix == ".npy" for file in files)
    numpy.save(tmp_path / "short.npy", numpy.zeros(47))
    for broken in (b"", b"nothing of it", one.read_bytes()[:-8], (tmp_path / "short.npy").read_bytes()):
        for file in files:
            file.write_bytes(broken)
        run = stage(tmp_path / f"mended-{len(broken)}", policy, rows, trainer=short)
        assert run.manifest.metrics["reference_computed"] == 48
        assert run.manifest.metrics["first_batch_loss"] == first.manifest.metrics["first_batch_loss"]
    free = stage(tmp_path / "free", policy, rows, trainer=short, objective="orpo")
    assert "reference_computed" not in free.manifest.metrics


def test_the_reference_is_asked_for_the_pairs_that_training_comes_to(tmp_path, policy):
    short = TRAINER | {"max_steps": 2, "lr_scheduler_type": "constant"}
    part = stage(tmp_path / "part", policy, judged(), trainer=short)
    whole = stage(tmp_path / "whole", policy, judged(), trainer=short | {"max_steps": 3})
    assert [run.manifest.metrics["pairs_trained"] for run in (part, whole)] == [16, 24]
    assert [run.manifest.metrics["reference_computed"] for run in (part, whole)] == [32, 48]
    of_part, of_whole = (
        [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        for run in (part, whole)
    )
    for found, expected in zip(of_part, of_whole[:2], strict=True):
        assert found["margin"] == pytest.approx(expected["margin"], abs=1e-4)


@pytest.mark.parametrize("objective", dpo.PARAMETERS)
def test_every_objective_learns_the_preference(tmp_path, policy, objective):
    rows = judged() + [tiny.judgement(100 + i, KIND, RUDE, 1, "validation") for i in range(4)]
    run = stage(tmp_path / "run", policy, rows, objective=objective, sft_weight=0.1)
    found = run.manifest.metrics
    assert found["held_out_accuracy"] == 1 and found["held_out_margin"] > 0 and found["held_out_pairs"] == 4
    assert run.manifest.facts["parameters"] == dpo.PARAMETERS[objective]


@pytest.mark.parametrize("peft", [{}, {"r": 4, "use_dora": True}, {"peft_type": "ia3"}])
def test_adapters_are_trained_and_merged(tmp_path, policy, peft):
    run = stage(tmp_path / "run", policy, judged(), peft=peft, trainer=TRAINER | {"learning_rate": 0.05})
    assert run.manifest.metrics["first_batch_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert not list((tmp_path / "run").rglob("adapter*"))
    (trained, tokenizer), (start, _) = load_policy(tmp_path / "run/model"), load_policy(policy)
    assert trained.state_dict().keys() == start.state_dict().keys() and not tiny.same_weights(trained, start)
    rows = [Example(prompt_ids(tokenizer, judged()[1].prompt), (completion_ids(tokenizer, KIND),))]
    assert logprobs(trained, rows) != logprobs(start, rows)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["margin"] > 0.1


def test_adapters_that_cannot_be(tmp_path, policy):
    for peft, said in (
        ({"peft_type": "LORRA"}, "did you mean LORA"),
        ({"rank": 8}, "LoraConfig has no such setting"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "cannot be merged"),
    ):
        with pytest.raises(UserError, match=said):
            stage(tmp_path / "run", policy, judged(), peft=peft)


WRONG = [tiny.judgement(100 + i, RUDE, KIND, 1, "validation") for i in range(4)]
"""Held out and judged the other way round: the held-out loss can only rise."""


def test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best(tmp_path, policy):
    settings = {"early_stopping_patience": 2, "trainer": TRAINER | {"eval_steps": 1, "max_steps": 12}}
    run = stage(tmp_path / "run", policy, judged() + WRONG, **settings)
    assert "not fallen in 2 evaluations" in run.manifest.facts["stopped_early"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(losses) == 3 and losses[0] == min(losses)
    assert run.manifest.metrics["held_out_loss"] == losses[0]
    assert not (tmp_path / "run/best.safetensors").exists()


def test_the_last_weights_stay_where_they_are_the_best(tmp_path, policy):
    rows = [*judged(), tiny.judgement(100, KIND, RUDE, 1, "validation")]
    trainer = {"trainer": TRAINER | {"eval_steps": 5}}
    plain = stage(tmp_path / "plain", policy, rows, **trainer)
    patient = stage(tmp_path / "patient", policy, rows, **trainer, early_stopping_patience=1)
    weights = [(run.path / "model/model.safetensors").read_bytes() for run in (plain, patient)]
    assert weights[0] == weights[1] and "stopped_early" not in patient.manifest.facts


def test_it_stops_when_it_has_drifted(tmp_path, policy):
    rows = [*judged(), tiny.judgement(100, "A blue lamp?", "Hello Ann, zebra.", 1, "validation")]
    trainer = TRAINER | {"eval_steps": 2, "max_steps": 40, "learning_rate": 3e-2}
    run = stage(tmp_path / "run", policy, rows, max_kl=1.0, trainer=trainer)
    assert "more than max_kl 1" in run.manifest.facts["stopped_early"]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) < 40
    assert drift(run.manifest.metrics) > 1


@pytest.mark.parametrize(("kind", "event"), [("Reporting", "on_step_end"), ("HeldOut", "on_train_end")])
def test_stopped_early_and_resumed_is_bitwise_uninterrupted(tmp_path, policy, monkeypatch, kind, event):
    """Cut on the way, and at the end: from no checkpoint does it train beyond the step where it stopped."""
    from stages import engine, held_out

    rows = judged() + WRONG
    settings = {"early_stopping_patience": 5, "trainer": TRAINER | {"eval_steps": 1, "save_steps": 2}}
    straight = stage(tmp_path / "straight", policy, rows, **settings)
    assert "stopped_early" in straight.manifest.facts
    callback = engine.Reporting if kind == "Reporting" else held_out.HeldOut
    real = getattr(callback, event)

    def interrupted(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step >= 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callback, event, interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", policy, rows, **settings)
    assert (tmp_path / "cut/checkpoints/checkpoint-4/complete").exists()
    stage(tmp_path / "cut", policy, rows, **settings)
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_training_that_diverges_names_the_tasks(tmp_path, policy):
    run = tiny.run_in(tmp_path / "run")
    path = tiny.rows_file(tmp_path / "judgements.jsonl", judged())
    trainer = TRAINER | {"learning_rate": 1e30, "max_steps": 40}
    with pytest.raises(UserError, match=r"no finite gradient in .*\(the loss is not finite of ") as error:
        dpo.main(dpo.Config(policy=policy, judgements=path, trainer=trainer), run)
    named = str(error.value).rpartition(" of ")[2].rstrip(")").removesuffix(", ...").split(", ")
    assert len(named) == 5 and set(named) <= {row.task for row in judged()}


def test_rows_longer_than_those_trained_on_are_measured_as_they_are(tmp_path, policy):
    """A sliding window that no row of the training is longer than: shared rows would not know of it."""
    tokenizer = load_policy(policy)[1]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=40, initializer_range=0.3, **sizes
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path / "window")
    tokenizer.save_pretrained(tmp_path / "window")
    long = [tiny.judgement(100 + i, KIND * 4, RUDE * 4, 1, "validation") for i in range(2)]
    settings = {"trainer": TRAINER | {"learning_rate": 1e-30}}
    run = stage(tmp_path / "run", str(tmp_path / "window"), judged() + long, **settings)
    assert run.manifest.metrics["held_out_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.manifest.metrics["held_out_logps_chosen_change"] == pytest.approx(0, abs=1e-3)


def test_a_model_without_positions_sets_no_limit(tmp_path, policy):
    tokenizer = load_policy(policy)[1]
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "alibi")
    tokenizer.save_pretrained(tmp_path / "alibi")
    run = stage(tmp_path / "run", str(tmp_path / "alibi"), judged())
    assert run.manifest.metrics["pairs"] == 24 and "a row for each completion" in run.manifest.facts["path"]


def test_a_row_longer_than_the_model_is_left_out_whatever_is_asked_for(tmp_path, policy):
    rows = [*judged(), tiny.judgement(50, KIND * 10, RUDE, 1)]
    run = stage(tmp_path / "run", policy, rows, max_length=10_000)
    assert run.manifest.metrics["pairs"] == 24 and run.manifest.facts["dropped"]["too_long"] == 1


def test_a_guard_that_would_never_look(tmp_path, policy):
    for settings in ({"max_kl": 1.0}, {"early_stopping_patience": 1}):
        for every in (13, 0):
            with pytest.raises(UserError, match=f"trainer.eval_steps = {every} steps, and there are 12"):
                stage(
                    tmp_path / "run",
                    policy,
                    judged() + WRONG,
                    trainer=TRAINER | {"eval_steps": every},
                    **settings,
                )


def test_what_was_lost_after_the_guard_last_looked_is_said(tmp_path, monkeypatch, capsys):
    change = {"held_out_logps_chosen_change": -3.0, "held_out_logps_rejected_change": -1.0}
    monkeypatch.setattr("stages.held_out.measure", lambda *_: change)
    for max_kl, beyond in ((2.5, None), (1.5, 2.0)):
        run = tiny.run_in(tmp_path / str(max_kl), "dpo")
        HeldOut(run, Direct("ipo", {"beta": 1.0}), [Example([1], ([2], [3]))], None, max_kl).finish(None)
        assert run.manifest.metrics.get("beyond_max_kl") == beyond
    assert "have lost 2.00 nats on average, more than max_kl 1.5" in capsys.readouterr().out


def test_nothing_to_stop_by(tmp_path, policy):
    with pytest.raises(UserError, match="no held-out pair to stop by"):
        stage(tmp_path / "run", policy, judged(), max_kl=1.0)


def test_what_to_think_of_chosen_replies_that_fall():
    def changes(chosen, rejected):
        return falls({"held_out_logps_chosen_change": chosen, "held_out_logps_rejected_change": rejected})

    assert changes(0.5, -3.0) == changes(-0.01, -3.0) == falls({}) == ""
    assert "usual" in changes(-2.0, -9.0) and "sft_weight" in changes(-2.0, -9.0)
    assert "the chosen fall more" in changes(-9.0, -2.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "dpop"}, "one of sigmoid, .*, plackett_luce"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "objective ipo has no label_smoothing; it has beta"),
        ({"gamma": 1.0}, "objective sigmoid has no gamma; it has beta, label_smoothing, margin"),
        ({"objective": "simpo", "max_kl": 1.0}, "no reference, so max_kl"),
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(policy, settings, said):
    with pytest.raises(ValueError, match=said):
        config(policy, **settings)


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
