"""Sample stage: which prompts, which replies, and what an item is made of."""

from itertools import combinations

import pytest

from annotate.records import Completion, Item, read
from reward.batch import Example
from reward.model import load_policy
from reward.tokens import logprobs, prompt_ids
from stages import sample
from stages.config import UserError, load
from stages.errors import SettingsError
from stages.manifest import Input
from stages.measures import score_items
from stages.plan import run_key
from tests import tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("policy"), "llama"))


def stage(path, policy, rows, seed=0, **settings):
    path.mkdir(parents=True, exist_ok=True)
    run = tiny.run_in(path / "run", "sample", seed, policy=Input(ref="sft", path=policy, digest="abc"))
    prompts = tiny.rows_file(path / "records.jsonl", rows)
    chosen = {"max_new_tokens": 6, "train": 8, "held_out": 3} | settings
    sample.main(sample.Config(policy=policy, prompts=prompts, **chosen), run)
    return run


def rows():
    train = tiny.records(12, "preference", completion=False)
    held_out = tiny.records(20, "preference", "test", completion=False)[12:]
    return train + held_out + tiny.records(30, "sft")[20:]


@pytest.fixture(scope="module")
def done(tmp_path_factory, policy):
    path = tmp_path_factory.mktemp("sample")
    run = stage(path, policy, rows(), completions=3)
    return run, read(run.path / "completions.jsonl", Completion), read(run.path / "items.jsonl", Item)


def test_as_many_prompts_as_asked_of_each_side(done):
    run, completions, items = done
    assert len(completions) == 11 * 3
    assert {c.id for c in completions if c.split == "train"} <= {r.id for r in rows()[:12]}
    assert len({c.id for c in completions if c.split == "train"}) == 8
    assert len({c.id for c in completions if c.split == "test"}) == 3
    assert run.manifest.metrics["prompts"] == 11 and run.manifest.metrics["items"] == len(items)


def test_logprobs_and_texts_are_those_of_the_tokens(done, policy):
    model, tokenizer = load_policy(policy)
    for completion in done[1]:
        example = Example(prompt_ids(tokenizer, completion.prompt), (completion.tokens,))
        assert completion.logprobs == pytest.approx(logprobs(model, [example])[0][0], abs=1e-5)
        kept = completion.tokens[:-1] if completion.stopped else completion.tokens
        assert completion.completion == tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        assert completion.policy == "abc"


def test_items_hold_the_distinct_replies_of_one_prompt(done):
    _, completions, items = done
    assert items and all(item.policies == ["abc"] * len(item.completions) for item in items)
    for item in items:
        replies = [c.completion for c in completions if c.id == item.id]
        assert item.completions == list(dict.fromkeys(replies))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, policy, done):
    again = stage(tmp_path / "again", policy, rows(), completions=3)
    other = stage(tmp_path / "other", policy, rows(), seed=1, completions=3)
    first = (done[0].path / "completions.jsonl").read_bytes()
    assert (again.path / "completions.jsonl").read_bytes() == first
    assert (other.path / "completions.jsonl").read_bytes() != first


def test_a_reply_does_not_depend_on_which_other_prompts_there_are(tmp_path, policy, done):
    fewer = stage(tmp_path, policy, rows(), completions=3, train=2, held_out=1)
    found = {(c.id, tuple(c.tokens)) for c in read(fewer.path / "completions.jsonl", Completion)}
    assert found <= {(c.id, tuple(c.tokens)) for c in done[1]}


def test_identical_replies_make_no_item():
    record = tiny.records(1, "preference", completion=False)[0]
    shared = record.model_dump(exclude={"completion"})
    replies = [
        Completion(**shared, policy="p", completion=text, tokens=[5], logprobs=[0.0], stopped=True)
        for text in ("same", "same")
    ]
    assert sample.to_items(replies) == []


