"""Evaluation: what is measured on a reply, on tiny models built here."""


import pytest
import torch

from annotate.records import Evaluation, Item, Message, Record, prompt_id, read, write
from stages import measures
from stages.config import UserError

THINGS = ("kettle", "lamp", "pan")
TEXTS = [f"Dear Ann, we are sorry about the {thing}. We will send a new one." for thing in THINGS]
    f"Dear Ann, we are sorry about the {thing}. We will send a new one."
    for thing in ("kettle", "lamp", "pan")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base model, two policies and a reward model that share a tokenizer, and one with another."""
    from reward.model import new_reward_model, save
    from stages import pretrain

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "sft", "ppo", "stranger"]):
        torch.manual_seed(seed)
        tokenizer = pretrain.train_tokenizer(TEXTS * 3 if name != "stranger" else ["xyz zyx"], 300)
        config = pretrain.Config(corpus="none", hidden=16, layers=2, heads=2, positions=96)
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


def test_reward_is_read_at_the_last_token(models, replies):
    from transformers import AutoModelForSequenceClassification

    flat = [reply for group in replies for reply in group]
    measures.measure_reward(str(models / "rm"), flat)
    model = AutoModelForSequenceClassification.from_pretrained(models / "rm").eval()
    for reply in flat:
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([reply.prompt + reply.tokens])).last_hidden_state
            expected = model.score(hidden[0, -1]).item()
        assert reply.reward == pytest.approx(expected, abs=1e-4)


def test_items_are_scored_reply_by_reply(models):
    prompt = [Message(role="user", content="Hi.")]
    item = Item(id="a", split="test", use="preference", prompt=prompt, completions=TEXTS[:2])
    turned = item.model_copy(update={"completions": TEXTS[1::-1]})
    (first,), (second,) = (
        measures.score_items(str(models / "rm"), [item]),
        measures.score_items(str(models / "rm"), [turned]),
    )
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
