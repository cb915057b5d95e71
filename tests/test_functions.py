"""Reward functions: who is called with what, how it adds up, and one clear line for whatever is no reward."""

import itertools
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from annotate.records import DataError
from reward.batch import Example
from reward.functions import RewardError, Rewards, RunningScale
from reward.model import load_reward, load_tokenizer, new_reward_model, save
from reward.tokens import completion_ids, rewards
from stages.pretrain import train_tokenizer
from tests import tiny

TEXTS = ["Sorry about the kettle.", "Which one?", "We will send you a new lamp today."]
PROMPTS = [
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "My kettle broke."}],
    [{"role": "user", "content": "It broke."}],
    [{"role": "user", "content": "My lamp number 3 broke."}],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model with the policy's tokenizer, one with another, and the policy itself."""
    made = tmp_path_factory.mktemp("functions")
    torch.manual_seed(0)
    policy = tiny.save_folder(made / "policy", "llama")
    save(*new_reward_model(policy), made / "same")
    other = train_tokenizer(["quite other words, and merges of their own"] * 3, 280)
    tiny.model_of("gpt2", other).save_pretrained(made / "base")
    other.save_pretrained(made / "base")
    model, tokenizer = new_reward_model(made / "base")
    model.config.reward_reads = "last"  # as in the models of others
    save(model, tokenizer, made / "other")
    return {"policy": policy, "same": made / "same", "other": made / "other"}


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders["policy"])[0]


def sampled(tokenizer, prompts=PROMPTS, texts=TEXTS, cut=()):
    """(prompts, completions, prompt_ids, completion_ids) as a trainer has them; `cut` lack the stop token."""
    if isinstance(prompts[0], str):
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        prompt_ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        ]
    ids = [completion_ids(tokenizer, text) for text in texts]
    ids = [reply[:-1] if i in cut else reply for i, reply in enumerate(ids)]
    return prompts, texts, prompt_ids, ids


def length(completions):
    return [float(len(text)) for text in completions]


def per_token(completion_ids):
    return [[0.5 * t for t in range(len(ids))] for ids in completion_ids]


def test_a_function_gets_what_it_takes_and_one_with_kwargs_gets_everything(tokenizer):
    seen = {}

    def all_of_it(prompts, completions, prompt_ids, completion_ids, **columns):
        seen["all"] = (prompts, completions, prompt_ids, completion_ids, columns)
        return [1.0, 2.0, 3.0]

    def one_column(completions, product, tone="kind"):
        seen["one"] = (completions, product, tone)
        return [0.0, 0.0, 0.0]

    batch = sampled(tokenizer)
    columns = {"product": ["kettle", "pan", "lamp"], "id": [1, 2, 3]}
    assert Rewards([all_of_it, one_column], tokenizer)(*batch, columns).totals == [1.0, 2.0, 3.0]
    assert seen["all"] == (*batch, columns)
    assert seen["one"] == (TEXTS, columns["product"], "kind")


def test_weighted_sums_of_numbers_and_of_lists_per_token(tokenizer):
    batch = sampled(tokenizer)
    scores = Rewards([length, per_token, per_token], tokenizer, weights=[0.1, 2.0, 1.0])(*batch)
    lengths = [len(ids) for ids in batch[3]]
    assert scores.scalars == pytest.approx([0.1 * len(text) for text in TEXTS])
    assert scores.tokens is not None and [len(row) for row in scores.tokens] == lengths
    assert scores.tokens[1] == pytest.approx([1.5 * t for t in range(lengths[1])])
    sums = [0.5 * n * (n - 1) / 2 for n in lengths]
    assert scores.by_function["length"] == [len(text) for text in TEXTS]  # without weights
    assert scores.by_function["per_token_2"] == pytest.approx(sums)
    assert scores.totals == pytest.approx(
        [0.1 * len(text) + 3.0 * s for text, s in zip(TEXTS, sums, strict=True)]
    )
    assert Rewards(length, tokenizer)(*batch).tokens is None
    assert Rewards(per_token, tokenizer)(*batch).scalars == [0.0, 0.0, 0.0]


def test_numbers_may_come_as_arrays_tensors_and_booleans(tokenizer):
    batch = sampled(tokenizer)
    returned = {
        "tensor": torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
        "array": np.array([1, 0, 1]),
        "tuple": (True, False, True),
        "scalars": [np.float32(1), torch.tensor(0), 1],
    }
    for value in returned.values():
        assert Rewards(lambda completions, value=value: value, tokenizer)(*batch).totals == [1.0, 0.0, 1.0]
    rows = [torch.ones(len(ids)) for ids in batch[3]]
    assert Rewards(lambda completions: rows, tokenizer)(*batch).totals == [len(ids) for ids in batch[3]]


