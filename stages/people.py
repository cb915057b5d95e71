"""People as annotators: open their round, wait for their labels, serve them the page.

    prefloop annotate configs/quickstart.yaml

A round belongs to an experiment, stage and seed, not to a run, so people's work outlives every run.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from annotate.form import Form
from annotate.records import Item, Role, read
from annotate.rules import Check, Rules
from stages import yamlfile
from stages.config import Experiment, UserError, load
from stages.errors import SettingsError
from stages.plan import Plan
from stages.run import Run, load_manifest, runs_root

if TYPE_CHECKING:
    from annotate.quality import State
    from annotate.store import Store

PORT = 7860


def annotate(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    port: int = PORT,
    name: str | None = None,
    url: str | None = None,
) -> None:
    """Serve the labelling page of an experiment's newest sampled items on 127.0.0.1 until interrupted.

    The browser asks who is working unless `name` is given; with a `url`, the address of a proxy before this
    machine, people enter by invitation only. CONFIG.guidelines.md beside the configuration is what they read
    before work. UserError where there is nothing to label yet.
    """
    experiment, stage, config = _collecting(config_path, overrides)
    seed = experiment.seed if config.seed is None else config.seed
    form = load_form(config.form)
    items = fitting(_newest_items(experiment, config.items, seed), form)

    from annotate.app import serve
    from annotate.blinding import giveaways
    from annotate.entry import public_url
    from annotate.quality import state
    from annotate.store import Store

    url = public_url(url) if url else None
    for found in giveaways(items.values()):
        if found.serious:
            print(f"warning: {found}", flush=True)
    store = Store(config.db)
    named = round_name(experiment.name, stage, seed, config.form)
    round_id = open_round(store, items, named, seed, config, form)
    if (now := state(store, round_id)) != "open":
        print(f"warning: the round is {now}: `prefloop annotate {config_path} --resume` opens it", flush=True)
    serve(store, round_id, experiment.name, name, port, url, _guidelines(Path(config_path)), form)


def _guidelines(config_path: Path) -> str | None:
    """The text beside `experiment.yaml` that is called `experiment.guidelines.md`, if there is one."""
    path = config_path.with_suffix(".guidelines.md")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def invite(
    config_path: str | Path, overrides: Sequence[str], name: str, url: str, researcher: bool = False
) -> str:
    """A new link by which `name` enters the page at `url`. The link before, and its sessions, end."""
    config = _collecting(config_path, overrides)[2]

    from annotate.entry import invitation, public_url
    from annotate.store import Store

    role: Role = "researcher" if researcher else "annotator"
    return invitation(Store(config.db), name, public_url(url), role)


def care_for(config_path: str | Path, overrides: Sequence[str], copy: Path | None) -> int:
    """Check the label database, and copy it to `copy` if it is given. 1 where something is wrong with it."""
    config = _collecting(config_path, overrides)[2]

    from annotate.care import backup, check
    from annotate.engine import printable
    from annotate.store import default_url

    url = config.db or default_url()
    if copy is not None:
        backup(url, copy)
        print(f"copied to {copy}")
        url = f"sqlite:///{copy}"
    counts, faults = check(url)
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"{printable(url)}: {found or 'of an older version, until it is opened: checked as a file alone'}")
    for wrong in faults:
        print(f"wrong: {wrong}")
    print("sound" if not faults else "NOT sound: keep this file, and go on from the last copy that is")
    return 1 if faults else 0


def _collecting(config_path: str | Path, overrides: Sequence[str]) -> tuple[Experiment, str, Any]:
    """The experiment, the name of its stage of kind collect, and that stage's settings.

    Of several, as rounds that follow one another, the first that is not complete, and else the last.
    """
    experiment = load(config_path, overrides)
    found = [stage for stage, kind in experiment.kinds.items() if kind == "collect"]
    if not found:
        raise UserError(f"{config_path}: has no stage of kind collect, so there is nothing to label")
    stage = found[-1]
    if len(found) > 1:
        plan = Plan(experiment)
        states = {stage: plan.state(plan.node(stage, experiment.seed)) for stage in found}
        stage = next((stage for stage in found if states[stage].status != "complete"), stage)
    return experiment, stage, experiment.stages[stage]


def load_form(path: str | None) -> Form:
    """The form in a YAML file, or the plain comparison. SettingsError with file and field."""
    if path is None:
        return Form()
    raw = yamlfile.read(Path(path), "form")
    try:
        return Form.model_validate(raw or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{path}: {where and f'{where}: '}{first['msg']}") from None


def fitting(path: str | Path, form: Form) -> dict[str, Item]:
    """The items by task. UserError unless each has as many replies as the form is about."""
    items = {item.task: item for item in read(path, Item)}
    if not items:
        raise UserError(f"{path}: no items to judge; did all sampled replies come out the same?")
    for item in items.values():
        if wrong := form.takes(len(item.completions)):
            raise UserError(f"{path}: item {item.id} has {wrong}; see the stage `sample`, completions")
    return items


def round_name(experiment: str, stage: str, seed: int, form: str | None) -> str:
    """One round for each form, by the name of its file. Its wording may change: labels say which they had."""
    return f"{experiment}/{stage}/people-{seed}" + (f"-{Path(form).stem}" if form else "")


def load_checks(path: str, form: Form) -> list[Check]:
    """The checks of a file. UserError where one of them is none for this form, or stands there twice."""
    checks = read(path, Check)
    seen: dict[str, int] = {}
    for number, check in enumerate(checks, 1):
        if wrong := check.misfit(form):
            raise UserError(f"{path}, check {number}: {wrong}")
        if check.task in seen:
            raise UserError(f"{path}, check {number}: the same as check {seen[check.task]}")
        seen[check.task] = number
    if not checks:
        raise UserError(f"{path}: no checks in it; leave the setting `checks` out")
    return checks


def open_round(
    store: "Store", items: Mapping[str, Item], name: str, seed: int, config: Any, form: Form
) -> int:
    """Open people's round by the settings of a stage of kind collect."""
    checks = load_checks(config.checks, form) if config.checks else []
    if config.qualify and config.qualify.checks > len(checks):
        raise UserError(
            f"{config.checks}: {len(checks)} checks, and qualify asks for {config.qualify.checks}"
        )
    rules = Rules(qualify=config.qualify, repeats=config.repeats, at_most=config.at_most)
    return store.open_round(
        name, list(items.values()), overlap=config.overlap, salt=str(seed), checks=checks, rules=rules
    )


