"""The result table: its numbers, its files and its page, from made-up evaluation rows."""

import csv
import gzip
import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from annotate.records import DataError, Evaluation, Judgement, Message, prompt_id, write
from stages import page, plots, report
from stages.config import UserError
from stages.manifest import Input, Manifest, load_manifest
from stages.run import Run
from stages.table import HEALTH, QUALITY, Number, RunFacts, grid, point, to_csv
from stages.tabulate import Scored, compute

POLICIES = {  # gold, KL, share that stops
    "base": (0.3, 9.0, 0.4),
    "sft": (1.5, 0.0, 0.99),
    "best-of-8 (rm)": (2.6, None, 0.99),
    "dpo": (3.2, 6.0, 0.99),
    "ppo": (3.6, 11.0, 0.99),
}


def rows(seeds=(0,), prompts=40, gold=True, policies=POLICIES, **changes):
    """Evaluation rows whose differences between policies are known but for noise."""
    made = []
    for seed in seeds:
        rng = random.Random(seed)
        for policy, (score, kl, stopping) in policies.items():
            for i in range(prompts):
                prompt = [Message(role="user", content=f"My kettle {i} | <b>broke</b>. *Help*?")]
                value = min(5.0, max(0.0, score + random.Random(i).gauss(0, 0.3) + rng.gauss(0, 0.7)))
                settings = {
                    "completion": f"Dear Ann,\nsorry about kettle {i}.",
                    "length": 20 + i % 5,
                    "stopped": rng.random() < stopping,
                    "gold": value if gold else None,
                    "reward": value - 2 + rng.gauss(0, 0.3),
                    "kl": kl and kl + rng.gauss(0, 2),
                    "win": None,
                    "repetition": 0.0,
                    "base_loss": 1.8 + rng.gauss(0, 0.1),
                    "lexicon": 1.0,
                }
                identity = {"id": prompt_id(prompt), "split": "test", "use": "policy", "prompt": prompt}
                made.append(
                    Scored(**identity, policy=policy, seed=seed, **settings | changes.get(policy, {}))
                )
    if gold:
        sft = {(row.seed, row.id): row.gold for row in made if row.policy == "sft"}
        made = [
            row.model_copy(update={"win": 0.5 + 0.5 * ((row.gold > sft[k]) - (row.gold < sft[k]))})
            for row in made
            if (k := (row.seed, row.id))
        ]
    return made


def rollouts(seeds=(0,), steps=5):
    return {
        seed: [
            plots.Sampled(step=1 + s, id=str(i), reward=s + i / 10, kl=s * s / 2 - 0.01, gold=1 + s / 5)
            for s in range(steps)
            for i in range(8)
        ]
        for seed in seeds
    }


def table(**options):
    return compute(rows(**options), "quickstart", "prefloop run configs/quickstart.yaml", maximum=5.0)


def line(found, policy):
    return next(one for one in found.lines if one.policy == policy)


def test_numbers_are_means_over_prompts():
    made = rows()
    ppo = [row for row in made if row.policy == "ppo"]
    found = line(compute(made, "x", maximum=5.0), "ppo")
    assert found.metrics["gold"].value == pytest.approx(statistics.fmean(r.gold for r in ppo))
    assert found.metrics["win"].value == pytest.approx(statistics.fmean(r.win for r in ppo))
    assert found.metrics["gold"].low < found.metrics["gold"].value < found.metrics["gold"].high
    assert found.metrics["gold"].sd_over_seeds is None
    assert (found.prompts, found.rows) == (40, 40)


def test_headroom_closed_is_the_share_of_what_sft_leaves():
    found = table()
    sft, ppo = (line(found, p).metrics["gold"].value for p in ("sft", "ppo"))
    closed = line(found, "ppo").metrics["headroom"]
    assert closed.value == pytest.approx((ppo - sft) / (5 - sft))
    assert closed.low < closed.value < closed.high
    assert line(found, "base").metrics["headroom"].value < 0
    assert "headroom" not in line(found, "sft").metrics


