"""The report's two plots, in the colours of Okabe and Ito, which colour-blind readers can tell apart."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stages.table import REFERENCE, Line, Number, Table, point

ORANGE, SKY, GREEN, BLUE, RED, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "savefig.dpi": 144,
}
GOLD, PROXY = "gold score (rubric)", "reward-model score"


class Sampled(BaseModel):
    """What the plots need of a reply that PPO sampled in training (a row of training.jsonl)."""

    step: int
    id: str
    reward: float
    kl: float
    gold: float | None = None


def training(rollouts: Mapping[int, Sequence[Sampled]], table: Table, path: Path) -> None:
    """Gold and reward-model score of PPO's samples over its steps: a panel each, a line for each seed."""
    plt = styled_pyplot()
    panels = [(GOLD, "gold", BLUE), (PROXY, "reward", RED)]
    if table.measure == "reward":
        panels = panels[1:]
    fig, axes = plt.subplots(len(panels), 1, figsize=(7, 1.2 + 2.4 * len(panels)), sharex=True, squeeze=False)
    for ax, (label, field, colour) in zip(axes[:, 0], panels, strict=True):
        for index, (seed, rows) in enumerate(rollouts.items()):
            steps, numbers = _by_step(rows, field)
            seed_label = f"seed {seed}" if len(rollouts) > 1 else None
            ax.plot(
                steps,
                [n.value for n in numbers],
                color=colour,
                ls=("-", "--", ":", "-.")[index % 4],
                label=seed_label,
            )
            ax.fill_between(steps, *_bounds(numbers), color=colour, alpha=0.18, lw=0)
        for line in table.lines:
            if line.policy == REFERENCE and field in line.metrics:
                ax.axhline(line.metrics[field].value, color=BLACK, lw=1, ls=(0, (1, 2)))
                _note(ax, "SFT, test prompts", line.metrics[field].value, above=True)
        ax.set_ylabel(label)
        if field == "gold" and table.maximum is not None:
            ax.set_ylim(top=table.maximum)
    if len(rollouts) > 1:
        axes[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, fontsize=9)
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("PPO step (bands: 95 % interval over the prompts of a step)")
    axes[0, 0].set_title(
        "Gold and proxy reward over PPO" if len(panels) > 1 else "Proxy reward over PPO", loc="left"
    )
    save_figure(fig, path)


def frontier(rollouts: Mapping[int, Sequence[Sampled]], table: Table, path: Path) -> None:
    """Score against KL to SFT: PPO's steps as points, the rows of the table as marks with both intervals.

    Points of one method are joined and named, in a panel for each quantity that the methods' names give
    values of (`point`): there of the score that counts alone.
    """
    plt = styled_pyplot()
    lines = [line for line in table.lines if "kl" in line.metrics and line.policy != "base"]
    joined = len(lines) > len({point(line.policy)[0] for line in lines})
    swept = list(dict.fromkeys(name for line in lines for name in _given(line) if not line.kl_is_bound))
    panels = [(GOLD, "gold"), (PROXY, "reward")] if table.measure == "gold" else [(PROXY, "reward")]
    if joined:
        panels = panels[:1] * max(1, len(swept))
    overs = swept if joined and swept else [""] * len(panels)
    size = (1.6 + 7.4 * len(panels), 6.6) if joined else (1.4 + 4.2 * len(panels), 4.4)
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharex=joined, sharey=joined)
    labelled: dict[str, Any] = {}
    for ax, (label, field), over in zip(axes[0], panels, overs, strict=True):
        for rows in rollouts.values():
            _, kl = _by_step(rows, "kl")
            _, score = _by_step(rows, field)
            ax.scatter(
                [n.value for n in kl], [n.value for n in score], s=9, color=GREEN, alpha=0.45, lw=0, zorder=2
            )
        for index, (_, of_method) in enumerate(_methods(lines, over).items()):
            if held := [line for line in of_method if field in line.metrics]:
                _marks(ax, held, field, index, over)
        _axes_of(ax, table, label, field)
        if over or ax is axes[0, 0]:
            ax.set_title("What the distance from SFT buys" + (over and f", over {over}"), loc="left")
        handles, labels = ax.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    if any(rollouts.values()):
        marks = plt.Line2D([], [], marker="o", ls="", ms=3, color=GREEN, alpha=0.6)
        labelled["PPO's steps (training prompts)"] = marks
    columns = 4 * len(panels) if joined else 1 + len(panels)
    fig.legend(labelled.values(), labelled.keys(), loc="lower center", ncols=columns, fontsize=9)
    below = 0.02 + 0.22 * math.ceil(len(labelled) / columns) / size[1]  # 0.22 inches for a line of the legend
    fig.tight_layout(rect=(0, below, 1, 1))
    save_figure(fig, path, tight=False)


