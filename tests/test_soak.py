"""Long proofs, for `make soak`: the figures of the quickstart over three seeds, and kills at random times."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.table import Line, load

pytestmark = pytest.mark.soak
SEEDS = "0,1,2"


def prefloop(runs: Path, *argv: str, threads: str = "1") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.cli", *argv],
        env=os.environ | {"PREFLOOP_RUNS": str(runs), "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    """The rows of the quickstart's table over three seeds, by policy."""
    runs = tmp_path_factory.mktemp("quickstart")
    process = prefloop(runs, "run", "configs/quickstart.yaml", "--seeds", SEEDS, threads="2")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    [report] = runs.glob("quickstart/report/*")
    table = load(report)
    agreement = [number.value for number in table.reward_agreement]
    assert len(agreement) == 3 and sum(agreement) / 3 >= 0.85  # of one seed's pairs it is known to 0.015
    lines = {line.policy: line for line in table.lines}
    demonstrations = [number.value for number in table.demonstrations]
    assert abs(value(lines["sft"], "gold") - sum(demonstrations) / 3) <= 0.05 * 10
    return lines


def value(line: Line, metric: str) -> float:
    return line.metrics[metric].value


@pytest.mark.parametrize(("policy", "least"), [("ppo", 0.5), ("dpo", 0.4)])
def test_headroom_that_training_closes(lines: dict[str, Line], policy: str, least: float) -> None:
    assert value(lines[policy], "headroom") >= least
    low, high = lines[policy].metrics["gold"].low, lines["sft"].metrics["gold"].high
    assert low is not None and high is not None and low > high


@pytest.mark.parametrize("policy", ["ppo", "dpo"])
def test_the_score_is_not_bought_with_sick_replies(lines: dict[str, Line], policy: str) -> None:
    line, sft = lines[policy], lines["sft"]
    assert value(line, "stopped") >= 0.97
    assert value(line, "repetition") <= value(sft, "repetition") + 0.02
    assert value(line, "base_loss") <= value(sft, "base_loss") + 0.3
    assert value(line, "lexicon") >= 0.99


def test_sft_leaves_headroom(lines: dict[str, Line]) -> None:
    assert value(lines["sft"], "gold") <= 6  # of 10


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_times_it_ends_in_the_same_table(
    smoke_runs: Path, tmp_path: Path, seed: int
) -> None:
    """Ever later kills, so that some fall into the start of a process and some far into it."""
    rng, kills = random.Random(seed), 0
    for attempt in range(1, 40):
        process = prefloop(tmp_path, "run", "configs/smoke.yaml")
        try:
            output, _ = process.communicate(timeout=rng.uniform(0, 1 + attempt))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, output
    assert kills >= 3
    tables = [next(runs.glob("smoke/report/*/table.csv")).read_bytes() for runs in (smoke_runs, tmp_path)]
    assert tables[0] == tables[1]


def test_three_seeds_at_once_and_the_memory_they_take(tmp_path: Path) -> None:
    process = prefloop(tmp_path, "run", "configs/smoke.yaml", "--seeds", SEEDS)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.2)
    assert process.returncode == 0
    assert peak < 2 * 1024**2  # kB
    assert len(list(tmp_path.glob("smoke/pretrain/*"))) == len(list(tmp_path.glob("smoke/report/*"))) == 1
    assert len(list(tmp_path.glob("smoke/ppo/*"))) == 3
