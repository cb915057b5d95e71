"""What is run, in which order, and what is not run again."""

import gc
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import config as settings
from stages.config import load
from stages.errors import SettingsError, UserError
from stages.manifest import load_manifest
from stages.overview import unreferenced
from stages.pipeline import run
from stages.plan import Node, Plan
from stages.progress import Screen
from stages.run import locked, runs_root
from tests import toys


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch, tmp_path):
    toys.install(monkeypatch)
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "toy.yaml").write_text(toys.EXPERIMENT)


@pytest.fixture
def plan(tmp_path):
    def make(*overrides: str, seeds=(), text: str | None = None) -> Plan:
        if text is not None:
            (tmp_path / "toy.yaml").write_text(text)
        return Plan(load(tmp_path / "toy.yaml", overrides), seeds)

    return make


@pytest.fixture
def ran(plan, capsys):
    """Runs the experiment; returns its plan and the stages that were really run."""

    def make(*overrides: str, seeds=(), only=(), force=(), text: str | None = None):
        made = plan(*overrides, seeds=seeds, text=text)
        capsys.readouterr()
        run(made, Screen(), only=only, force=force)
        lines = capsys.readouterr().out.splitlines()
        return made, [line.partition(":")[0] for line in lines if ": complete in" in line]

    return make


def statuses(plan: Plan) -> dict[str, str]:
    return {plan.label(node): plan.state(node).status for node in plan.nodes}


def path(plan: Plan, stage: str, seed: int | None = 0) -> Path:
    return plan.state(plan.node(stage, seed)).path


def test_everything_once_in_order_then_nothing(ran, plan):
    assert statuses(plan()) == {"make": "new", "train": "waits", "gather": "waits"}
    assert plan().state(Node("gather", None)).why == "train"
    first, names = ran()
    assert names == ["make", "train", "gather"]
    assert set(statuses(first).values()) == {"complete"}
    assert (path(first, "train") / "weights" / "all.txt").read_text() == "hello 0"
    assert ran()[1] == []


def test_the_order_in_the_file_does_not_matter(ran):
    text = "name: toy\nstages:\n  gather: {trained: train}\n  train: {data: make}\n  make: {}\n"
    assert ran(text=text)[1] == ["make", "train", "gather"]


def test_a_changed_setting_runs_what_depends_on_it(ran):
    ran()
    assert ran("train.steps=4")[1] == ["train"]  # its output is the same, so gather's input is
    assert ran("make.text=other")[1] == ["make", "train", "gather"]
    assert ran()[1] == []


def test_what_cannot_change_the_result_is_not_in_the_key(ran, plan):
    first, _ = ran()
    assert ran("make.shown=5", "train.gate=warn")[1] == []
    assert len(path(first, "make").name) == 12
    moved = plan(text=toys.EXPERIMENT.replace("name: toy", "name: other"))
    assert moved.state(moved.node("make", 0)).key == first.state(first.node("make", 0)).key