def _given(line: Line) -> dict[str, str]:
    """The values that the name of a point gives: of `β=0.3 steps=120` those of β and of steps."""
    words = point(line.policy)[1].split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _methods(lines: Sequence[Line], over: str) -> dict[str, list[Line]]:
    """The points of each method, without those that give a value of something else than `over`."""
    methods: dict[str, list[Line]] = {}
    for line in lines:
        if not over or line.kl_is_bound or not _given(line) or over in _given(line):
            methods.setdefault(point(line.policy)[0], []).append(line)
    return methods


def _axes_of(ax: Any, table: Table, label: str, field: str) -> None:
    ax.set_xscale("function", functions=(_signed_root, _signed_square))
    ticks = _ticks(ax.get_xlim()[1])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("KL to SFT, nats per reply (square-root axis)")
    ax.set_ylabel(label)
    if field == "gold" and table.maximum is not None:
        ax.axhline(table.maximum, color=BLACK, lw=1, ls=(0, (1, 2)))
        _note(ax, "maximum", table.maximum, above=False)


def _note(ax: Any, text: str, height: float, above: bool) -> None:
    """A small text at the right end of a horizontal line."""
    place = {"xytext": (-2, 3 if above else -3), "va": "bottom" if above else "top"}
    ax.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        fontsize=8.5, **place,
    )  # fmt: skip


MARKS = {
    "sft": ("o", BLACK),
    "dpo": ("s", BLUE),
    "ppo": ("D", GREEN),
    "rm": ("^", ORANGE),
    "rubric": ("v", PURPLE),
    "ipo": ("P", SKY),
    "simpo": ("X", RED),
    "rloo": ("p", BLACK),
    "grpo": (">", RED),
    "kto": ("<", BLUE),
}
OTHERS = (("P", RED), ("X", SKY), ("*", BLACK), ("h", BLUE), ("<", ORANGE), (">", PURPLE))


def _marks(ax: Any, lines: Sequence[Line], field: str, index: int, over: str) -> None:
    """The points of one method, each with its intervals; several are joined in the order of their KL."""
    method = point(lines[0].policy)[0]
    words = method.replace("(", " ").replace(")", " ").split()
    marker, colour = MARKS.get(words[-1], OTHERS[index % len(OTHERS)])
    label = (method if len(lines) > 1 else lines[0].policy) + ", KL bound" * lines[0].kl_is_bound
    lines = sorted(lines, key=lambda line: line.metrics["kl"].value)
    kl, score = [line.metrics["kl"] for line in lines], [line.metrics[field] for line in lines]
    at = {"x": [n.value for n in kl], "y": [n.value for n in score]}
    if len(lines) > 1:
        ax.plot(at["x"], at["y"], color=colour, lw=1, alpha=0.6, zorder=2)
        for line, x, y in zip(lines, at["x"], at["y"], strict=True):
            place = {"textcoords": "offset points", "xytext": (5, -9), "fontsize": 8, "color": colour}
            ax.annotate(_given(line).get(over, point(line.policy)[1]), (x, y), zorder=5, **place)
    for k, s in zip(kl, score, strict=True):
        reach = {"xerr": _reach(k), "yerr": _reach(s), "fmt": "none"}
        ax.errorbar(k.value, s.value, **reach, ecolor=colour, capsize=3, lw=1.4, zorder=3)
    ax.scatter(
        **at, marker=marker, color=colour, s=60, edgecolors="white", linewidths=0.8, zorder=4, label=label
    )


def _reach(number: Number) -> list[list[float]] | None:
    if number.low is None or number.high is None:
        return None
    return [[max(0.0, number.value - number.low)], [max(0.0, number.high - number.value)]]


def _by_step(rows: Sequence[Sampled], field: str) -> tuple[list[int], list[Number]]:
    from annotate.statistics import mean

    steps: dict[int, list[Sampled]] = {}
    for row in rows:
        if getattr(row, field) is not None:
            steps.setdefault(row.step, []).append(row)
    found = [mean([getattr(r, field) for r in part], [r.id for r in part]) for part in steps.values()]
    return list(steps), [Number(value=f.value, low=f.low, high=f.high) for f in found]


def _bounds(numbers: Sequence[Number]) -> tuple[list[float], list[float]]:
    lows = [n.value if n.low is None else n.low for n in numbers]
    return lows, [n.value if n.high is None else n.high for n in numbers]


def _signed_root(x: Any) -> Any:
    """KL estimates may be slightly negative: mirror the root instead of losing them."""
    import numpy as np

    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    return x * abs(x)


def _ticks(top: float) -> list[float]:
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    return [tick for tick in ticks if tick <= top]


def styled_pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot


def save_figure(fig: Any, path: Path, tight: bool = True) -> None:
    from matplotlib import pyplot

    if tight:
        fig.tight_layout()
    fig.savefig(path, metadata={"Software": None})  # no version in the file: equal plots give equal bytes
    pyplot.close(fig)