def set_round(config_path: str | Path, overrides: Sequence[str], state: "State") -> str:
    """Pause, close or open again people's round, and say so in a line. UserError where there is none yet."""
    experiment, stage, config = _collecting(config_path, overrides)
    seed = experiment.seed if config.seed is None else config.seed

    from annotate.quality import set_state
    from annotate.store import Store

    name, store = round_name(experiment.name, stage, seed, config.form), Store(config.db)
    round_id = store.round(name)
    if round_id is None:
        raise UserError(f"no round {name} yet: `prefloop annotate {config_path}` opens it")
    set_state(store, round_id, state)
    progress = store.progress(round_id)
    return f"{name}: {state}, {progress.done} of {progress.asked} labels are there"


def wait_for_people(store: "Store", items: Mapping[str, Item], config: Any, form: Form, run: Run) -> int:
    """Open people's round and return its id when `config.labels` verdicts are there (None: in every slot).

    Leave with Ctrl-C and come back at any time; whoever labels in between is counted. A round that is closed
    is not waited for.
    """
    from annotate.quality import state

    name = round_name(run.experiment, run.stage, run.seed, config.form)
    round_id = open_round(store, items, name, run.seed, config, form)
    have, missing = count(store, round_id, items, config.labels)
    if missing:
        run.say(f"{missing} labels missing: open the page with `prefloop annotate CONFIG` or `make annotate`")
        run.say("Ctrl-C leaves; every label is kept, and the same command waits for the rest")
    with run.progress("labels by people", total=have + missing, unit="labels") as bar:
        bar.advance(have, missing=missing)
        while missing and state(store, round_id) != "closed":
            time.sleep(1)
            before = have
            have, missing = count(store, round_id, items, config.labels)
            if have != before:
                bar.advance(have - before, missing=missing)
    if missing:
        run.say(f"the round is closed: on with {have} labels (`prefloop annotate CONFIG --resume` opens it)")
    return round_id


def count(store: "Store", round_id: int, items: Mapping[str, Item], wanted: int | None) -> tuple[int, int]:
    """(labels that are there, labels still missing). No more can be missing than there are open slots."""
    progress = store.progress(round_id)
    open_slots = progress.asked - progress.done
    if wanted is None:
        return progress.done, open_slots
    verdicts = sum(label.task in items and label.verdict for label in store.labels(round_id))
    return verdicts, min(max(0, wanted - verdicts), open_slots)


def _newest_items(experiment: Experiment, ref: str, seed: int) -> Path:
    """items.jsonl of the newest complete run of stage `ref`; or the file or run folder that `ref` is."""
    if ref not in experiment.stages:
        return Path(ref) / "items.jsonl" if Path(ref).is_dir() else Path(ref)
    folder = runs_root() / experiment.name / ref
    runs = {path.parent: load_manifest(path.parent) for path in folder.glob("*/manifest.json")}
    ready = {
        path: run.finished
        for path, run in runs.items()
        if run.status == "complete" and run.seed == seed and run.finished is not None
    }
    if not ready:
        raise UserError(
            f"{experiment.path}: nothing to label yet: first `{experiment.command}`, which samples replies"
        )
    return max(ready, key=lambda path: ready[path]) / "items.jsonl"
