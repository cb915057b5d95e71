"""Engine: what a step is does not depend on how it is split, when it was stopped, or what else is there."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from reward.batch import Example
from reward.losses import Comparison, PreferenceLikelihood
from reward.model import load_policy, new_reward_model
from reward.paths import choose
from stages.arguments import EngineArguments, arguments
from stages.config import UserError
from stages.engine import COMPLETE, MAX_SKIPPED, Engine, Epochs, Reporting, train
from stages.objectives import NLL
from tests import tiny


def examples(count=20):
    generator = torch.Generator().manual_seed(3)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, 290, (size,), generator=generator).tolist()

    return [Example(ids(2, 12), ([*ids(1, 20), 1],)) for _ in range(count)]


class StopAt(TrainerCallback):
    """Ends training after a step as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Fixed:
    """Steps that are given; an empty one changes nothing."""

    def __init__(self, batches):
        self.batches, self.metrics = batches, {}

    def __len__(self):
        return len(self.batches)

    def start(self, step):
        return iter(self.batches[step:])


def trained(path, *, seed=0, stop=None, steps=None, objective=None, count=20, callbacks=(), **trainer):
    """(model, engine) after training a tiny policy in the run folder `path`."""
    run = tiny.run_in(path, seed=seed)
    model = tiny.model_of("llama", tiny.tokenizer_of())
    chosen = {"num_train_epochs": 2, "per_device_train_batch_size": 6, "save_steps": 3, "logging_steps": 1}
    args = arguments(run, chosen | {"learning_rate": 1e-2} | trainer)
    steps = steps or Epochs(examples(count), args)
    hooks = [Reporting(run, "test"), *callbacks, *([StopAt(stop)] if stop else [])]
    engine = Engine(model, args, objective or NLL(), steps, hooks)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train(engine, run)
    else:
        train(engine, run)
    return model, engine


def logged(path):
    import json

    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def distance(a, b, start):
    """How far apart two trained models are, relative to how far they went."""
    flat = [torch.cat([p.flatten() for p in m.state_dict().values()]) for m in (a, b, start)]
    return ((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm()).item()


def test_the_result_does_not_depend_on_the_micro_batches(tmp_path):
    """With SGD, since Adam makes large what rounding leaves of a gradient that is zero."""
    start = tiny.model_of("llama", tiny.tokenizer_of())
    whole, _ = trained(tmp_path / "whole", optim="sgd")
    for budget in (1, 60):
        split, _ = trained(tmp_path / f"split-{budget}", optim="sgd", max_tokens_per_batch=budget)
        assert distance(whole, split, start) < 1e-5
    first, second = (logged(tmp_path / name) for name in ("whole", "split-1"))
    assert [x["loss"] for x in first] == pytest.approx([x["loss"] for x in second], rel=1e-5)


def test_out_of_memory_says_what_to_set(tmp_path):
    class TooLarge(NLL):
        def loss(self, model, examples):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    settings = "trainer.max_tokens_per_batch to fewer, or trainer.activation_checkpointing"
    with pytest.raises(UserError, match=rf"step 1, in a pass of up to 60 tokens\): set {settings}"):
        trained(tmp_path, objective=TooLarge(), max_tokens_per_batch=60)


def test_accumulation_is_part_of_the_step(tmp_path):
    one, engine = trained(tmp_path / "one", per_device_train_batch_size=6)
    other, _ = trained(tmp_path / "other", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert engine.state.global_step == 8 and tiny.same_weights(one, other)


def test_a_step_is_gradient_descent_on_the_mean_over_the_whole_batch(tmp_path):
    rows = examples(6)
    args = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
    model, _ = trained(tmp_path, steps=Fixed([rows]), max_tokens_per_batch=40, **args)
    expected = tiny.model_of("llama", tiny.tokenizer_of())
    tokens = 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.completions[0]])
        labels = ids.clone()
        labels[:, : len(row.prompt)] = -100
        n = len(row.completions[0])
        (expected(input_ids=ids, labels=labels).loss * n).backward()
        tokens += n
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.5 * p.grad / tokens
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("count", "epochs", "steps"), [(20, 2, 8), (18, 2, 6), (5, 3, 3), (20, 0.5, 2)])
def test_exact_number_of_optimiser_steps(tmp_path, count, epochs, steps):
    _, engine = trained(tmp_path, count=count, num_train_epochs=epochs)
    taken = {int(state["step"]) for state in engine.optimizer.state.values()}
    assert (engine.state.global_step, taken) == (steps, {steps})
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, steps + 1))


def test_max_steps_wins_over_epochs(tmp_path):
    assert trained(tmp_path, max_steps=5)[1].state.global_step == 5


@pytest.mark.parametrize("stop", [2, 3, 5, 8])
def test_resumed_is_bitwise_uninterrupted(tmp_path, stop):
    """Stopped before the first checkpoint, at one, between two, and after the last step."""
    straight, _ = trained(tmp_path / "straight")
    trained(tmp_path / "cut", stop=stop)
    resumed, engine = trained(tmp_path / "cut")
    assert tiny.same_weights(straight, resumed) and engine.state.global_step == 8
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "straight/metrics.jsonl").read_text()
    assert not (tmp_path / "cut/checkpoints").exists()


