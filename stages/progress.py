"""What the user sees while stages run: rich bars on a terminal, plain lines elsewhere.

A `Screen` spans one command; each stage opens `Bar`s on it. Plain lines come at most every few seconds, so
that a log of a long run stays readable.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

EVERY = 5.0
"""Seconds between two plain lines of one bar."""
WINDOW = 30.0
"""Seconds over which speed is measured."""


class Bar:
    """Progress of one piece of work inside a stage."""

    def __init__(self, screen: "Screen", label: str, description: str, total: int | None, unit: str):
        self.label, self.description, self.total, self.unit = label, description, total, unit
        self.done, self.shown = 0.0, dict[str, float]()
        self._screen = screen
        self._samples = deque([(time.monotonic(), 0.0)])
        self._printed = time.monotonic()
        self._task = screen.open(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._screen.close(self, self._task, failed=error[0] is not None)

    def advance(self, steps: float = 1, **shown: float) -> None:
        """`steps` more are done; `shown` are the latest loss, reward ..."""
        moment = time.monotonic()
        self.done += steps
        self.shown |= shown
        if len(self._samples) == 1 and moment - self._samples[0][0] < 0.1:
            self._samples[0] = (moment, self.done)  # what an earlier attempt did says nothing of the speed
        elif moment - self._samples[-1][0] > 0.2:
            self._samples.append((moment, self.done))
        while len(self._samples) > 2 and moment - self._samples[1][0] > WINDOW:
            self._samples.popleft()
        self._screen.update(self, self._task)

    @property
    def speed(self) -> float | None:
        """Units per second lately; None while too little is done."""
        (start, before), moment = self._samples[0], time.monotonic()
        enough = self.done > before and moment - start > 0.2
        return (self.done - before) / (moment - start) if enough else None

    @property
    def state(self) -> str:
        """`120/500 steps, loss 1.234, 8.3 steps/s, 0:45 left`"""
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,.0f}{of} {self.unit}"]
        parts += [f"{name} {value:.4g}" for name, value in self.shown.items()]
        if speed := self.speed:
            parts.append(f"{speed:.3g} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{clock((self.total - self.done) / speed)} left")
        return ", ".join(parts)

    def due(self) -> bool:
        """Whether it is time for another plain line."""
        if time.monotonic() - self._printed < EVERY:
            return False
        self._printed = time.monotonic()
        return True


class Screen:
    """Plain lines on stdout. `quiet`: for the processes of torchrun that only help."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    @contextmanager
    def live(self) -> Iterator["Screen"]:
        """While the block runs, bars may be drawn."""
        yield self

    def stages(self, done: int, total: int, name: str | None) -> None:
        """Stage `name` is about to run after `done` of `total`; None: no more."""

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def open(self, bar: Bar) -> Any:
        return None

    def update(self, bar: Bar, task: Any) -> None:
        if not self.quiet and bar.due():
            self.say(f"{bar.label}: {bar.description} {bar.state}")

    def close(self, bar: Bar, task: Any, failed: bool) -> None:
        pass


class _State(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar = task.fields.get("bar")
        return Text(bar.state if bar else "", style="cyan")


class Live(Screen):
    """Bars on a terminal: one over the stages, and one for each piece of work inside the running one."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _State(),
            console=Console(highlight=False),
            refresh_per_second=4,
            transient=True,
        )
        self.whole = self.progress.add_task("", total=None, visible=False)

    @contextmanager
    def live(self) -> Iterator["Screen"]:
        with self.progress:
            yield self

    def stages(self, done: int, total: int, name: str | None) -> None:
        text = f"[bold]{escape(name or '')}[/] ({done + 1}/{total})"
        self.progress.update(
            self.whole, description=text, completed=done, total=total, visible=name is not None
        )

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, soft_wrap=True)

    def open(self, bar: Bar) -> Any:
        return self.progress.add_task(f"  {escape(bar.description)}", total=bar.total, bar=bar)

    def update(self, bar: Bar, task: Any) -> None:
        self.progress.update(task, completed=bar.done)

    def close(self, bar: Bar, task: Any, failed: bool) -> None:
        self.progress.remove_task(task)


def screen(quiet: bool = False) -> Screen:
    """What suits this stdout."""
    return Live() if sys.stdout.isatty() and not quiet else Screen(quiet)


def clock(seconds: float) -> str:
    """`0:45`, `12:03`, `1:02:03`"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
