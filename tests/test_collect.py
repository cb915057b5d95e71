"""The collect stage: simulated labels that depend on nothing but arguments, people's that outlive runs."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from annotate.form import Form
from annotate.recording import Label
from annotate.records import Item, Judgement, prompt_id, read, write
from annotate.store import Store
from stages import cli, people
from stages.collect import Config, main
from stages.config import UserError
from stages.helpdesk.annotators import ANNOTATORS, judge
from stages.helpdesk.world import demonstration, tickets
from stages.people import annotate
from stages.run import Manifest, Run


def helpdesk_items(count: int) -> list[Item]:
    items = []
    for n, ticket in enumerate(tickets(0, count)):
        replies = [demonstration(ticket, seed) for seed in (2 * n, 2 * n + 1)]
        row = {"id": prompt_id(ticket.prompt), "split": "train", "use": "preference", "prompt": ticket.prompt}
        items.append(Item(**row, facts=ticket.facts, completions=replies, policies=["a-policy", "a-policy"]))
    return [item for item in items if len(set(item.completions)) == 2]


ITEMS = helpdesk_items(60)


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path))
    write(tmp_path / "items.jsonl", ITEMS)
    return tmp_path / "items.jsonl"


def new_run(root: Path, key: str = "0" * 12, seed: int = 0) -> Run:
    manifest = Manifest(experiment="test", stage="collect", kind="collect", seed=seed)
    return Run(root / "test" / "collect" / key, manifest)


def collect(items: Path, key: str = "0" * 12, seed: int = 0, **settings: Any) -> tuple[bytes, Manifest]:
    run = new_run(items.parent, key, seed)
    main(Config(items=str(items), **settings), run)
    return (run.path / "judgements.jsonl").read_bytes(), run.manifest


def rows(items: Path, **settings: Any) -> list[Judgement]:
    collect(items, **settings)
    return read(items.parent / "test" / "collect" / ("0" * 12) / "judgements.jsonl", Judgement)


def test_every_item_gets_overlap_labels_by_annotators_drawn_for_it(items: Path) -> None:
    found = rows(items, overlap=2)
    assert Counter(Counter(row.task for row in found).values()) == {2: len(ITEMS)}
    assert {row.annotator for row in found} == set(ANNOTATORS)
    assert [(row.task, row.annotator) for row in found] == sorted((row.task, row.annotator) for row in found)
    one, _ = collect(items, overlap=1, key="1" * 12)
    singles = {(row.task, row.annotator) for row in map(Judgement.model_validate_json, one.splitlines())}
    assert len(singles) == len(ITEMS) and singles < {(row.task, row.annotator) for row in found}
    of_item = {item.task: item for item in ITEMS}
    for row in found:
        item = of_item[row.task]
        assert (row.prompt, row.completions, row.facts) == (item.prompt, item.completions, item.facts)
        assert (row.kind, row.round, row.split) == ("simulated", "collect", "train")


def test_labels_are_what_the_annotator_says_of_the_replies_as_shown(items: Path) -> None:
    run = new_run(items.parent)
    main(Config(items=str(items), overlap=3), run)
    store = Store()
    round_id = store.round(f"test/collect/{run.path.name}")
    assert round_id is not None
    of_item = {item.task: item for item in ITEMS}
    flipped = 0
    for label in store.labels(round_id):
        shown = [of_item[label.task].completions[i] for i in label.order]
        said = judge(label.annotator, 0, label.task, of_item[label.task].facts, shown)
        flip = label.order == [1, 0]
        flipped += flip
        assert label.preference == (-said if flip and said is not None else said)
    assert 0.3 < flipped / (3 * len(ITEMS)) < 0.7


def test_the_snapshot_depends_on_seed_and_items_alone(items: Path) -> None:
    first, _ = collect(items)
    again, _ = collect(items, key="a" * 12)  # another round of the same database
    write(items, ITEMS[::-1])
    turned, _ = collect(items, key="b" * 12, db=f"sqlite:///{items.parent}/other.db")
    assert first == again == turned
    assert collect(items, key="c" * 12, seed=1)[0] != first


def test_killed_in_the_middle_and_run_again_gives_the_same_snapshot(items: Path) -> None:
    whole, _ = collect(items, overlap=3, db=f"sqlite:///{items.parent}/whole.db")
    code = KILLED.format(items=str(items), root=str(items.parent))
    store = Store()
    for _ in range(3):
        before = judgements(store)
        process = subprocess.Popen([sys.executable, "-c", code])
        while judgements(store) < before + 15 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert before + 15 <= judgements(store) < 3 * len(ITEMS)
    resumed, _ = collect(items, key="f" * 12, overlap=3)
    assert resumed == whole


KILLED = """
from pathlib import Path
from stages import collect
from stages.run import Manifest, Run
collect.BATCH = 1
manifest = Manifest(experiment="test", stage="collect", kind="collect", seed=0)
run = Run(Path({root!r}) / "test" / "collect" / ("f" * 12), manifest)
collect.main(collect.Config(items={items!r}, overlap=3), run)
"""


def judgements(store: Store) -> int:
    round_id = store.round("test/collect/" + "f" * 12)
    return 0 if round_id is None else len(store.labels(round_id))


def test_the_manifest_says_who_labelled_and_how_far_they_agree(items: Path) -> None:
    _, manifest = collect(items, overlap=3)
    found = manifest.metrics
    assert manifest.facts["kind"] == "simulated"
    assert manifest.facts["labels_by"] == dict.fromkeys(ANNOTATORS, len(ITEMS))
    assert found["labels"] == 3 * len(ITEMS) == found["verdicts"] + found["skipped"]
    assert found["agreement_low"] < found["agreement"] < found["agreement_high"]
    assert 0.2 < found["krippendorff_alpha"] < 1
    assert 0.4 < found["first_shown_wins"] < 0.8
    assert manifest.gates["verdicts"].passed
    assert "agreement" not in collect(items, key="1" * 12)[1].metrics  # one label each: nothing to compare


def label_as(store: Store, who: str, count: int) -> None:
    round_id = store.round("test/collect/people-0")
    assert round_id is not None
    me = store.annotator(who)
    for view in store.step(round_id, me, want=count)[1]:
        store.step(round_id, me, [Label(token=f"{view.key}-0", preference=1)])


def test_waits_for_people_and_goes_on_with_their_labels(items: Path) -> None:
    store = Store()
    outcome: list[tuple[bytes, Manifest]] = []
    waiting = threading.Thread(
        target=lambda: outcome.append(collect(items, annotators="people", labels=5)), daemon=True
    )
    waiting.start()
    while store.round("test/collect/people-0") is None:
        time.sleep(0.01)
    label_as(store, "ann", 4)
    time.sleep(1.5)
    assert not outcome
    label_as(store, "bob", 1)
    waiting.join(timeout=10)
    found = [Judgement.model_validate_json(line) for line in outcome[0][0].splitlines()]
    assert Counter(row.annotator for row in found) == {"ann": 4, "bob": 1}
    assert {row.kind for row in found} == {"person"} and outcome[0][1].facts["kind"] == "person"


def test_waiting_can_be_left_and_people_s_work_serves_the_next_run(
    items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(people.time, "sleep", leave)
        with pytest.raises(KeyboardInterrupt):
            collect(items, annotators="people", labels=3)
    label_as(Store(), "ann", 3)
    write(items, ITEMS[5:])  # something upstream changed, and a run of another key asks
    snapshot, _ = collect(items, key="e" * 12, annotators="people", labels=1)
    still_asked = {item.task for item in ITEMS[5:]}
    mine = [label for label in Store().labels(1) if label.task in still_asked]
    assert len(mine) >= 1
    assert [Judgement.model_validate_json(row).task for row in snapshot.splitlines()] == [
        x.task for x in mine
    ]


def test_input_that_cannot_be_judged_says_what_to_do(items: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 simulated"):
        collect(items, overlap=4)
    with pytest.raises(ValueError, match="annotators=people"):
        Config(items="x", labels=3)
    plain = [item.model_copy(update={"facts": {}}) for item in ITEMS[:3]]
    write(items, plain)
    with pytest.raises(UserError, match="annotators=people"):
        collect(items, key="1" * 12)
    write(items, [ITEMS[0].model_copy(update={"completions": ["a", "b", "c"]})])
    with pytest.raises(UserError, match="3 replies"):
        collect(items, key="2" * 12)
    write(items, [])
    with pytest.raises(UserError, match="no items"):
        collect(items, key="3" * 12)


EXPERIMENT = """
name: test
stages:
  prepare: {data: helpdesk}
  sample: {policy: some-model, prompts: prepare}
  collect: {items: sample, overlap: 2}
