"""Two processes of torchrun do together what one does alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TOGETHER = """
from reward.parallel import join, once, place, shared, sum_gradients, summed, wait
import torch
join()
rank, size = place()
assert size == 2
done = []
assert shared([1, 2, 3, 4, 5], lambda n: done.append(n) or n * n) == [1, 4, 9, 16, 25]
assert done == ([1, 3, 5], [2, 4])[rank]
assert shared([], abs) == [] and shared([-7], abs) == [7]
assert once(lambda: rank) == 0
assert summed({"a": 1.5, f"only {rank}": 1.0}) == {"a": 3.0, "only 0": 1.0, "only 1": 1.0}
line = torch.nn.Linear(2, 1)
(line.weight.sum() * (1 + rank)).backward()
line.bias.grad = torch.ones(1) if rank else None
unused = torch.nn.Parameter(torch.ones(1))
sum_gradients([*line.parameters(), unused])
assert unused.grad is None
assert line.weight.grad.tolist() == [[3.0, 3.0]] and line.bias.grad.tolist() == [1.0]
for work in (lambda: shared([0, 1], lambda n: 1 / n), lambda: once(lambda: 1 / 0)):
    try:
        work()
    except ZeroDivisionError:
        pass
    else:
        raise SystemExit("an error of the first process is one of all")
wait()
print("fine")
"""


def together(*argv: str, runs: Path | None = None) -> "subprocess.CompletedProcess[str]":
    folder = {"PREFLOOP_RUNS": str(runs)} if runs else {}
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*TORCHRUN, *argv], env=os.environ | one_thread | folder, capture_output=True, text=True, timeout=300
    )


def test_shares_are_put_together(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = together(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, smoke_runs: Path) -> tuple[Path, Path]:
    """Run folders of the smoke experiment: by one process, and from SFT on by two."""
    runs = tmp_path_factory.mktemp("two")
    for stage in ("prepare", "pretrain"):
        shutil.copytree(smoke_runs / "smoke" / stage, runs / "smoke" / stage)
    done = together("-m", "stages.cli", "run", "configs/smoke.yaml", runs=runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sft: complete") == 1  # one process speaks
    return smoke_runs, runs


def lines(runs: Path, stage: str, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    [path] = (runs / "smoke" / stage).glob(f"*/{name}")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_two_processes_learn_what_one_learns(both, stage):
    one, two = (lines(runs, stage) for runs in both)
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.soak
def test_two_processes_draw_what_one_draws(both):
    """But for draws that fall to the other side where the policies differ by a rounding error."""
    one, two = (
        [row["completion"] for row in lines(runs, "ppo", "rollouts.jsonl") if row["step"] == 1]
        for runs in both
    )
    assert sum(a == b for a, b in zip(one, two, strict=True)) >= 0.8 * len(one)
    first, other = (lines(runs, "ppo")[0] for runs in both)
    assert first.keys() == other.keys()
    assert first == pytest.approx(other, rel=0.25, abs=0.05)


@pytest.mark.soak
def test_two_processes_write_the_record_once(both):
    one, two = both
    for stage, file in (
        ("ppo", "rollouts.jsonl"),
        ("sample", "completions.jsonl"),
        ("collect", "judgements.jsonl"),
    ):
        assert len(lines(two, stage, file)) == len(lines(one, stage, file))
    [table] = two.glob("smoke/report/*/table.csv")
    assert {row.split(",")[0] for row in table.read_text().splitlines()[1:]} >= {"sft", "dpo", "ppo"}


TRAINING = """
from reward.parallel import join, place
join()
import sys, torch
from stages.ppo_trainer import PPOConfig, PPOTrainer
folder, out = sys.argv[1:]
together = {"use_cpu": True, "ddp_backend": "gloo"} if place()[1] > 1 else {}
args = PPOConfig(out, total_episodes=48, per_device_train_batch_size=4, num_mini_batches=2,
    num_ppo_epochs=2, response_length=4, learning_rate=1e-2, weight_decay=0.1, target_kl=1e-7,
    critic_warmup=1, report_to="none", save_strategy="no", **together)
def score(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]
trainer = PPOTrainer(folder, score, args, [{"prompt": "hello"}, {"prompt": "there"}])
trainer.train()
print(" ".join(f"{p.double().pow(2).sum():.6f}" for p in trainer.model.parameters()))
"""


def test_steps_that_change_nothing_change_nothing_in_two_processes(tmp_path):
    """`target_kl` and `critic_warmup` leave steps and parameters out, weight decay and momentum included."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    policy = str(tiny.save_folder(tmp_path / "policy", "llama"))
    one = subprocess.run(
        [sys.executable, str(script), policy, str(tmp_path / "one")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    two = together(str(script), policy, str(tmp_path / "two"))
    norms = [[float(x) for x in re.findall(r"\d+\.\d{6}", done.stdout)] for done in (one, two)]
    assert len(norms[0]) > 5, one.stderr
    assert norms[1][: len(norms[0])] == pytest.approx(norms[0], rel=1e-4), two.stderr
    assert norms[1] == norms[1][: len(norms[0])] * 2  # both processes hold the same weights


FAILING = """
from reward.parallel import join, place
join()
from stages.ppo_trainer import PPOConfig, PPOTrainer
import sys
calls = []
def score(completions, **_):
    calls.append(len(completions))
    if len(calls) == 2:
        raise ValueError("no more")
    return [float(len(text)) for text in completions]
folder, out = sys.argv[1:]
args = PPOConfig(out, total_episodes=16, per_device_train_batch_size=4, num_mini_batches=2,
    response_length=4, use_cpu=True, ddp_backend="gloo", report_to="none", save_strategy="no")
trainer = PPOTrainer(folder, score, args, [{"prompt": "hello"}, {"prompt": "there"}])
try:
    trainer.train()
except Exception as error:
    print(f"{place()[0]} {type(error).__name__} {len(calls)}", flush=True)
"""


def test_a_reward_function_is_called_once_and_its_error_ends_all_processes(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    policy = tiny.save_folder(tmp_path / "policy", "llama")
    done = together(str(script), str(policy), str(tmp_path / "out"))
    assert "0 RewardError 2" in done.stdout and "1 RewardError 0" in done.stdout, done.stderr