def test_several_seeds_keep_intervals_by_prompt_and_show_their_spread():
    found = line(table(seeds=(0, 1, 2)), "ppo")
    means = [statistics.fmean(r.gold for r in rows(seeds=(s,)) if r.policy == "ppo") for s in (0, 1, 2)]
    assert (found.prompts, found.rows) == (40, 120)
    assert found.metrics["gold"].value == pytest.approx(statistics.fmean(means))
    assert found.metrics["gold"].sd_over_seeds == pytest.approx(statistics.stdev(means))


def test_difference_is_paired_and_has_a_detectable_effect():
    found = table()
    ppo, sft = line(found, "ppo"), line(found, "sft")
    assert ppo.metrics["difference"].value == pytest.approx(
        ppo.metrics["gold"].value - sft.metrics["gold"].value
    )
    assert 0 < ppo.detectable < 1
    assert sft.detectable is None and "difference" not in sft.metrics
    assert sft.metrics["win"] == Number(value=0.5)


def test_without_gold_the_proxy_is_called_a_proxy():
    made = rows(gold=False)
    found = compute(made, "hh")
    assert found.measure == "reward"
    assert not {"gold", "headroom", "win"} & line(found, "ppo").metrics.keys()
    assert line(found, "ppo").metrics["proxy_win"].value > 0.8
    assert "gold" not in to_csv(found).splitlines()[0]
    text = page.render(found, made, [])
    assert "proxy" in page.headline(found) and "Gold" not in text and "No truth is known" in text


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"stopped": False}, "stops by itself in 0.0%"),
        ({"repetition": 0.4}, "repeats 40.0% of its 4-grams"),
        ({"base_loss": 3.0}, "base-model loss 3.00"),
        ({"lexicon": 0.5}, "50.0% of its words"),
    ],
)
def test_a_degenerate_policy_is_marked(change, warning):
    found = table(ppo=change)
    assert warning in line(found, "ppo").warnings[0]
    assert line(found, "dpo").warnings == []
    assert any(cells[0] == "ppo ‡" for cells in grid(found, QUALITY, " ")[1])


def test_a_failed_gate_marks_the_row():
    found = table()
    found.runs = {"q/rm/1": RunFacts(failed=["accuracy above chance"]), "q/sft/2": RunFacts()}
    line(found, "ppo").runs = ["q/rm/1", "q/sft/2"]
    line(found, "sft").runs = ["q/sft/2"]
    assert found.name(line(found, "ppo")) == "ppo †"
    assert found.name(line(found, "sft")) == "sft"
    cells = {row["policy"]: row for row in csv.DictReader(io.StringIO(to_csv(found)))}
    assert cells["ppo"]["failed_gates"] == "accuracy above chance"
    assert "† ppo: built although a check failed: accuracy above chance." in page.render(found, rows(), [])


def test_policies_must_have_answered_the_same_prompts():
    made = rows()
    with pytest.raises(DataError, match="'ppo' and 'sft' were not asked the same prompts"):
        compute(made[:-1], "x")
    with pytest.raises(DataError, match="no rows of the policy 'sft'"):
        compute([row for row in made if row.policy != "sft"], "x")


def test_table_can_be_computed_again_from_published_records(tmp_path):
    """By arithmetic of its own: nothing of the project but the file format."""
    made = rows(seeds=(0, 1))
    write(tmp_path / "records.jsonl.gz", made)
    with gzip.open(tmp_path / "records.jsonl.gz", "rt") as file:
        records = [json.loads(text) for text in file]
    for cells in csv.DictReader(io.StringIO(to_csv(compute(made, "x", maximum=5.0)))):
        mine = [r for r in records if r["policy"] == cells["policy"]]
        expected = {"kl": f"{math.log(8) - 7 / 8:.6f}"}  # best of 8
        for name in (
            "gold",
            "win",
            "reward",
            "kl",
            "length",
            "stopped",
            "repetition",
            "base_loss",
            "lexicon",
        ):
            values = [r[name] for r in mine if r[name] is not None]
            assert cells[name] == (
                f"{statistics.fmean(map(float, values)):.6f}" if values else expected[name]
            ), name
        if cells["policy"] == "ppo":
            sft = [r["gold"] for r in records if r["policy"] == "sft"]
            closed = (sum(r["gold"] for r in mine) - sum(sft)) / (5 * len(sft) - sum(sft))
            assert cells["headroom"] == f"{closed:.6f}"
            assert cells["seeds"] == "2"


