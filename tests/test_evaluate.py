"""Evaluation: what is measured on a reply, on tiny models built here."""

import pytest
import torch

from annotate.records import Evaluation, Item, Message, Record, prompt_id, read, write
from stages import evaluate, measures
from stages.config import UserError
from stages.manifest import Manifest
from stages.run import Run
from tests import tiny

THINGS = ("kettle", "lamp", "pan")
TEXTS = [f"Dear Ann, sorry about the {thing}. We will send a new one." for thing in THINGS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of base, two policies and a reward model with one tokenizer, and of a stranger with another."""
    from reward.model import new_reward_model, save
    from stages import pretrain

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "sft", "ppo", "stranger"]):
        torch.manual_seed(seed)
        tokenizer = pretrain.train_tokenizer(TEXTS * 3 if name != "stranger" else ["xyz zyx"], 300)
        config = pretrain.Config(corpus="none", hidden=16, layers=2, heads=2, positions=512)
        save(pretrain.new_model(config, tokenizer), tokenizer, folder / name)
    save(*new_reward_model(folder / "sft"), folder / "rm")
    return folder


def records(count=6, split="test", use="policy", **settings):
    made = []
    for i in range(count):
        prompt = [Message(role="user", content=f"My kettle {i} broke.")]
        made.append(Record(id=prompt_id(prompt), split=split, use=use, prompt=prompt, **settings))
    return made


@pytest.fixture(scope="module")
def replies(models):
    """Two replies of `ppo` to each of six prompts."""
    from reward.model import load_tokenizer
    from reward.tokens import prompt_ids

    tokenizer, _ = load_tokenizer(models / "sft")
    asked = records()
    prompts = [prompt_ids(tokenizer, record.prompt) for record in asked]
    keys = [[f"0/evaluate/ppo/{record.id}/{k}" for k in range(2)] for record in asked]
    return measures.sample(str(models / "ppo"), asked, prompts, keys, 12, None)


def test_samples_belong_to_their_prompts(replies):
    assert [len(group) for group in replies] == [2] * 6
    for record, group in zip(records(), replies, strict=True):
        assert all(reply.record == record and 1 <= len(reply.tokens) <= 12 for reply in group)
        assert group[0].tokens != group[1].tokens


def test_kl_is_the_difference_of_log_probabilities(models, replies):
    """Against a forward pass of `transformers` on each reply alone."""
    from reward.model import load_policy

    flat = [reply for group in replies for reply in group]
    measures.measure_kl(str(models / "sft"), flat)

    def logprob(model, reply):
        ids = torch.tensor([reply.prompt + reply.tokens])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        start = len(reply.prompt) - 1
        return sum(logp[start + i, token].item() for i, token in enumerate(reply.tokens))

    sft, ppo = (load_policy(models / name)[0] for name in ("sft", "ppo"))
    for reply in flat:
        assert reply.kl == pytest.approx(logprob(ppo, reply) - logprob(sft, reply), abs=1e-4)


def test_kl_of_a_policy_to_itself_is_zero(models, replies):
    flat = [reply for group in replies for reply in group]
    measures.measure_kl(str(models / "ppo"), flat)
    assert all(reply.kl == pytest.approx(0, abs=1e-4) for reply in flat)


def test_base_loss_is_that_of_the_bare_text(models):
    from reward.model import load_policy

    def reply(text):
        return measures.Reply(records()[0], [1], [1], text, True, 0.0)

    twice, empty = [reply(TEXTS[0]), reply(TEXTS[0])], reply("")
    measures.measure_base_loss(str(models / "base"), [*twice, empty])
    model, tokenizer = load_policy(models / "base")
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert [r.base_loss for r in twice] == [pytest.approx(expected, abs=1e-4)] * 2
    assert empty.base_loss is None


def test_reward_is_read_over_the_whole_reply(models, replies):
    from transformers import AutoModelForSequenceClassification

    flat = [reply for group in replies for reply in group]
    measures.measure_reward(str(models / "rm"), flat)
    model = AutoModelForSequenceClassification.from_pretrained(models / "rm").eval()
    for reply in flat:
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([reply.prompt + reply.tokens])).last_hidden_state
            expected = model.score(hidden[0, len(reply.prompt) :]).mean().item()
        assert reply.reward == pytest.approx(expected, abs=1e-4)


def test_items_are_scored_reply_by_reply(models):
    prompt = [Message(role="user", content="Hi.")]
    item = Item(id="a", split="test", use="preference", prompt=prompt, completions=TEXTS[:2])
    turned = item.model_copy(update={"completions": TEXTS[1::-1]})
    (first,) = measures.score_items(str(models / "rm"), [item])
    (second,) = measures.score_items(str(models / "rm"), [turned])
    assert len(first) == 2 and second == pytest.approx(first[::-1], abs=1e-4)


def test_another_vocabulary_is_refused(models):
    measures.require_same_vocabulary("policies.ppo", str(models / "ppo"), str(models / "sft"))
    with pytest.raises(UserError, match=r"evaluate\.policies\.ppo: .*stranger has another vocabulary"):
        measures.require_same_vocabulary("policies.ppo", str(models / "stranger"), str(models / "sft"))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three", 0),
        ("one two three four five", 0),
        ("go go go go go go", 2 / 3),  # three 4-grams, all alike
        ("We are sorry. We ARE sorry, we are sorry", 3 / 6),
        ("", 0),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(text, share):
    assert measures.repetition(text) == pytest.approx(share)


def test_win_counts_ties_half():
    assert [measures.win(a, 1.0) for a in (2.0, 1.0, 0.0)] == [1, 0.5, 0]
    assert measures.win(None, 1.0) is None


@pytest.fixture(scope="module")
def helpdesk(tmp_path_factory):
    """Folder with records, items and rollouts of twelve tickets of the helpdesk."""
    from stages.helpdesk import world
    from stages.ppo_rollout import Rollout

    folder = tmp_path_factory.mktemp("helpdesk")
    tickets = world.tickets(0, 12)
    asked = [
        Record(id=prompt_id(t.prompt), split="test", use="policy", prompt=t.prompt, facts=t.facts)
        for t in tickets
    ]
    write(folder / "records.jsonl", [*asked, *records(3, split="train")])
    items = []
    for record, ticket in zip(asked, tickets, strict=True):
        pair = [world.demonstration(ticket, seed) for seed in (0, 1)]
        row = record.model_dump(exclude={"completion", "use"})
        items.append(Item(**row, use="preference", completions=pair))
    write(folder / "items.jsonl", items)
    replies = [world.demonstration(t, 0) for t in tickets]
    write(
        folder / "rollouts.jsonl",
        [
            Rollout(step=1, id=r.id, completion=text, reward=0.5, kl=0.1, length=9, stopped=True)
            for r, text in zip(asked, replies, strict=True)
        ],
    )
    return folder


def execute(config, folder, seed=0):
    """The stage in a run of its own; returns the run."""
    run = Run(folder, Manifest(experiment="test", stage="evaluate", kind="evaluate", seed=seed), gate="stop")
    with run.recorded():
        evaluate.main(config, run)
    return run


def settings(models, helpdesk, **changes):
    policies = {name: str(models / name) for name in ("base", "sft", "ppo")}
    inputs = {name: str(helpdesk / f"{name}.jsonl") for name in ("rollouts", "items")}
    inputs |= {"prompts": str(helpdesk / "records.jsonl"), "reward": str(models / "rm"), "policies": policies}
    chosen = {"gold": "helpdesk", "examples": 10, "best_of": 3, "max_new_tokens": 8}
    return evaluate.Config(**inputs | chosen | changes)


@pytest.fixture(scope="module")
def evaluated(models, helpdesk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "evaluate"
    run = execute(settings(models, helpdesk), folder)
    return run, read(folder / "records.jsonl", Evaluation)


def test_every_policy_answers_the_same_prompts_once(evaluated):
    _, rows = evaluated
    by_policy = {}
    for row in rows:
        by_policy.setdefault(row.policy, []).append(row)
    assert list(by_policy) == ["base", "sft", "best-of-3 (rm)", "best-of-3 (rubric)", "ppo"]
    ids = [row.id for row in by_policy["sft"]]
    assert ids == sorted(ids) and len(ids) == 10
    assert all([row.id for row in of_policy] == ids for of_policy in by_policy.values())


def test_rows_hold_what_was_measured(evaluated):
    from stages.helpdesk import rubric

    _, rows = evaluated
    sft = {row.id: row for row in rows if row.policy == "sft"}
    for row in rows:
        assert row.gold == rubric.score(row.facts, row.completion).total
        assert row.win == measures.win(row.gold, sft[row.id].gold)
        assert row.split == "test" and row.facts
        assert 1 <= row.length <= 8 and row.reward is not None and row.lexicon is not None
        assert (row.kl is None) == row.policy.startswith("best-of-")
    assert all(row.kl == 0 for row in sft.values())
    assert any(row.kl for row in rows if row.policy == "ppo")


def test_best_of_n_is_the_best_of_what_sft_said(evaluated):
    _, rows = evaluated
    sft, best, ceiling = (
        {row.id: row for row in rows if row.policy == policy}
        for policy in ("sft", "best-of-3 (rm)", "best-of-3 (rubric)")
    )
    assert all(best[id].reward >= sft[id].reward and ceiling[id].gold >= sft[id].gold for id in sft)
    assert any(best[id].reward > sft[id].reward for id in sft)


def test_several_sizes_of_best_of_n_choose_from_the_same_replies(models, helpdesk, tmp_path, evaluated):
    execute(settings(models, helpdesk, best_of=[1, 2, 3]), tmp_path)
    chosen = {}
    for row in read(tmp_path / "records.jsonl", Evaluation):
        chosen.setdefault(row.policy, {})[row.id] = row
    assert list(chosen)[1:6] == [
        "sft",
        *(f"best-of-{n} ({judge})" for judge in ("rm", "rubric") for n in (2, 3)),
    ]
    two, three = chosen["best-of-2 (rm)"], chosen["best-of-3 (rm)"]
    assert all(three[id].reward >= two[id].reward >= chosen["sft"][id].reward for id in two)
    _, alone = evaluated  # with n=3 only, another run
    assert [r for r in alone if r.policy == "best-of-3 (rm)"] == list(three.values())


def test_rollouts_get_their_true_score(evaluated, helpdesk):
    from stages.helpdesk import rubric
    from stages.ppo_rollout import Rollout

    run, _ = evaluated
    facts = {row.id: row.facts for row in read(helpdesk / "records.jsonl", Record)}
    scored = read(run.path / "training.jsonl", Rollout)
    assert [row.gold for row in scored] == [rubric.score(facts[r.id], r.completion).total for r in scored]


def test_manifest_holds_what_the_report_needs(evaluated):
    run, rows = evaluated
    facts, metrics = run.manifest.facts, run.manifest.metrics
    assert facts["made_from"]["best-of-3 (rm)"] == ["policies.sft", "reward"]
    assert metrics["gold_maximum"] == 10
    golds = [row.gold for row in rows if row.policy == "ppo"]
    assert metrics["gold/ppo"] == pytest.approx(sum(golds) / len(golds))
    assert 0 <= facts["reward_agreement"]["value"] <= 1 and facts["reward_agreement"]["pairs"] >= 2


def test_demonstrations_of_the_training_split_are_scored(models, helpdesk, tmp_path):
    from stages.helpdesk import rubric, world

    shown = [
        Record(
            id=prompt_id(ticket.prompt),
            split="train",
            use="sft",
            prompt=ticket.prompt,
            facts=ticket.facts,
            completion=world.demonstration(ticket, 0),
        )
        for ticket in world.tickets(5, 20)
    ]
    rows = read(helpdesk / "records.jsonl", Record)
    given = [*rows, *shown, shown[0].model_copy(update={"split": "test"})]
    run = tiny.run_in(tmp_path / "run", "evaluate")
    evaluate.score_demonstrations(given, run, evaluate.World())
    golds = [rubric.score(row.facts, row.completion).total for row in shown]
    found = run.manifest.facts["demonstrations"]
    assert found["value"] == pytest.approx(sum(golds) / 20) and found["low"] < found["value"] < found["high"]


def test_same_seed_same_bytes_and_another_seed_other_replies(models, helpdesk, evaluated, tmp_path):
    run, _ = evaluated
    config = settings(models, helpdesk)
    again, other = execute(config, tmp_path / "again"), execute(config, tmp_path / "other", seed=1)
    first, second, third = ((r.path / "records.jsonl").read_bytes() for r in (run, again, other))
    assert first == second != third


def test_without_gold_only_the_proxy_is_measured(models, helpdesk, tmp_path):
    config = settings(models, helpdesk, gold="none", rollouts=None, examples=4)
    run = execute(config, tmp_path / "run")
    rows = read(run.path / "records.jsonl", Evaluation)
    assert {row.policy for row in rows} == {"base", "sft", "best-of-3 (rm)", "ppo"}
    assert all(row.gold is None and row.win is None and row.lexicon is None for row in rows)
    assert (run.path / "training.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 500}, "12 of 12 test prompts leave no room for max_new_tokens=500"),
        ({"reward": "stranger"}, r"evaluate\.reward: .* has another vocabulary"),
        ({"reward": "sft"}, "not a reward model"),
    ],
)
def test_bad_input_ends_in_one_line(models, helpdesk, tmp_path, changes, message):
    if "reward" in changes:
        changes = {"reward": str(models / changes["reward"])}
    with pytest.raises((UserError, ValueError), match=message) as caught:
        execute(settings(models, helpdesk, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_sft_must_be_among_the_policies():
    with pytest.raises(ValueError, match="one policy must be named sft"):
        evaluate.Config(policies={"ppo": "x"}, prompts="y")
