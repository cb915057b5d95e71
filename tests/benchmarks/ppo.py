# ruff: noqa: E501 -- a page of results and its long lines
"""Our PPO against the PPOTrainer of TRL 1.12, the last that had one: CPU time of whole updates, and memory.

    python -m tests.benchmarks.ppo
    python -m tests.benchmarks.ppo --cases A,C --repeats 3

TRL 1.12 gets a virtual environment of its own, made the first time in runs/.venv-trl112 or the folder that
PREFLOOP_TRL112 names. Each side is a process that lives for the whole case; they take turns, update by update,
with one thread each. Writes results/benchmarks/ppo.md and .png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.training import interval

RESULTS = Path("results/benchmarks")
TRL_VERSION = "1.12.0"

SIZES: dict[str, dict[str, Any]] = {
    "A": {},
    "B": {"vocabulary": 32768},
    "C": {"hidden": 384, "layers": 6, "vocabulary": 8192, "batch": 32},
}
"""What differs from the defaults of `ppo_worker.Size`."""


@dataclass(frozen=True)
class Row:
    size: str
    name: str
    ours: str
    trl: str
    target: float | None = None
    memory_target: float | None = None


SAME, DEFAULT, LORA, FROZEN = (
    "strictly the same work: a value model of its own",
    "default: value head on the policy's trunk",
    "default + LoRA against TRL + LoRA",
    "default, lower half frozen",
)
ROWS = [
    Row("A", SAME, "same", "best", 1.35),
    Row("A", DEFAULT, "default", "best", 2.0),
    Row("A", LORA, "lora", "lora", 2.0),
    Row("A", FROZEN, "frozen", "best", 2.9),
    Row("A", f"D, {SAME}", "same", "docs", 2.5),
    Row("A", f"D, {DEFAULT}", "default", "docs", 3.8),
    Row("B", SAME, "same", "best", 2.5),
    Row("B", DEFAULT, "default", "best", 3.2, 0.3),
    Row("B", LORA, "lora", "lora", 3.6),
    Row("B", FROZEN, "frozen", "best"),
    Row("C", SAME, "same", "best", 1.4),
    Row("C", DEFAULT, "default", "best", 2.2, 0.45),
    Row("C", FROZEN, "frozen", "best", 3.3),
]

Cost = dict[str, float]  # of one update: cpu and wall seconds, peak memory, mean length, optimiser steps
Costs = dict[tuple[str, str], list[Cost]]  # of (side, mode), in turn


# --- TRL's environment ----------------------------------------------------------------------------------------


def trl_python() -> str:
    """The interpreter of an environment with TRL 1.12 and, beside it, the versions of constraints.txt."""
    folder = Path(os.environ.get("PREFLOOP_TRL112") or "runs/.venv-trl112")
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        print(f"Installing TRL {TRL_VERSION} into {folder}, once; this takes some minutes.", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pins = Path("constraints.txt").read_text().splitlines()
        kept = [f"trl=={TRL_VERSION}" if pin.startswith("trl==") else pin for pin in pins]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(kept))
            file.flush()
            wanted = ["trl", "torch", "transformers", "peft", "datasets", "accelerate", "pandas"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", file.name, *wanted], check=True)
        done.touch()
    return str(python)


# --- turns ----------------------------------------------------------------------------------------------------


class Side:
    """A process that runs an update whenever it is its turn."""

    def __init__(self, side: str, mode: str, size: dict[str, Any], updates: int):
        python = trl_python() if side == "trl" else sys.executable
        steps = 1 if side == "trl" else steps_of(size)
        given = {"size": size, "mode": mode, "updates": updates, "trainer_steps": steps}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", f"tests.benchmarks.ppo_{side}", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def cost(self) -> Cost:
        """What the update cost that is under way."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(self.errors.read())
        found: Cost = json.loads(line)
        return found

    def turn(self) -> Cost:
        """Let it run one update."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.cost()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def steps_of(size: dict[str, Any]) -> int:
    from tests.benchmarks.ppo_worker import Size

    whole = Size(**size)
    return whole.epochs * whole.minibatches


def alternate(size: dict[str, Any], sides: Sequence[tuple[str, str]], repeats: int) -> Costs:
    """`repeats` updates of every (side, mode) in turn, after one that is not counted."""
    workers = {side: Side(*side, size, 1 + repeats) for side in sides}
    try:
        for side in sides:
            workers[side].cost()  # the first update, side by side: allocations, caches, kernels chosen
        costs: Costs = {side: [] for side in sides}
        for turn in range(repeats):
            for side in sides[:: 1 if turn % 2 == 0 else -1]:
                costs[side].append(workers[side].turn())
    finally:
        for worker in workers.values():
            worker.end()
    return costs


# --- the page -------------------------------------------------------------------------------------------------

HEADS = (
    "case", "TRL, CPU s", "ours, CPU s", "TRL / ours [95 %]", "target", "wall ratio", "memory, MB: TRL", "ours",
    "ours / TRL", "mean answer: TRL", "ours", "optimiser steps: TRL", "ours",
)  # fmt: skip


def median(costs: Sequence[Cost], what: str) -> float:
    return sorted(cost[what] for cost in costs)[len(costs) // 2]


def line(row: Row, theirs: Sequence[Cost], of_us: Sequence[Cost]) -> list[str]:
    ratio, low, high = interval([a["cpu"] / b["cpu"] for a, b in zip(theirs, of_us, strict=True)])
    memory = [max(cost["memory"] for cost in side) / 1e6 for side in (theirs, of_us)]
    goal = f" (<= {row.memory_target})" if row.memory_target else ""
    return [
        row.name if row.name.startswith("D") else f"{row.size}, {row.name}",
        f"{median(theirs, 'cpu'):.2f}",
        f"{median(of_us, 'cpu'):.2f}",
        f"**{ratio:.2f}**" + (f" [{low:.2f}, {high:.2f}]" if low == low else ""),
        f">= {row.target}" if row.target else "",
        f"{median(theirs, 'wall') / median(of_us, 'wall'):.2f}",
        f"{memory[0]:.0f}",
        f"{memory[1]:.0f}",
        f"{memory[1] / memory[0]:.2f}{goal}",
        f"{sum(cost['length'] for cost in theirs) / len(theirs):.1f}",
        f"{sum(cost['length'] for cost in of_us) / len(of_us):.1f}",
        f"{median(theirs, 'steps'):.0f}",
        f"{median(of_us, 'steps'):.0f}",
    ]


def page(lines: Sequence[Sequence[str]], share: Sequence[str], arguments: str, repeats: int) -> str:
    with open("/proc/cpuinfo") as file:
        found = (row.split(":")[1].strip() for row in file if row.startswith("model name"))
        cpu = next(found, platform.processor())
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft")
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in [HEADS, ["---"] * len(HEADS), *lines])
    return f"""# PPO: ours against TRL {TRL_VERSION}