def test_names_are_those_of_functions_and_models(folders, tokenizer):
    class Brevity:
        def __call__(self, completions):
            return [0.0] * len(completions)

    funcs = [length, Brevity(), partial(length), folders["same"], f"{folders['other']}/"]
    assert Rewards(funcs, tokenizer).names == ["length", "Brevity", "length_2", "same", "other"]
    model, own = load_reward(folders["same"])
    assert Rewards(model, tokenizer, processing_classes=own).names == ["same"]


@pytest.mark.parametrize("cut", [(), (1,)])
def test_a_model_of_the_same_tokens_scores_the_ids_that_were_sampled(folders, tokenizer, cut):
    prompts, texts, prompt_ids, ids = sampled(tokenizer, cut=cut)
    ids[0] = ids[0][:1] + ids[0][2:]  # not what the text would be tokenised to
    model, own = load_reward(folders["same"])
    examples = [Example(p, (c,)) for p, c in zip(prompt_ids, ids, strict=True)]
    expected = [score for (score,) in rewards(model, examples)]
    for given in (str(folders["same"]), model):
        found = Rewards(given, tokenizer)
        assert found(prompts, texts, prompt_ids, ids).totals == pytest.approx(expected, abs=1e-6)
        assert len(found.models) == 1
    found = Rewards(model, tokenizer, processing_classes=[own])
    assert found(prompts, texts, prompt_ids, ids).scalars == pytest.approx(expected, abs=1e-6)
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(expected, 2))


