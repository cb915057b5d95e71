"""How the time of a PPO update grows with each size, and what share of the machine's GEMM rate it reaches."""

import math
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from reward.tokens import token_budget
from tests.benchmarks.ppo_ours import trainer_of
from tests.benchmarks.ppo_worker import Size
from tests.benchmarks.training import panel

GROWTH = {
    "batch": (16, 32, 64, 128),
    "answer": (12, 24, 48, 96),
    "vocabulary": (2048, 8192, 32768),
    "hidden": (64, 128, 256),
}

aten = torch.ops.aten
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    aten.addmm_: lambda total, a, b, **__: mm_flop(a, b),
}
"""What FlopCounterMode does not know of itself."""


@cache
def update_time(size: Size) -> tuple[float, float, float]:
    """(CPU seconds, floating-point operations, share of the GEMM rate) of a whole update of the default.

    Two updates of the same work: the first is counted, the second timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(size, "default", 2, folder)
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            update(trainer)
        began = time.process_time()
        update(trainer)
        seconds = time.process_time() - began
    operations = float(counter.get_total_flops())
    return seconds, operations, operations / seconds / gemm_rate(size, token_budget(trainer.model))


def update(trainer: Any) -> None:
    replies = trainer.rollout()
    trainer.update(replies, trainer.score(replies))


def gemm_rate(size: Size, rows: int) -> float:
    """Operations per second of the model's products of matrices on `rows` tokens, each at its best of ten."""
    products = {
        (size.hidden, size.hidden): 4 * size.layers,
        (size.hidden, size.intermediate): 3 * size.layers,
        (size.hidden, size.vocabulary): 1,
    }
    seconds = sum(count * product_time(rows, *shape) for shape, count in products.items())
    return sum(count * 2 * rows * math.prod(shape) for shape, count in products.items()) / seconds


def product_time(rows: int, inner: int, columns: int) -> float:
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return min(times)


def growth(path: Path, cases: dict[str, dict[str, Any]]) -> list[str]:
    """Draw how an update of the first case grows with each size; sentences that say the shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.set_num_threads(1)
    large = 2 * 2048**3 / product_time(2048, 2048, 2048)
    said = [f"Two 2048x2048 matrices are multiplied at {large / 1e9:.0f} GFLOP/s by one thread."]
    for name, size in cases.items():
        found = update_time(Size(**size | {"eos": 0.0}))
        rate = gemm_rate(Size(**size), 1024)
        said.append(
            f"{name}: {found[1] / 1e9:,.0f} GFLOP in {found[0]:.2f} s, {found[2]:.0%} of {rate / 1e9:.0f}."
        )
    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(13, 3.4), constrained_layout=True)
    for axis, (name, sizes) in zip(axes, GROWTH.items(), strict=True):
        grown = [update_time(Size(**{"eos": 0.0, name: size})) for size in sizes]
        panel(axis, name, sizes, [seconds for seconds, _, _ in grown])
        told = (f"{of[2]:.0%} at {size:,}" for size, of in zip(sizes, grown, strict=True))
        said.append(f"By {name}: {', '.join(told)}.")
    axes[0].set_ylabel("CPU seconds an update")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return said
