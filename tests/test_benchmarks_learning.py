"""The comparison of what PPO, RLOO and GRPO learn trains on the quickstart's models; its curves are right."""

from pathlib import Path

import pytest
import yaml

from stages.errors import UserError
from tests.benchmarks import learning

ONLINE = {"num_generations": 4, "per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 4}


@pytest.fixture
def world(smoke_runs, tmp_path, monkeypatch):
    """The smoke loop and its complete runs, in the place of the quickstart's."""
    config = yaml.safe_load(Path("configs/smoke.yaml").read_text())
    online = {"policy": "sft", "reward": "rm", "prompts": "prepare"}
    online["trainer"] = ONLINE | {"max_completion_length": 16}
    config["stages"] |= {"rloo": online, "grpo": online}
    config["stages"]["ppo"]["trainer"] |= {"total_episodes": 32, "response_length": 16}
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.setattr(learning, "QUICKSTART", str(path))
    monkeypatch.setattr(learning, "FRONTIER", str(path))
    monkeypatch.setenv("PREFLOOP_RUNS", str(smoke_runs))
    return tmp_path


@pytest.mark.parametrize("method", learning.METHODS)
def test_every_method_samples_as_many_replies(world, method):
    rows = learning.learn(method, 0, str(world / "out"))
    assert len(rows) == 32
    seconds = [row["cpu"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(0 <= row["gold"] <= 10 for row in rows)


def test_a_seed_that_has_not_run_is_named(world):
    with pytest.raises(UserError, match=r"sft of seed 7 is new: prefloop run .*smoke.yaml --seeds 7"):
        learning.run_of("sft", 7)


def rows(golds, seconds=1.0):
    """A training of rounds, each of one score."""
    return [
        {"id": f"{n}-{i}", "reply": "", "reward": 0.0, "cpu": (n + 1) * seconds, "gold": gold}
        for n, gold in enumerate(golds)
        for i in range(learning.ROUND)
    ]


def test_curve_and_the_time_to_a_score():
    rising = rows([1, 2, 3, 4, 5, 6, 7], seconds=2)
    assert learning.curve(rising) == (
        [2, 4, 6, 8, 10, 12, 14],
        [96 * n for n in range(1, 8)],
        [1, 2, 3, 4, 5, 6, 7],
    )
    assert learning.seconds_to(4, rising) == 12  # rounds 2 to 6 have mean 4
    assert learning.seconds_to(6, rising) is None
    assert learning.last(rows([0] * 5 + [3] * 10)) == 3


def test_page_compares_by_prompt_and_says_where_a_score_was_not_reached(tmp_path):
    found = {
        "ppo": {0: rows([5.0] * 12), 1: rows([6.0] * 12)},
        "separate": {0: rows([4.0] * 12, 2), 1: rows([5.5] * 12, 2)},
        "rloo": {0: rows([2.0] * 12), 1: rows([3.0] * 12)},
    }
    apart = learning.against(found["ppo"], found["separate"])
    assert apart.value == pytest.approx(0.75) and apart.n == 2 * learning.LAST
    text = learning.page(found, " --seeds 0,1")
    assert "| RLOO (TRL) | 2.50 | 2.00, 3.00 | 12 | not reached, not reached |" in text
    assert "+0.75 [" in text and "seeds 0, 1" in text
    learning.plot(found, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 5000
