"""Chat: a conversation with a tiny policy, typed at the terminal."""

import io

import pytest
import torch

from stages import chat
from stages.config import UserError


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from reward.model import save
    from stages import pretrain

    torch.manual_seed(0)
    tokenizer = pretrain.train_tokenizer(["Hello Ann, the kettle is broken."] * 3, 300)
    config = pretrain.Config(corpus="none", hidden=16, layers=2, heads=2, positions=128)
    folder = tmp_path_factory.mktemp("chat") / "model"
    save(pretrain.new_model(config, tokenizer), tokenizer, folder)
    return folder


@pytest.fixture
def conversation(policy):
    from reward.model import load_policy

    return chat.Conversation(*load_policy(policy), temperature=1.0, seed="test")


def test_history_grows_turn_by_turn_and_resets(conversation, monkeypatch):
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 5)
    conversation.say("Hello.")
    conversation.say("And now?")
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[2].content == "And now?"
    conversation.reset()
    assert conversation.messages == []


def test_a_prompt_too_long_says_so_and_changes_nothing(conversation):
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens and the model 128 positions"):
        conversation.say("kettle " * 200)
    assert conversation.messages == []


def test_reply_ends_where_the_model_has_no_room_left(conversation, monkeypatch):
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 1000)
    reply = conversation.say("Hello.")  # more than the 128 positions would hold
    assert reply


def test_terminal_session(policy, monkeypatch, capsys):
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 4)
    typed = io.StringIO("Hello.\n\n/reset\n/help\n" + "kettle " * 200 + "\n/quit\nnever read\n")
    monkeypatch.setattr("sys.stdin", typed)
    assert chat.main([str(policy), "--temperature", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("assistant>") == 1
    assert "(a new conversation)" in shown and "/help is no command" in shown and "say less" in shown
    assert typed.read() == "never read\n"


def test_end_of_input_ends_the_session(policy, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main([str(policy)]) == 0


def test_what_is_no_policy_is_refused(tmp_path, policy):
    with pytest.raises(UserError, match="no such folder"):
        chat.policy_path("runs/quickstart/sft/000000000000")
    with pytest.raises(UserError, match="holds no model"):
        chat.policy_path(str(tmp_path))
    assert chat.policy_path(str(policy)) == str(policy)
    assert chat.policy_path("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(SystemExit):
        chat.main([str(policy), "--temperature", "0"])
