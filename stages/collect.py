"""Collect: have the items judged, by people in the browser or by simulated annotators.

    prefloop collect configs/quickstart.yaml
    prefloop collect configs/quickstart.yaml collect.annotators=people collect.labels=300

Reads    items                  prompts with the replies to judge
Writes   judgements.jsonl       every label that counts, sorted by task and annotator
         demonstrations.jsonl   the better answers that people wrote, where their form has `edit`: `data` of a
                                stage sft. Against the reply it was made from, each is a judgement too

Both kinds of annotator write to the one label database (annotate/README.md), of which this stage takes a
snapshot. People's labels belong to the texts they judged, so they survive changes of the stages before this.
A simulated label is a function of (seed, annotator, task), never of order or time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from annotate.records import Item, Judgement, Kind, Record, ranked_pairs, write
from annotate.rules import Qualify
from stages.config import Items, NotInKey, Reads, StageConfig, UserError
from stages.people import annotate, fitting, load_form, wait_for_people
from stages.run import Run

if TYPE_CHECKING:
    from annotate.statistics import Estimate
    from annotate.store import Current, Store

__all__ = ["VERSION", "Config", "annotate", "main"]

VERSION = 1
BATCH = 250
"""Labels that a simulated annotator saves in one transaction."""
GRADE_MIDDLE = 4
"""Less which grades 1 to 7 are -3 to 3, as preferences are: the measure of agreement sees only the order."""


FOR_PEOPLE = {
    "labels": "label every item",
    "form": "compare two replies",
    "checks": "need no checks",
    "qualify": "need no checks",
    "repeats": "say the same again",
    "at_most": "label every item",
}
"""Setting -> what simulated annotators do instead."""


class Config(StageConfig):
    items: Items
    annotators: Literal["simulated", "people"] = "simulated"
    form: Annotated[str | None, Reads("")] = None
    """YAML file of what to ask people, as in configs/forms/; None: which of two replies is better."""
    overlap: int = Field(default=1, ge=1)
    """How many annotators judge each item."""
    labels: int | None = Field(default=None, ge=1)
    """People only: how many verdicts to wait for; None waits until every item has `overlap` labels."""
    checks: Annotated[str | None, Reads(""), NotInKey()] = None
    """People only: a file of tasks whose answer is known, mixed among the others (annotate/README.md)."""
    qualify: Annotated[Qualify | None, NotInKey()] = None
    """People only: {checks: 5, right: 0.8}. The first 5 come before all else; 80 % right lets one go on."""
    repeats: Annotated[float, Field(ge=0, le=0.5), NotInKey()] = 0
    """People only: the share of someone's labels that they are asked for again, in the other order."""
    at_most: Annotated[int | None, Field(ge=1), NotInKey()] = None
    """People only: how many labels one person may give."""
    db: Annotated[str | None, NotInKey()] = None
    """URL of the label database, as in annotate/README.md; None: labels.db in the folder of runs."""

    @model_validator(mode="after")
    def _without_password(self) -> Self:
        if self.db and re.search(r"//[^/@]*:.*@|[?&]password=", self.db):
            raise ValueError(
                "db: settings are kept with every run; put the password into ~/.pgpass or PGPASSWORD"
            )
        return self

    @model_validator(mode="after")
    def _for_people_only(self) -> Self:
        if self.annotators == "simulated":
            for name, simulated in FOR_PEOPLE.items():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for annotators=people; simulated ones {simulated}")
        if self.qualify is not None and self.checks is None:
            raise ValueError("qualify needs checks, the file of tasks whose answer is known")
        return self


def main(config: Config, run: Run) -> None:
    from annotate.store import Store

    form = load_form(config.form)
    items = fitting(config.items, form)
    store = Store(config.db)
    kind: Kind = "simulated" if config.annotators == "simulated" else "person"
    if kind == "simulated":
        round_id = simulate(store, items, config.overlap, run)
    else:
        round_id = wait_for_people(store, items, config, form, run)
        run.record(**quality(store, round_id))

    labels = [label for label in store.labels(round_id) if label.task in items]
    judgements = snapshot(items, labels, kind, run.stage)
    if form.edit:
        demonstrations, against = edits(items, labels, kind, run.stage)
        write(run.output("demonstrations.jsonl"), demonstrations)
        run.record(demonstrations=len(demonstrations))
        judgements += against
    write(run.output("judgements.jsonl"), judgements)
    run.record(kind=kind, **measures(labels))
    run.gate("verdicts", any(label.verdict for label in labels), "every item was skipped")


def simulate(store: "Store", items: Mapping[str, Item], overlap: int, run: Run) -> int:
    """Fill a round of this run's own through the code path of people. Continues what a killed run left."""
    from annotate.recording import Label
    from stages.helpdesk.annotators import ANNOTATORS, judge

    if overlap > len(ANNOTATORS):
        raise UserError(f"{run.stage}.overlap={overlap}: there are {len(ANNOTATORS)} simulated annotators")
    if not all(item.facts for item in items.values()):
        raise UserError(f"simulated annotators know the helpdesk only: {run.stage}.annotators=people")
    round_id = store.open_round(
        f"{run.experiment}/{run.stage}/{run.path.name}",
        list(items.values()),
        kind="simulated",
        overlap=overlap,
        reserve=list(ANNOTATORS),
        salt=str(run.seed),
    )
    progress = store.progress(round_id)
    with run.progress("judging", total=progress.asked, unit="labels") as bar:
        bar.advance(progress.done)
        for name in ANNOTATORS:
            annotator = store.annotator(name, "simulated")
            _, views = store.step(round_id, annotator, want=BATCH)
            while views:
                verdicts = [judge(name, run.seed, v.task, items[v.task].facts, v.completions) for v in views]
                labels = [
                    Label(token=f"{view.key}-0", preference=verdict)
                    for view, verdict in zip(views, verdicts, strict=True)
                ]
                _, views = store.step(round_id, annotator, labels, want=BATCH)
                bar.advance(len(labels))
    return round_id