def plain(model, ids):
    """Oracle: the forward pass of transformers over one row."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def test_a_model_of_other_tokens_reads_the_conversation_in_its_own(folders, tokenizer):
    model, own = load_reward(folders["other"])
    assert len(own) != len(tokenizer)
    whole = [
        own.apply_chat_template([*prompt, {"role": "assistant", "content": text}], return_dict=False)
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
    ]
    assert all(ids[-1] == own.eos_token_id for ids in whole)
    found = Rewards(folders["other"], tokenizer)(*sampled(tokenizer)).totals
    assert found == pytest.approx([plain(model, ids) for ids in whole], abs=1e-5)
    cut = Rewards(folders["other"], tokenizer)(*sampled(tokenizer, cut=(1,))).totals
    assert cut == pytest.approx([found[0], plain(model, whole[1][:-1]), found[2]], abs=1e-5)
    assert abs(cut[1] - found[1]) > 1e-4


def test_a_model_of_other_tokens_reads_plain_text_in_its_own(folders, tokenizer):
    model, own = load_reward(folders["other"])
    prompts = [f"Q: {word} broke\nA:" for word in ("kettle", "it", "lamp")]
    expected = [
        plain(model, own(prompt)["input_ids"] + own(text)["input_ids"] + [own.eos_token_id])
        for prompt, text in zip(prompts, TEXTS, strict=True)
    ]
    found = Rewards(model, tokenizer, processing_classes=own)(*sampled(tokenizer, prompts))
    assert found.totals == pytest.approx(expected, abs=1e-5)


def test_another_chat_template_is_another_rendering(folders, tokenizer):
    model, own = load_reward(folders["same"])
    own.chat_template = "Judge this. " + own.chat_template
    prompts, texts, prompt_ids, ids = sampled(tokenizer)
    rendered = sampled(own)[2]
    assert rendered != prompt_ids
    examples = [Example(p, (c,)) for p, c in zip(rendered, ids, strict=True)]
    found = Rewards(model, tokenizer, processing_classes=own)(prompts, texts, prompt_ids, ids)
    assert found.totals == [score for (score,) in rewards(model, examples)]


def test_models_and_functions_add_up(folders, tokenizer):
    batch = sampled(tokenizer)
    funcs = [folders["same"], length, folders["other"], per_token]
    scores = Rewards(funcs, tokenizer, weights=[1.0, 0.1, -2.0, 0.01])(*batch)
    of = [scores.by_function[name] for name in ("same", "length", "other", "per_token")]
    expected = [a + 0.1 * b - 2 * c + 0.01 * d for a, b, c, d in zip(*of, strict=True)]
    assert scores.totals == pytest.approx(expected)
    assert of[0] == Rewards(folders["same"], tokenizer)(*batch).totals


def test_a_folder_without_tokenizer_takes_the_one_given(folders, tokenizer, tmp_path):
    model, own = load_reward(folders["other"])
    model.save_pretrained(tmp_path / "bare")
    found = Rewards(str(tmp_path / "bare"), tokenizer, processing_classes=[own])(*sampled(tokenizer))
    assert found.totals == Rewards(model, tokenizer)(*sampled(tokenizer)).totals
    with pytest.raises(
        RewardError, match=r"bare: no tokenizer.* has no vocabulary; .* in processing_classes$"
    ):
        Rewards(str(tmp_path / "bare"), tokenizer)


def raises(message, function, tokenizer, columns=None, **settings):
    """Calling it must fail in one line that matches; returns the error."""
    with pytest.raises(RewardError, match=message) as caught:
        Rewards(function, tokenizer, **settings)(*sampled(tokenizer), columns or {})
    assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)
    return caught.value


def test_what_a_function_raises_is_kept_and_placed(tokenizer):
    def broken(completions):
        return [{"a": 1.0}["b\nc"] for _ in completions]

    line = broken.__code__.co_firstlineno + 1
    message = (
        rf"function broken: raised KeyError: .* in line {line} of test_functions.py.* with 3 prompts; mend"
    )
    assert isinstance(raises(message, broken, tokenizer).__cause__, KeyError)


FIRST = '"My kettle broke."'
SECOND = '"It broke."'
WRONG = {
    "none": (None, r"function f: returned None; return a list"),
    "one number": (0.5, r"returned 0\.5; return a list with a number"),
    "text": ("0.5", r"returned '0\.5'; return a list"),
    "too few": ([1.0, 2.0], rf"returned 2 rewards for 3 completions \(first prompt {FIRST}\); return one"),
    "nan": ([1.0, math.nan, 1.0], rf"function f, prompt {SECOND}: returned nan; return a finite number"),
    "infinite": ([-math.inf, 1.0, 1.0], rf"prompt {FIRST}: returned -inf; return a finite"),
    "no judgement": ([1.0, None, 1.0], rf"prompt {SECOND}: returned None; return a finite"),
    "no number": ([1.0, "good", 1.0], rf"prompt {SECOND}: returned 'good'; return a finite"),
    "one list": ([1.0, [0.5], 1.0], rf"prompt {SECOND}: returned a list, \[0\.5\], and numbers before"),
    "tensor of columns": (
        torch.ones(3, 1),
        rf"prompt {FIRST}: returned 1 numbers, \[1\.0\], for a completion of",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_reward_is_refused(tokenizer, case):
    returned, message = WRONG[case]

    def f(completions):
        return returned

    raises(message, f, tokenizer)


def test_lists_per_token_are_checked_token_by_token(tokenizer):
    def replaced(at, row):
        def f(completion_ids):
            rows = [[0.0] * len(ids) for ids in completion_ids]
            rows[at] = row
            return rows

        return f

    tokens = len(completion_ids(tokenizer, TEXTS[1]))
    short = rf"function f, prompt {SECOND}: returned 2 numbers, \[0\.0, 1\.0\], for a completion of {tokens}"
    raises(short, replaced(1, [0.0, 1.0]), tokenizer)
    raises(rf"{SECOND}: returned nan for token 2; return", replaced(1, [0.0, 0.0, math.nan]), tokenizer)
    raises(
        rf"{SECOND}: returned a number, 1\.0, and lists before; return the same", replaced(1, 1.0), tokenizer
    )


def test_long_prompts_and_values_are_shortened(tokenizer):
    batch = sampled(tokenizer, ["word " * 100] * 3)
    with pytest.raises(RewardError) as caught:
        Rewards(lambda completions: ["x" * 1000] * 3, tokenizer)(*batch)
    assert len(str(caught.value)) < 280 and '"word word' in str(caught.value)


def test_columns_are_checked(tokenizer):
    def f(completions, answer):
        return [0.0] * 3

    raises(
        r"function f: takes `answer`, which is no column.* there are: prompts, .*, product",
        f,
        tokenizer,
        {"product": [1, 2, 3]},
    )
    raises(r"column `answer` has 2 values for 3 prompts", f, tokenizer, {"answer": [1, 2]})
    raises(r"column `completions` has the name of what .*: rename it", f, tokenizer, {"completions": TEXTS})


def test_settings_are_checked(tokenizer):
    raises(r"no reward function: give one", [], tokenizer)
    raises(
        r"3 weights for 2 reward functions \(length, per_token\): give one",
        [length, per_token],
        tokenizer,
        weights=[1, 2, 3],
    )
    raises(r"finite numbers, not \[1\.0, nan\]", [length, length], tokenizer, weights=[1.0, math.nan])
    raises(r"2 processing_classes for 1 reward functions", length, tokenizer, processing_classes=[None, None])


def test_models_that_give_no_single_score_are_refused(folders, tokenizer, tmp_path):
    model, own = load_reward(folders["same"])
    model.config.num_labels = 2
    save(model, own, tmp_path / "two")
    tiny.change(tmp_path / "two" / "config.json", id2label={"0": "a", "1": "b"})
    raises(r"same: is a LlamaForSequenceClassification with 2 labels; give", model, tokenizer)
    raises(
        r"reward model llama: .* is a LlamaForCausalLM, not a reward model: give",
        folders["policy"],
        tokenizer,
    )
    raises(
        r"nowhere: .*cannot be loaded as AutoTokenizer .*; give the folder of a reward model",
        tmp_path / "nowhere",
        tokenizer,
    )
    raises(r"is a Linear with None labels", torch.nn.Linear(1, 1), tokenizer)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = BertForSequenceClassification(BertConfig(num_labels=1, **sizes))
    raises(
        r"is a BertForSequenceClassification with 1 labels; give a decoder .*of your own", encoder, tokenizer
    )


def test_tokenizers_that_lack_something_are_refused(folders, tokenizer):
    model, own = load_reward(folders["other"])
    own.chat_template = None
    raises(
        r"other: the prompts are messages and its tokenizer has no chat template; set",
        model,
        tokenizer,
        processing_classes=own,
    )
    own.eos_token = None
    raises(r"other: its tokenizer has no stop token; set", model, tokenizer, processing_classes=own)
    model.config._name_or_path = ""
    raises(r"it was not read from a folder; .*that tokenizer in processing_classes", model, tokenizer)


def test_what_a_model_cannot_read_is_refused(folders, tokenizer):
    model, own = load_reward(folders["other"])
    batch = sampled(tokenizer, ["broke " * 200] * 3)
    with pytest.raises(RewardError, match=r'other, prompt "broke .*…": \d+ tokens, .* the 128 positions'):
        Rewards(model, tokenizer)(*batch)
    with pytest.raises(RewardError, match="an empty prompt has no token"):
        Rewards(model, tokenizer)([""], ["x"], [[5]], [[6, 1]])
    own.chat_template = "{{ raise_exception('no system message') }}"
    raises(r"refuses it \(no system message\); change", model, tokenizer, processing_classes=own)


def test_the_readme_shows_functions_that_work(tokenizer):
    section = Path("reward/README.md").read_text().split("## Writing a reward function")[1]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block
    names: dict = {}
    exec(block[1], names)
    batch = sampled(tokenizer)
    scores = Rewards([names["names_the_product"], names["brevity"]], tokenizer)(
        *batch, {"product": ["kettle", "pan", "lamp"]}
    )
    assert scores.scalars == [1.0, 0.0, 1.0]
    assert scores.by_function["brevity"] == pytest.approx([-0.01 * len(ids) for ids in batch[3]])


def test_running_scale_is_that_of_all_values_so_far():
    values = np.random.default_rng(0).normal(1e6, 3.0, 1000)
    scale = RunningScale()
    for start, end in ((0, 1), (1, 1), (1, 700), (700, 1000)):
        scale.update(values[start:end].tolist())
    assert scale.mean == pytest.approx(values.mean(), rel=1e-12)
    assert scale.std == pytest.approx(values.std(), rel=1e-9)
    scaled = scale([values.mean() + 3.0, values.mean() - 30.0])
    assert scaled == pytest.approx([3.0 / values.std(), -30.0 / values.std()], rel=1e-6)


def test_running_scale_goes_on_from_its_state():
    first, second = RunningScale(), RunningScale()
    assert first([2.0]) == [2.0]  # nothing is known yet
    first.update([1.0, 2.0, 4.0])
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        scale.update([8.0, -3.0])
    assert (second.mean, second.std) == (first.mean, first.std) and second.count == 5


def test_running_scale_makes_equal_rewards_zero():
    scale = RunningScale()
    for _ in range(5):
        scale.update([0.1] * 7)
    assert scale([0.1] * 7) == pytest.approx([0.0] * 7, abs=1e-6)