def test_csv_is_the_same_bytes_and_has_no_negative_zero():
    found = table()
    assert to_csv(found) == to_csv(table())
    line(found, "sft").metrics["kl"] = Number(value=-1e-9)
    assert "-0.000000" not in to_csv(found)


def test_cells_show_bounds_and_intervals():
    found = table()
    cells = {row[0]: row for row in grid(found, QUALITY, " ")[1]}
    assert cells["best-of-8 (rm)"][-1] == "≤ 1.20"
    assert cells["sft"][-1] == "0.00"
    assert "bound" in to_csv(found)
    assert grid(found, HEALTH, " ")[0][0] == "Policy"


def test_page_escapes_what_models_and_customers_write():
    text = page.render(table(), rows(), [("training.png", "Scores.")])
    assert "<b>" not in text and "&lt;b&gt;broke" in text
    assert r"\*Help\*" in text and re.search(r"kettle \d+ \\\| ", text)
    assert "![Scores.](training.png)" in text
    assert text.count("**user:**") == 10


def test_samples_are_the_same_prompts_whatever_the_policies_say():
    prompts = [
        [text for text in page.render(table(**o), rows(**o), []).splitlines() if "**user:**" in text]
        for o in ({}, {"ppo": {"completion": "Other."}})
    ]
    assert prompts[0] == prompts[1]


def test_plots_are_drawn_and_are_the_same_bytes(tmp_path):
    found = table(seeds=(0, 1))
    for name in ("a", "b"):
        plots.training(rollouts((0, 1)), found, tmp_path / f"{name}-training.png")
        plots.frontier(rollouts((0, 1)), found, tmp_path / f"{name}-frontier.png")
    for kind in ("training", "frontier"):
        first = (tmp_path / f"a-{kind}.png").read_bytes()
        assert first.startswith(b"\x89PNG") and len(first) > 10_000
        assert first == (tmp_path / f"b-{kind}.png").read_bytes()


SWEEP = {
    "sft": (1.5, 0.0, 0.99),
    **{f"best-of-{n} ({judge})": (1.5 + n / 8, None, 0.99) for judge in ("rm", "rubric") for n in (2, 4, 8)},
    **{f"dpo β={beta}": (3.4 - beta, 6 * (1 - beta), 0.99) for beta in (0.1, 0.3, 0.9)},
    "kto": (2.9, 4.0, 0.99),
}


def test_points_of_a_method_are_one_line_of_the_frontier(tmp_path, monkeypatch):
    found = table(policies=SWEEP)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda fig, path, tight=True: drawn.append(fig))
    plots.frontier({}, found, tmp_path / "frontier.png")
    [ax] = drawn[0].axes  # the score that counts, alone
    curves = [one for one in ax.lines if len(one.get_xdata()) == 3]
    assert len(curves) == 3
    assert all(list(one.get_xdata()) == sorted(one.get_xdata()) for one in curves)
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("n=2") == 2 and {"0.1", "0.3", "0.9"} <= set(texts)
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["sft", "best-of-n (rm), KL bound", "best-of-n (rubric), KL bound", "dpo", "kto"]


def test_each_quantity_swept_has_a_panel(tmp_path, monkeypatch):
    more = {
        f"dpo{of}": (2.5, 1.0 + i, 0.99)
        for i, of in enumerate((" β=0.5 steps=120", " steps=40", " steps=360"))
    }
    found = table(policies=SWEEP | more)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda fig, path, tight=True: drawn.append(fig))
    plots.frontier({}, found, tmp_path / "frontier.png")
    over_beta, over_steps = drawn[0].axes
    texts = [{text.get_text() for text in ax.texts} for ax in (over_beta, over_steps)]
    assert texts[0] & texts[1] == {"n=2", "n=4", "n=8", "maximum"}
    assert texts[0] - texts[1] == {"0.1", "0.3", "0.5", "0.9"}
    assert texts[1] - texts[0] == {"40", "120", "360"}
    assert "over β" in over_beta.get_title(loc="left") and "over steps" in over_steps.get_title(loc="left")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["sft", "best-of-n (rm), KL bound", "best-of-n (rubric), KL bound", "dpo", "kto"]