def test_the_key_follows_the_content_of_a_file_not_its_name(ran, plan, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    ran(f"make.source={tmp_path}/a.txt")
    assert ran(f"make.source={tmp_path}/b.txt")[1] == []
    (tmp_path / "b.txt").write_text("two")
    assert ran(f"make.source={tmp_path}/b.txt")[1] == ["make", "train", "gather"]


def test_the_version_of_a_stage_is_in_its_key(ran, monkeypatch):
    ran()
    monkeypatch.setattr(settings.module("train"), "VERSION", 2)
    assert ran()[1] == ["train"]


def test_seeds_share_what_does_not_depend_on_them(ran):
    made, names = ran(seeds=(0, 1))
    assert names == ["make", "train (seed 0)", "train (seed 1)", "gather"]
    assert path(made, "train", 0) != path(made, "train", 1)
    assert (path(made, "gather") / "all.txt").read_text() == "hello 0\nhello 1"
    assert ran(seeds=(1,))[1] == ["gather"]
    assert ran("train.seed=1", seeds=(7, 8))[1] == []  # both are seed 1, and so is gather's one input


def test_a_run_that_failed_is_no_input_and_is_tried_again_in_its_folder(ran, plan):
    with pytest.raises(UserError, match="train: the data is bad"):
        ran("train.end=user")
    assert statuses(plan()) == {"make": "complete", "train": "failed", "gather": "waits"}
    failed = path(plan(), "train")
    made, names = ran()
    assert names == ["train", "gather"] and path(made, "train") == failed
    assert load_manifest(failed).metrics["resumed_at"] == 3


def test_the_garbage_collector_is_left_as_it_was(ran):
    before = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(UserError, match="train: the data is bad"):
        ran("train.end=user")  # after a stage that was complete
    assert (gc.get_threshold(), gc.get_freeze_count()) == before
    ran()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_force_makes_a_new_attempt_beside_the_old(ran, plan):
    first = path(ran()[0], "train")
    made, names = ran(force=["train"])
    second = path(made, "train")
    assert names == ["train"]  # the same content as before, so nothing follows
    assert second.name == first.name + "-2"
    assert load_manifest(first).status == "complete"
    with pytest.raises(UserError):
        ran("train.end=crash", force=["train"])
    assert path(plan(), "train") == second  # the newest complete one is used
    third, _ = ran(force=["train"])  # and the unfinished one is continued, not left
    assert path(third, "train").name.endswith("-3")


def test_only_one_stage_needs_what_it_reads(ran):
    with pytest.raises(UserError, match=r"train waits for make: run `prefloop run .*toy.yaml train.steps=9`"):
        ran("train.steps=9", only=["train"])
    assert ran(only=["make"])[1] == ["make"]
    assert ran(only=["train"])[1] == ["train"]


def test_a_stage_that_is_not_there_is_refused(ran):
    with pytest.raises(SettingsError, match="no stage trian; did you mean train"):
        ran(only=["trian"])


def test_a_complete_run_that_lost_a_file_is_not_used(ran, plan):
    made, _ = ran()
    weights = path(made, "train") / "weights" / "all.txt"
    weights.write_text("cut")
    with pytest.raises(UserError, match=r"train: .*all.txt has 3 bytes, not 7 .* --force train"):
        ran()
    weights.unlink()
    with pytest.raises(UserError, match=r"gather waits for train, which is damaged .*all.txt is missing"):
        ran(only=["gather"])
    assert statuses(plan())["train"] == "damaged"
    assert ran(force=["train"])[1] == ["train"]
    assert set(statuses(plan()).values()) == {"complete"}


def test_inputs_from_elsewhere(ran, plan, tmp_path):
    made, _ = ran()
    data = f"{path(made, 'make')}/data.txt"
    assert ran(f"train.data={path(made, 'make')}")[1] == []  # a run folder
    assert ran(f"train.data={data}")[1] == []  # a file in it
    with pytest.raises(UserError, match=r"train.data: .*nowhere.txt: no such file or folder"):
        ran(f"train.data={tmp_path}/nowhere.txt")
    with pytest.raises(UserError, match=r"train.data: maek is no stage .* did you mean make\?"):
        ran("train.data=maek")
    with pytest.raises(UserError, match=r"late.data: gather wrote no data.txt, only all.txt"):
        ran(
            text="name: toy\nstages:\n  make: {}\n  train: {data: make}\n  gather: {trained: train}\n"
            "  late: {stage: train, data: gather}\n"
        )
    with pytest.raises(UserError):
        ran("train.end=user", "train.steps=5")
    unfinished = path(plan("train.steps=5"), "train")
    with pytest.raises(UserError, match="is failed; only a complete run can be an input"):
        ran(f"gather.trained={unfinished}")


def test_a_hub_id_is_for_models_only(plan):
    text = "name: toy\nstages:\n  tune: {model: org/name}\n"
    made = plan(text=text)
    given = made.state(made.nodes[0]).inputs["model"]
    assert (given.path, given.digest, given.run) == ("org/name", "hub:org/name", None)
    with pytest.raises(UserError, match="no such file"):
        made = plan(text=text.replace("org/name", "./name"))
        made.state(made.nodes[0])


def test_the_seed_reaches_torch(ran):
    text = "name: toy\nstages:\n  tune: {model: org/name}\n"
    made, _ = ran(text=text, seeds=(0, 1))
    draws = [(path(made, "tune", seed) / "model" / "draw.txt").read_text() for seed in (0, 1)]
    import torch

    assert draws == [f"{torch.rand(1, generator=torch.Generator().manual_seed(s)).item()}" for s in (0, 1)]


def test_a_second_runner_gets_one_clear_line(ran, plan):
    ran(only=["make"])
    with locked(path(plan(), "train")), pytest.raises(UserError, match="another prefloop is at work"):
        ran()
    assert ran()[1] == ["train", "gather"]


def test_kill_9_is_continued_from_the_checkpoint_and_gives_the_same(ran, plan, tmp_path):
    overrides = ["train.steps=200", "train.pause=0.05"]
    command = [sys.executable, "-m", "tests.toys", "run", str(tmp_path / "toy.yaml"), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    for _ in range(200):
        time.sleep(0.05)
        if next(tmp_path.glob("runs/toy/train/*/checkpoint"), None):
            break
    assert statuses(plan(*overrides))["train"] == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = path(plan(*overrides), "train")
    assert statuses(plan(*overrides)) == {"make": "complete", "train": "interrupted", "gather": "waits"}
    assert load_manifest(killed).status == "running"  # nobody was left to say otherwise

    made, names = ran("train.steps=200", "train.pause=0")
    assert names == ["train", "gather"] and path(made, "train") == killed
    assert load_manifest(killed).metrics["resumed_at"] > 0
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 200
    assert (killed / "weights" / "all.txt").read_text() == "hello 0"


def test_clean_finds_what_these_settings_no_longer_lead_to(ran, plan):
    experiment = plan().experiment
    ran(seeds=(0, 1))
    superseded = path(ran()[0], "train")
    old, _ = ran("make.text=other", only=["make"])
    (runs_root() / ".reference").mkdir()  # as the dpo stage keeps beside the runs
    (runs_root() / ".reference" / "0.npy").touch()
    assert unreferenced(experiment) == {path(old, "make"): ""}
    ran(force=["train"])
    found = unreferenced(experiment)
    assert found.pop(superseded).startswith("is read by ")  # the reports name it as their source
    assert found == {path(old, "make"): ""}
    with locked(path(old, "make")):
        assert unreferenced(experiment)[path(old, "make")] == "is being written"


def test_clean_spares_what_another_experiment_reads(ran, plan, tmp_path):
    experiment = plan().experiment
    old, _ = ran("make.text=other", only=["make"])
    text = f"name: other\nstages:\n  train: {{data: {path(old, 'make')}}}\n"
    reader, _ = ran(text=text)
    assert unreferenced(experiment)[path(old, "make")] == f"is read by {path(reader, 'train')}"
    shutil.rmtree(path(reader, "train"))
    assert unreferenced(experiment)[path(old, "make")] == ""