"""


def test_annotate_serves_the_newest_complete_sample(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "test.yaml"
    config.write_text(EXPERIMENT)
    with pytest.raises(UserError, match="nothing to label yet: first `prefloop run"):
        annotate(str(config))

    for key, some in (("a", ITEMS[:10]), ("b", ITEMS[10:14]), ("c", ITEMS)):
        manifest = Manifest(experiment="test", stage="sample", kind="sample")
        run = Run(tmp_path / "test" / "sample" / key, manifest)
        if key == "c":  # not finished: must not be served
            write(run.path / "items.jsonl", some)
            manifest.save(run.path)
            continue
        with run.recorded():
            write(run.output("items.jsonl"), some)

    (tmp_path / "test.guidelines.md").write_text("Prefer the truth.")
    served: list[tuple[Store, int, str, str | None, int, str | None, str | None, Form]] = []
    monkeypatch.setattr("annotate.app.serve", lambda *arguments: served.append(arguments))
    annotate(str(config), ["collect.overlap=3"], port=1234, name="ann")
    [(store, round_id, title, name, port, url, guidelines, form)] = served
    assert (title, name, port, url, guidelines) == ("test", "ann", 1234, None, "Prefer the truth.")
    assert form == Form()
    assert store.round("test/collect/people-0") == round_id
    assert store.progress(round_id).asked == 12
    assert {v.task for v in store.step(round_id, store.annotator("ann"), want=99)[1]} == {
        item.task for item in ITEMS[10:14]
    }


def test_an_invitation_is_printed_and_the_next_one_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    config = tmp_path / "test.yaml"
    config.write_text(EXPERIMENT)
    secrets = []
    for options in ([], ["--url", "https://label.example.org/"]):
        assert cli.main(["annotate", str(config), "--invite", "ann", *options]) == 0
        secrets.append(capsys.readouterr().out.strip().partition("/enter#"))
    store = Store()
    assert [address for address, _, _ in secrets] == ["http://127.0.0.1:7860", "https://label.example.org"]
    assert [store.invited(secret) for _, _, secret in secrets] == [None, store.annotator("ann")]
    for url in ("http://label.example.org", "https://", "label.example.org", "https://x/y", "https://u@x"):
        assert "write https://" in fails("annotate", config, "--invite", "ann", "--url", url)
    assert "not allowed with" in fails("annotate", config, "--as", "ann", "--url", "https://x", code=2)
