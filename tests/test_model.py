"""Checkpoints: what a folder lacks is added, what does not fit is refused, what is saved comes back."""

import peft
import pytest
import torch

from annotate.records import Message
from reward.batch import Example
from reward.model import (
    CheckpointError,
    disable_dropout,
    load_policy,
    load_reward,
    load_tokenizer,
    new_reward_model,
    same_vocabulary,
    save,
    without_gradient,
)
from reward.tokens import completion_ids, logprobs, prompt_ids, rewards
from tests import tiny

ADDED = {
    "llama": [],
    "qwen2": [],
    "gpt2": [],
    "no_pad": ["pad token '<|pad|>' added"],
    "no_template": ["chat template added"],
    "eos_is_1": ["stop token '<|end|>' taken from the model's config"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return {name: tiny.save_folder(folder, name) for name in tiny.FOLDERS}


def examples(tokenizer):
    messages = [Message(role="user", content="My kettle broke.")]
    return [Example(prompt_ids(tokenizer, messages), (completion_ids(tokenizer, "Sorry."), [5, 6, 7]))]


@pytest.mark.parametrize("name", tiny.FOLDERS)
def test_local_folders_become_policies(folders, name, tmp_path):
    assert load_tokenizer(folders[name])[1] == ADDED[name]
    model, tokenizer = load_policy(folders[name])
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == 1
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    before = logprobs(model, examples(tokenizer))
    save(model, tokenizer, tmp_path / "saved")
    reloaded, again = load_policy(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")[1] == []  # nothing is lacking any more
    assert same_vocabulary(tokenizer, again)
    assert logprobs(reloaded, examples(again)) == before


@pytest.mark.parametrize("name", tiny.FOLDERS)
def test_local_folders_become_reward_models(folders, name, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = new_reward_model(folders[name])
    before = rewards(model, examples(tokenizer))
    save(model, tokenizer, tmp_path / "rm")
    reloaded, again = load_reward(tmp_path / "rm")
    assert rewards(reloaded, examples(again)) == before
    assert tiny.same_weights(model.base_model, load_policy(folders[name])[0].base_model)


def test_what_is_added_to_a_folder_is_the_same_at_every_load(folders):
    (policy, tokenizer), (reference, _) = load_policy(folders["no_pad"]), load_policy(folders["no_pad"])
    assert tiny.same_weights(policy, reference)
    assert logprobs(policy, examples(tokenizer)) == logprobs(reference, examples(tokenizer))


def test_pad_equal_to_eos_is_replaced(folders, tmp_path):
    model, tokenizer = load_policy(folders["no_pad"])
    tokenizer.pad_token = tokenizer.eos_token
    save(model, tokenizer, tmp_path / "evil")
    tokenizer, notes = load_tokenizer(tmp_path / "evil")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert notes == ["pad token '<|pad|>' added"]


@pytest.mark.parametrize("name", ["llama", "no_template"])
def test_chat_templates_mark_the_reply_and_its_stop_token(folders, name):
    tokenizer, _ = load_tokenizer(folders[name])
    messages = [{"role": "user", "content": "Broken."}, {"role": "assistant", "content": "Sorry."}]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Sorry.<|end|>"


def test_the_head_of_a_new_reward_model_has_unit_scale(folders):
    torch.manual_seed(0)
    weights = torch.cat([new_reward_model(folders["llama"])[0].score.weight.flatten() for _ in range(60)])
    assert weights.std().item() == pytest.approx(1 / 17**0.5, rel=0.1)


def test_the_same_weights_give_the_same_bytes(folders, tmp_path):
    for name in ("one", "two"):
        save(*load_policy(folders["llama"]), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_policy_is_no_reward_model(folders):
    with pytest.raises(CheckpointError, match=r"is a LlamaForCausalLM, not a reward model: give"):
        load_reward(folders["llama"])


def test_what_cannot_be_loaded_is_said_in_one_line(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tiny.save_folder(tmp_path, "llama")
    (broken / "model.safetensors").write_bytes(b"not weights")
    for path in (tmp_path / "empty", broken):
        with pytest.raises(CheckpointError, match="cannot be loaded as") as error:
            load_policy(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    folder = tiny.save_folder(tmp_path, "llama")
    tokenizer, _ = load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="305 tokens and the model 300 embeddings"):
        load_policy(folder)


def test_a_folder_without_any_stop_token_is_refused(tmp_path):
    folder = tiny.save_folder(tmp_path, "eos_is_1")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"eos_token_id": 1', '"eos_token_id": null'))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="neither tokenizer nor config name a stop token"):
        load_policy(folder)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_a_folder_without_tokenizer_is_refused(family, tmp_path):
    """Of the first two, transformers would make a tokenizer without vocabulary, and say nothing."""
    tiny.model_of(family, tiny.tokenizer_of()).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no vocabulary; save it beside|cannot be loaded as AutoTokenizer"
    ):
        load_policy(tmp_path)


def test_a_folder_of_adapters_alone_brings_its_model_along(folders, tmp_path):
    model, tokenizer = load_policy(folders["llama"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert type(load_policy(tmp_path)[0]).__name__ == "LlamaForCausalLM"


def test_vocabularies_are_compared_with_their_chat_templates(folders):
    one, other = load_tokenizer(folders["llama"])[0], load_tokenizer(folders["no_template"])[0]
    assert same_vocabulary(one, load_tokenizer(folders["eos_is_1"])[0])
    assert not same_vocabulary(one, other)


def test_no_dropout_is_left(folders, tmp_path):
    folder = tiny.save_folder(tmp_path, "gpt2")
    tiny.change(folder / "config.json", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    model, tokenizer = load_policy(folder)
    batch = torch.tensor([examples(tokenizer)[0].prompt])
    with torch.no_grad():
        assert torch.equal(model.train()(batch).logits, model.eval()(batch).logits)
    attention = load_policy(folders["llama"])[0].model.layers[0].self_attn
    attention.attention_dropout = 0.5  # a number, applied functionally
    disable_dropout(attention)
    assert attention.attention_dropout == 0.0


def test_the_reference_is_a_frozen_copy(folders):
    model, tokenizer = load_policy(folders["llama"])
    reference = without_gradient(model)
    before = logprobs(reference, examples(tokenizer))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert logprobs(reference, examples(tokenizer)) == before
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
