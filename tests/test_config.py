"""Experiment files: what loads, and the one line that says why something does not."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from stages.config import KeysOf, Model, Reads, StageConfig, check_libraries, load
from stages.errors import SettingsError
from tests import toys


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    toys.install(monkeypatch)


@pytest.fixture
def experiment(tmp_path):
    """Loads an experiment of the given text and overrides."""

    def make(text: str = toys.EXPERIMENT, *overrides: str):
        path = tmp_path / "toy.yaml"
        path.write_text(text)
        return load(path, overrides)

    return make


def stages(text: str) -> str:
    return f"name: toy\nstages:\n{text}"


def test_names_kinds_and_settings(experiment):
    found = experiment(stages("  make: {}\n  first: {stage: train, data: make}\n  train: {data: make}\n"))
    assert found.name == "toy" and found.seed == 0
    assert found.kinds == {"make": "make", "first": "train", "train": "train"}
    assert found.stages["first"] == toys.TrainConfig(data="make")
    assert found.uses("first") == ["make"]


def test_a_stage_without_settings_takes_the_defaults(experiment):
    assert experiment(stages("  make:\n")).stages["make"] == toys.MakeConfig()


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e-5", ".1e-4"])
def test_numbers_with_an_exponent_are_numbers(experiment, text):
    found = experiment(stages(f"  tune: {{model: org/name, trainer: {{learning_rate: {text}}}}}\n"))
    rate = found.stages["tune"].trainer["learning_rate"]
    assert isinstance(rate, float) and rate == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["1e5x", "e5", "v1e-5", "1-e5"])
def test_other_words_stay_words(experiment, text):
    assert experiment(stages(f"  make: {{text: {text}}}\n")).stages["make"].text == text


def test_overrides_replace_and_reach_into_blocks(experiment):
    text = stages("  make: {}\n  tune: {model: a/b, trainer: {max_steps: 5}}\n  train: {data: make}\n")
    found = experiment(
        text,
        "train.steps=7",
        "make.source=../x.jsonl.gz",
        "tune.trainer.learning_rate=1e-5",
        "train.mixture.more=make",
        "make.text=a=b",
    )
    assert found.stages["train"].steps == 7
    assert found.stages["make"].source == "../x.jsonl.gz"
    assert found.stages["make"].text == "a=b"
    assert found.stages["tune"].trainer == {"max_steps": 5, "learning_rate": 1e-5}
    assert found.stages["train"].mixture == {"more": "make"}
    assert found.command.endswith("train.mixture.more=make make.text=a=b")


def test_stages_share_settings_by_alias_and_an_override_of_one_leaves_the_others(experiment):
    text = "  make:\n  tune: &tune {stage: tune, model: make, trainer: &t {max_steps: 3, logging_steps: 1}}\n"
    text += "  more: {<<: *tune, trainer: {<<: *t, max_steps: 5}}\n  same: {<<: *tune}\n"
    found = experiment(stages(text), "tune.trainer.logging_steps=2").stages
    assert found["tune"].trainer == {"max_steps": 3, "logging_steps": 2}
    assert found["more"].trainer == {"max_steps": 5, "logging_steps": 1}
    assert found["same"].trainer == {"max_steps": 3, "logging_steps": 1}


def test_an_empty_override_is_null(experiment):
    assert experiment(toys.EXPERIMENT, "make.source=").stages["make"].source is None


BAD_FILES = {
    "name: toy\nstages: [": "line 2",
    "name: toy\nname: other\nstages: {make: {}}": "name is there twice",
    "name: toy\nstages:\n  make: {text: a}\n  make: {text: b}": "line 4: make is there twice",
    "- a": "must be a mapping",
    "name: toy": "stages: must be a mapping of names to settings, and is missing or empty",
    "stages: {make: {}}": "name: needs a word",
    "name: a/b\nstages: {make: {}}": "name: needs a word",
    "name: toy\nseed: one\nstages: {make: {}}": "seed: needs a whole number from 0 on, not 'one'",
    "name: toy\nstage: {make: {}}": "stage: unknown setting; did you mean stages?",
    "name: toy\nstages: {mak: {}}": "stages.mak: unknown stage mak; did you mean make? (a stage with",
    "name: toy\nstages: {own: {stage: mak}}": "stages.own: unknown stage mak; did you mean make?",
    "name: toy\nstages: {make: 3}": "stages.make: must be a mapping",
    "name: toy\nstages: {train: {}}": "train.data: is missing and has no default",
    "name: toy\nstages: {train: {dta: x}}": "train.dta: unknown setting; did you mean data?",
    "name: toy\nstages: {train: {data: [x]}}": "train.data: Input should be a valid string, not ['x']",
    "name: toy\nstages: {train: {data: x, mixture: {a: 3}}}": "train.mixture.a: Input should be",
    "name: toy\nstages: {a: {stage: tune, model: b}, b: {stage: tune, model: a}}": "in a circle: a -> b -> a",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(experiment, text):
    with pytest.raises(SettingsError) as error:
        experiment(text)
    assert BAD_FILES[text] in str(error.value)
    assert "toy.yaml" in str(error.value) and "\n" not in str(error.value)


BAD_OVERRIDES = {
    "train.stepps=3": "command line: train.stepps: unknown setting; did you mean steps?",
    "train.steps=many": "command line: train.steps: Input should be a valid integer",
    "trian.steps=3": "the experiment has no stage trian; did you mean train?",
    "tune.steps=3": "the experiment has no stage tune",
    "seed=3": "has the form stage.field=value (the seed: --seeds)",
    "train.steps": "has the form stage.field=value",
    "train.steps.deep=3": "train.steps: Input should be a valid integer",
    "train.data.deep=3": "train.data has no fields of its own",
    "train.steps=[1": "train.steps=[1",
    "train.data=gather": "in a circle",
}


@pytest.mark.parametrize("text", BAD_OVERRIDES)
def test_a_bad_override_is_refused_in_one_line(experiment, text):
    with pytest.raises(SettingsError) as error:
        experiment(toys.EXPERIMENT, text)
    assert BAD_OVERRIDES[text] in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no such experiment file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not a text file"):
        load(tmp_path / "binary.yaml")


class Several(StageConfig):
    world: Literal["embedded"] | Annotated[str, Reads("")] | list[Annotated[str, Reads("")]] = "embedded"
    model: Model | None = None
    policies: dict[str, Model] = {}
    rows: Annotated[list[str], Reads("rows.jsonl", every_seed=True)] = []
    trainer: Annotated[dict[str, Any], KeysOf("transformers.TrainingArguments")] = {}
    plain: str = "make"


def test_inputs_are_found_wherever_they_are_in_a_type():
    assert {name: reads.artifact for name, reads in Several.inputs().items()} == {
        "world": "",
        "model": "model",
        "policies": "model",
        "rows": "rows.jsonl",
    }
    assert list(Several.blocks()) == ["trainer"]
    config = Several(model="a", policies={"x": "b", "y.2": "c"}, rows=["d", "e"])
    found = [(dotted, value) for dotted, _, value in config.references()]
    assert found == [
        ("model", "a"),
        ("policies.x", "b"),
        ("policies.y.2", "c"),
        ("rows.0", "d"),
        ("rows.1", "e"),
    ]


def test_a_keyword_beside_a_path_is_no_input():
    assert not list(Several().references())
    assert [value for *_, value in Several(world=["embedded.txt"]).references()] == ["embedded.txt"]


def test_one_name_for_a_field_that_gathers_seeds_is_a_list_of_one():
    assert Several(rows="evaluate").rows == ["evaluate"]


BAD_BLOCKS = {
    "learning_rat: 1": "tune.trainer.learning_rat: transformers.TrainingArguments has no such setting",
    "learning_rate: fast": "tune.trainer.learning_rate: Input should be a valid number",
    "max_steps: 1.5": "tune.trainer.max_steps: Input should be a valid integer",
    "optim: nonsense": "tune.trainer: nonsense is not a valid OptimizerNames",
    "output_dir: x": "tune.trainer.output_dir: the run decides where it writes",
    "seed: 3": "tune.trainer.seed: set the stage's own `seed`",
}


@pytest.mark.parametrize("block", BAD_BLOCKS)
def test_blocks_are_checked_by_the_library_they_are_for(experiment, block):
    found = experiment(stages(f"  tune: {{model: a/b, trainer: {{{block}}}}}\n"))
    with pytest.raises(SettingsError) as error:
        check_libraries(found)
    assert BAD_BLOCKS[block] in str(error.value)


def test_a_good_block_passes(experiment):
    block = "learning_rate: 3e-4, max_steps: 10, lr_scheduler_type: cosine, logging_steps: 0.1"
    check_libraries(experiment(stages(f"  tune: {{model: a/b, trainer: {{{block}}}}}\n")))


def test_settings_cannot_change_after_loading(experiment):
    with pytest.raises(ValueError, match="frozen"):
        experiment().stages["train"].steps = 5


def test_the_file_is_named_by_the_path_that_was_given(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment()
    assert load("toy.yaml").path == Path("toy.yaml")