`python -m tests.benchmarks.ppo{arguments}` wrote this page. {cpu}, {os.cpu_count()} cores, one thread a process, Linux
{platform.release().split("-")[0]}, Python {platform.python_version()}, {versions} on both sides, fp32.

{table}

CPU seconds are the median of {repeats} whole updates, each from the end of the one before it to its own end, the first left
out: sampling, reference, values, reward model, all epochs, statistics. Every side is a process that lives for the whole
case, and they take turns update by update; a ratio is the geometric mean over the rounds, with a t interval on their
logarithms. Memory is the peak over what the imports take.

Models are of Qwen2's kind with random weights, 4 heads, intermediate size 512: **A** 128x4, V 2,048, batch 64; **B** A with
V 32,768; **C** 384x6, V 8,192, batch 32; **D** A, with TRL set as its documentation sets it for one GPU
(`per_device_train_batch_size` 1, `gradient_accumulation_steps` 64). Prompts of 16 tokens; answers of 48 at most, which a bias
on the head ends with probability .03 at each token; 4 epochs of minibatches of 16, one AdamW step each, at learning rate 3e-6,
temperature 0.7, kl_coef 0.05. In A to C TRL has its best setting, the only one in which its minibatches are optimiser steps:
`gradient_accumulation_steps` 1 and the whole batch as `per_device_train_batch_size`. Its other settings: no sample
generations, no checkpoints, no reports. It always trains a value model of its own, with LoRA too.

"Strictly the same work" has a value model of its own as well, and the score where TRL puts it; `tests/test_ppo_goldens.py` shows
that such an update changes the weights as TRL's does. The other rows of ours train fewer weights or share the trunk: a
choice that TRL does not offer.

## Share of the machine's GEMM rate

Whole updates of the default, answers of full length, so that the work is known; floating-point operations as
counted by `torch.utils.flop_counter`; shares are of the rate at which this machine multiplies the matrices of a layer and the
head, 1,024 tokens at a time.

{chr(10).join(f"- {sentence}" for sentence in share)}

![Seconds an update against batch, answer length, vocabulary and width.](ppo.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="A,B,C", help="letters, separated by commas; A measures D as well")
    parser.add_argument("--repeats", type=int, default=5, help="updates of each side, besides the first")
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - SIZES.keys():
        parser.error(
            f"no case {', '.join(sorted(unknown))}: choose from {', '.join(SIZES)}; A measures D as well"
        )
    from tests.benchmarks.ppo_growth import growth

    lines = []
    for name in args.cases.split(","):
        rows = [row for row in ROWS if row.size == name]
        sides = list(dict.fromkeys(side for row in rows for side in (("trl", row.trl), ("ours", row.ours))))
        costs = alternate(SIZES[name], sides, args.repeats)
        for row in rows:
            lines.append(line(row, costs["trl", row.trl], costs["ours", row.ours]))
            print(" | ".join(lines[-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    told = " ".join(sys.argv[1:])
    share = growth(RESULTS / "ppo.png", SIZES)
    text = page(lines, share, f" {told}" * bool(told), args.repeats)
    (RESULTS / "ppo.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