def test_the_headline_names_the_best_point_of_each_method():
    found = page.headline(table(policies=SWEEP))
    assert re.fullmatch(r".*closed: dpo β=0.1 \d+ % \[.*\], kto \d+ % \[.*\]\.", found)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("dpo", ("dpo", "")),
        ("dpo β=0.3", ("dpo", "β=0.3")),
        ("best-of-16 (rubric)", ("best-of-n (rubric)", "n=16")),
        ("best-of-luck", ("best-of-luck", "")),
    ],
)
def test_the_name_of_a_policy_says_method_and_point(policy, expected):
    assert point(policy) == expected


def made(runs, stage, seed, inputs=None, gate=True, **recorded):
    """The folder of a complete run of `stage` whose inputs are (folder, artifact) of other such runs."""
    folder = runs / "quickstart" / stage / f"{stage}{seed}"
    manifest = Manifest(experiment="quickstart", stage=stage, kind=stage, seed=seed)
    for field, (source, artifact) in (inputs or {}).items():
        manifest.inputs[field] = Input(
            ref=source.parent.name, path=str(source / artifact), digest="d", run=str(source)
        )
    run = Run(folder, manifest, gate="warn")
    with run.recorded():
        run.record(**recorded)
        run.gate("accuracy above chance", gate, "0.51 of 200 pairs")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of two seeds up to evaluate: the reward model of seed 1 failed its check."""
    runs = tmp_path_factory.mktemp("runs")
    evaluations = []
    for seed in (0, 1):
        collect = made(runs, "collect", seed)
        prompt = [Message(role="user", content="Hi.")]
        told = {"id": "a", "split": "train", "use": "preference", "prompt": prompt, "completions": ["x", "y"]}
        verdicts = [
            Judgement(**told, annotator=str(i), kind="person", round="r", preference=1) for i in range(3)
        ]
        write(collect / "judgements.jsonl", verdicts)
        sft = made(runs, "sft", seed)
        judged = {"judgements": (collect, "judgements.jsonl"), "policy": (sft, "model")}
        rm, dpo = made(runs, "rm", seed, judged, gate=seed == 0), made(runs, "dpo", seed, judged)
        ppo = made(runs, "ppo", seed, {"policy": (sft, "model"), "reward": (rm, "model")})
        folders = {"sft": sft, "dpo": dpo, "ppo": ppo, "base": made(runs, "pretrain", seed)}
        inputs = {f"policies.{name}": (folder, "model") for name, folder in folders.items()}
        made_from = {name: [f"policies.{name}"] for name in folders}
        folder = made(
            runs,
            "evaluate",
            seed,
            inputs | {"reward": (rm, "model")},
            made_from=made_from | {"best-of-8 (rm)": ["policies.sft", "reward"]},
            gold_maximum=5.0,
            reward_agreement={"value": 0.9, "low": 0.86, "high": 0.93, "pairs": 250},
            demonstrations={"value": 2.1, "low": 2.0, "high": 2.2},
        )
        plain = [Evaluation(**row.model_dump(exclude={"seed"})) for row in rows(seeds=(seed,))]
        write(folder / "records.jsonl", plain)
        write(folder / "training.jsonl", rollouts()[0])
        evaluations.append(folder)
    return evaluations


def make(folder, evaluations, training=True):
    config = report.Config(
        evaluations=[str(e / "records.jsonl") for e in evaluations],
        training=[str(e / "training.jsonl") for e in evaluations] if training else [],
    )
    command = f"prefloop run {Path.cwd()}/configs/quickstart.yaml prepare.data=/a/rows.jsonl --seeds 0,1"
    run = Run(folder, Manifest(experiment="quickstart", stage="report", kind="report", command=command))
    with run.recorded():
        report.main(config, run)
    return folder


@pytest.fixture(scope="module")
def reported(world, tmp_path_factory):
    return make(tmp_path_factory.mktemp("report") / "run", world)


def test_report_writes_all_it_announces(reported):
    names = {path.name for path in reported.iterdir() if not path.name.startswith(".")}
    assert names == {"manifest.json", "training.png", "frontier.png", *report.FILES}
    manifest = load_manifest(reported)
    assert manifest.status == "complete" and set(manifest.outputs) == names - {"manifest.json"}
    assert 0 < manifest.metrics["headroom/ppo"] < 1


def test_lineage_of_every_row(reported):
    found = report.load(reported)
    runs = {one.policy: one.runs for one in found.lines}
    assert runs["ppo"][:4] == [
        "quickstart/ppo/ppo0",
        "quickstart/sft/sft0",
        "quickstart/rm/rm0",
        "quickstart/collect/collect0",
    ]
    assert "quickstart/rm/rm1" in runs["best-of-8 (rm)"] and "quickstart/ppo/ppo1" in runs["ppo"]
    assert runs["sft"] == ["quickstart/sft/sft0", "quickstart/sft/sft1"]
    labels = {one.policy: one.labels for one in found.lines}
    assert labels == {"base": "", "sft": "", "best-of-8 (rm)": "people", "dpo": "people", "ppo": "people"}
    assert found.runs["quickstart/rm/rm0"].judgements == {"person": 3}
    assert found.failed(line(found, "ppo")) == ["accuracy above chance (0.51 of 200 pairs)"]
    assert found.failed(line(found, "dpo")) == []


def test_page_says_who_judged_and_how_it_was_made(reported):
    text = (reported / "README.md").read_text()
    assert "Judgements behind the trained rows: people." in text
    assert "prefloop run configs/quickstart.yaml prepare.data=rows.jsonl --seeds 0,1" in text
    assert (
        "2.10 [2.00, 2.20] in gold" in text
        and "0.90 [0.86, 0.93]" in text
        and "3 judgements (person)" in text
    )
    assert str(reported.parent) not in text


def test_csv_depends_on_nothing_but_the_rows(reported, world, tmp_path):
    again = make(tmp_path / "elsewhere", world)
    text = (reported / "table.csv").read_text()
    assert text == (again / "table.csv").read_text()
    assert str(tmp_path) not in text and "ppo0" not in text and not re.search(r"20\d\d-\d\d", text)
    assert (reported / "records.jsonl.gz").read_bytes() == (again / "records.jsonl.gz").read_bytes()


def test_report_without_ppo_and_from_a_plain_file(world, tmp_path):
    write(
        tmp_path / "records.jsonl", [Evaluation(**r.model_dump(exclude={"seed"})) for r in rows(seeds=(0,))]
    )
    folder = make(tmp_path / "run", [tmp_path], training=False)
    assert not (folder / "training.png").exists()
    assert "unknown" in (folder / "README.md").read_text()


def test_show_prints_the_table_fast_and_plainly(reported):
    code = (
        "import sys; from stages.report import show; show(sys.argv[1]);"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(reported)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ppo †" in done.stdout and "Headroom" in done.stdout and "README.md" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 130


def test_publish_copies_and_indexes(reported, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "README.md").write_text("# Results\n\nWords of ours.\n")
    for _ in range(2):  # the second replaces the first
        folder = report.publish(reported, "quickstart", results)
    assert {p.name for p in folder.iterdir()} == {"training.png", "frontier.png", *report.FILES}
    index = (results / "README.md").read_text()
    assert index.startswith("# Results\n\nWords of ours.\n")
    assert index.count("[quickstart](quickstart/README.md): Share of the headroom") == 1
    assert {p.name for p in results.iterdir()} == {"README.md", "quickstart"}


def test_publish_refuses_what_is_not_complete(reported, tmp_path):
    manifest = load_manifest(reported)
    manifest.status = "failed"
    manifest.save(tmp_path / "run")
    with pytest.raises(UserError, match="is failed, and only a complete report can be published"):
        report.publish(tmp_path / "run", "quickstart", tmp_path / "results")
    assert not (tmp_path / "results").exists()
    with pytest.raises(UserError, match="not a run folder"):
        report.publish(tmp_path, "quickstart", tmp_path / "results")