def snapshot(
    items: Mapping[str, Item], labels: Sequence["Current"], kind: Kind, name: str
) -> list[Judgement]:
    """Rows sorted by task and annotator, without times: the same labels give the same bytes."""
    return [
        Judgement(
            **items[label.task].model_dump(exclude={"policies", "priority"}),
            annotator=label.annotator,
            kind=kind,
            round=name,
            preference=label.preference,
            **label.answers.model_dump(exclude={"edit"}),
        )
        for label in labels
    ]


def edits(
    items: Mapping[str, Item], labels: Sequence["Current"], kind: Kind, name: str
) -> tuple[list[Record], list[Judgement]]:
    """Better answers as demonstrations, and as preferred ("better", 2) to the replies they were made from."""
    demonstrations, against = [], []
    for label in labels:
        edit, item = label.answers.edit, items[label.task]
        if edit is None or edit.text == item.completions[edit.of]:
            continue
        shared = item.model_dump(exclude={"policies", "priority", "completions", "use"})
        demonstrations.append(Record(**shared, use="sft", completion=edit.text))
        texts = [edit.text, item.completions[edit.of]]
        who: dict[str, Any] = {"annotator": label.annotator, "kind": kind, "round": name}
        against.append(Judgement(**shared, use=item.use, completions=texts, preference=2, **who))
    return demonstrations, against


def measures(labels: Sequence["Current"]) -> dict[str, Any]:
    """What the manifest says of the labels: counts, agreement, leaning; intervals as _low and _high."""
    from annotate.agreement import first_shown_wins, krippendorff_alpha, raw_agreement

    verdicts = [label for label in labels if label.verdict]
    graded: dict[str, list[int]] = defaultdict(list)
    compared: dict[str, list[int]] = defaultdict(list)
    for label in verdicts:
        if label.answers.rating is not None:
            graded[label.task].append(label.answers.rating - GRADE_MIDDLE)
        for pair, preference in comparisons(label):
            compared[f"{label.task}{pair}"].append(preference)
    found: dict[str, Any] = {
        "labels": len(labels),
        "verdicts": len(verdicts),
        "skipped": len(labels) - len(verdicts),
        "items_labelled": len({label.task for label in verdicts}),
        "labels_by": dict(sorted(Counter(label.annotator for label in labels).items())),
    }
    flagged = Counter(name for label in labels for name in label.answers.flags)
    if flagged:
        found["flagged"] = dict(sorted(flagged.items()))
    if graded:
        return found | _with_interval("krippendorff_alpha", krippendorff_alpha(graded.values()))
    preferences = [preference for of_task in compared.values() for preference in of_task]
    found["tie_rate"] = preferences.count(0) / len(preferences) if preferences else 0.0
    shown = [(label.task, label.preference, label.order) for label in labels if label.preference is not None]
    for name, estimate in (
        ("agreement", raw_agreement(compared.values())),
        ("krippendorff_alpha", krippendorff_alpha(compared.values())),
        ("first_shown_wins", first_shown_wins(shown)),
    ):
        found |= _with_interval(name, estimate)
    return found


def quality(store: "Store", round_id: int) -> dict[str, Any]:
    """What the manifest says of checks and repeats, by annotator and in all; nothing where there are none."""
    from annotate.quality import accuracy, consistency, lean, repeated, share_right

    found: dict[str, Any] = {}
    if answers := accuracy(store, round_id):
        found["checks_by"] = {
            name: {"right": sum(a.right for a in answers if a.annotator == name), "of": count}
            for name, count in sorted(Counter(a.annotator for a in answers).items())
        }
        found |= _with_interval("check_accuracy", share_right(answers))
    if pairs := repeated(store, round_id):
        found["repeats_by"] = {
            name: {"alike": sum(p.alike for p in pairs if p.annotator == name), "of": count}
            for name, count in sorted(Counter(p.annotator for p in pairs).items())
        }
        found |= _with_interval("self_consistency", consistency(pairs))
        found |= _with_interval("repeats_first_shown_wins", lean(pairs))
    return found


def comparisons(label: "Current") -> list[tuple[str, int]]:
    """(which two, preference) of the completions: one, or of a ranking all, as signs."""
    if label.preference is not None:
        return [("", label.preference)]
    return [(f"/{i}/{j}", sign) for i, j, sign in ranked_pairs(label.answers.ranking or [])]


def _with_interval(name: str, estimate: "Estimate | None") -> dict[str, float]:
    """None where too few labels overlap; the ends only where there is an interval."""
    if estimate is None:
        return {}
    ends = {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {name: estimate.value} | {end: value for end, value in ends.items() if value == value}


if __name__ == "__main__":
    from stages.cli import launch

    launch("collect")