def test_every_choice_of_so_many_replies_is_an_item(tmp_path, policy):
    run = stage(tmp_path, policy, rows(), completions=3, per_item=2)
    items = read(run.path / "items.jsonl", Item)
    sampled = {}
    for completion in read(run.path / "completions.jsonl", Completion):
        sampled.setdefault(completion.id, []).append(completion.completion)
    expected = [
        (id_, list(pair)) for id_, texts in sampled.items() for pair in combinations(dict.fromkeys(texts), 2)
    ]
    assert [(item.id, item.completions) for item in items] == expected
    assert len(items) > run.manifest.metrics["prompts"] == 11
    assert run.manifest.metrics["without_item"] == 11 - len({item.id for item in items})


def test_an_item_cannot_show_more_replies_than_there_are(policy):
    with pytest.raises(ValueError, match="per_item 3: there are 2 completions to choose from"):
        sample.Config(policy=policy, prompts="records.jsonl", per_item=3)


def test_no_prompt_to_answer(tmp_path, policy):
    with pytest.raises(UserError, match="no prompt of use `preference` in the training split"):
        stage(tmp_path, policy, tiny.records(3, "sft"))


def test_a_prompt_too_long_is_named(tmp_path, policy):
    record = tiny.records(1, "preference", completion=False)[0]
    long = [record.prompt[0].model_copy(update={"content": "word " * 200})]
    with pytest.raises(ValueError, match=record.id):
        stage(tmp_path, policy, [record.model_copy(update={"prompt": long})])


def test_a_reward_model_puts_first_what_it_is_least_sure_about(tmp_path, policy):
    from reward.model import new_reward_model, save

    model, tokenizer = new_reward_model(policy)
    save(model, tokenizer, tmp_path / "reward")
    run = stage(tmp_path, policy, rows(), completions=3, reward=str(tmp_path / "reward"))
    plain = stage(tmp_path / "plain", policy, rows(), completions=3)
    items, without = (read(r.path / "items.jsonl", Item) for r in (run, plain))
    assert [item.model_copy(update={"priority": None}) for item in items] == without
    scores = score_items(str(tmp_path / "reward"), items)
    assert [item.priority for item in items] == [min(of_item) - max(of_item) for of_item in scores]
    assert len({item.priority for item in items}) > 1 and all(item.priority <= 0 for item in items)
    assert (
        b"priority" not in (plain.path / "items.jsonl").read_bytes()
    )  # the bytes from before there were any


def test_the_least_spread_of_scores_has_the_highest_priority():
    [first, *_] = [
        Item(id="a", split="train", use="preference", prompt=tiny.records(1)[0].prompt, completions=["a"])
    ]
    scored = sample.prioritised([first] * 3, [[1.0, 3.0], [0.5, 0.0], [2.0, 2.5, 5.0]])
    assert [item.priority for item in scored] == [-2.0, -0.5, -3.0]


def test_the_keys_of_runs_without_a_reward_model_stay(policy):
    inputs = {
        name: Input(ref=name, path=name, digest=digest)
        for name, digest in (("policy", "abc"), ("prompts", "def"))
    }
    config = sample.Config(policy="sft", prompts="prepare", seed=0)
    key = run_key("sample", config, inputs)
    assert (
        key == "889d916fd5dadd47b975066f95539e0274da9ba66df0d7a4a24f395773d4a8b9"
    )  # before there was `reward`
    scored = config.model_copy(update={"reward": "rm"})
    reward = Input(ref="rm", path="rm", digest="ghi")
    assert run_key("sample", scored, inputs | {"reward": reward}) != key


def test_a_second_round_reads_the_reward_model_of_the_first(tmp_path):
    (tmp_path / "two.yaml").write_text("""
name: two
stages:
  prepare: {data: helpdesk}
  sample: {policy: some-model, prompts: prepare}
  collect: {items: sample}
  rm: {policy: some-model, judgements: collect}
  sample-2: {stage: sample, policy: some-model, prompts: prepare, reward: rm}
""")
    assert load(tmp_path / "two.yaml").uses("sample-2") == ["prepare", "rm"]
    with pytest.raises(SettingsError, match="in a circle"):
        load(tmp_path / "two.yaml", ["sample.reward=rm"])