def test_a_checkpoint_that_is_not_marked_whole_is_not_used(tmp_path, capsys):
    straight, _ = trained(tmp_path / "straight")
    trained(tmp_path / "cut", stop=7)
    folder = tmp_path / "cut/checkpoints"
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert (folder / "checkpoint-6" / COMPLETE).exists()
    (folder / "checkpoint-6" / COMPLETE).unlink()
    (folder / "checkpoint-6/model.safetensors").write_bytes(b"torn")
    (folder / "checkpoint-9").mkdir()
    resumed, _ = trained(tmp_path / "cut", callbacks=[Gone(folder / "checkpoint-9")])
    assert "continuing from checkpoint-3" in capsys.readouterr().out
    assert tiny.same_weights(straight, resumed)


class Gone(TrainerCallback):
    def __init__(self, path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        assert not self.path.exists()


def test_the_same_seed_twice_is_bitwise_the_same(tmp_path):
    once, again, other = (
        trained(tmp_path / name, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert tiny.same_weights(once, again) and not tiny.same_weights(once, other)


class Poisoned(NLL):
    """Not a number on the batches that hold a certain example."""

    def __init__(self, bad):
        self.bad = bad

    def loss(self, model, examples):
        loss, metrics = super().loss(model, examples)
        return (loss * math.nan if self.bad in examples else loss), metrics


CONSTANT = {"lr_scheduler_type": "constant", "save_steps": 100}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, max_grad_norm):
    a, b, c = examples(4), [Example([7], ([8, 1],))], examples(8)[4:]
    settings = CONSTANT | {"max_grad_norm": max_grad_norm}
    skipped, _ = trained(tmp_path / "x", steps=Fixed([a, b, c]), objective=Poisoned(b[0]), **settings)
    without, _ = trained(tmp_path / "y", steps=Fixed([a, [], c]), **settings)
    assert tiny.same_weights(skipped, without)
    assert [line.get("skipped_steps") for line in logged(tmp_path / "x")] == [None, 1.0, None]


def test_training_ends_when_no_gradient_is_finite_any_more(tmp_path):
    bad = Example([7], ([8, 1],))
    with pytest.raises(UserError, match=r"no finite gradient in 10 steps in a row \(step 11\): lower"):
        trained(tmp_path, steps=Fixed([examples(2)] + [[bad]] * 20), objective=Poisoned(bad), **CONSTANT)
    assert MAX_SKIPPED == 10


def test_separate_bad_steps_do_not_add_up(tmp_path):
    bad, good = [Example([7], ([8, 1],))], examples(2)
    trained(tmp_path, steps=Fixed([bad, good] * 12), objective=Poisoned(bad[0]), **CONSTANT)


def test_an_empty_step_changes_nothing_and_counts(tmp_path):
    a, c = examples(4), examples(8)[4:]
    with_empty, engine = trained(tmp_path / "x", steps=Fixed([a, [], c, []]), **CONSTANT)
    without, _ = trained(tmp_path / "y", steps=Fixed([a, c]), **CONSTANT)
    assert tiny.same_weights(with_empty, without) and engine.state.global_step == 4


@pytest.mark.parametrize("of_scores", [False, True])
def test_bf16_reaches_the_layers_and_not_the_objective(tmp_path, of_scores):
    """The Trainer would wrap the model's own forward, and our passes run its trunk."""
    torch.manual_seed(0)
    folder = tiny.save_folder(tmp_path, "llama")
    pair = Comparison([5, 6], ([7, 1], [8, 9, 1]), (0, 0, 2, 1, 0, 0, 1))
    if of_scores:
        model, given = new_reward_model(folder)[0], [pair]
        objective = PreferenceLikelihood(model, given)
    else:
        model, given, objective = load_policy(folder)[0], examples(4), NLL()
    exact = float(objective.loss(model, given)[0].detach())
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *of: seen.append(of[-1].dtype))
    args = EngineArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    engine = Engine(model, args, objective, Fixed([given]))
    loss = objective.loss(model, given)[0].detach()
    assert (
        loss.dtype == torch.float32 and float(loss) != exact and float(loss) == pytest.approx(exact, rel=0.02)
    )
    engine.train()
    assert set(seen) == {torch.bfloat16} and model.dtype == torch.float32


def test_the_shortcuts_are_tried_in_full_precision(tmp_path):
    """Else rounding alone would refuse them."""
    model = tiny.model_of("llama", tiny.tokenizer_of())
    args = EngineArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    Engine(model, args, NLL(), Fixed([examples(4)])).train()
    assert "forward" in vars(model)
    path = choose(model, examples(4))
    assert path.head and path.padding_free and "forward" in vars(model)


def test_what_is_logged_is_the_mean_over_the_step(tmp_path):
    rows = examples(6)
    start = tiny.model_of("llama", tiny.tokenizer_of())
    with torch.no_grad():
        loss = NLL().loss(start, rows)[0].item() / NLL().weight(rows)
    trained(tmp_path, steps=Fixed([rows, rows]), max_tokens_per_batch=40)
    first = logged(tmp_path)[0]
    assert first["loss"] == pytest.approx(loss, rel=1e-4) and first["grad_norm"] > 0


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.data())
def test_epochs_hold_every_example_once_and_continue_anywhere(count, size, epochs, data):
    args = EngineArguments(
        output_dir="none", per_device_train_batch_size=size, num_train_epochs=epochs, report_to="none"
    )
    steps = Epochs(list(range(count)), args)
    batches = list(steps.start(0))
    assert len(batches) == len(steps) == epochs * math.ceil(count / size)
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in of_epoch for i in batch) == list(range(count))
    k = data.draw(st.integers(0, len(batches)))
    assert list(steps.start(k)) == batches[k:]
