"""Talk to a policy in the terminal.

    prefloop chat runs/quickstart/ppo/0a1b2c3d4e5f [--temperature 0.7]

RUN is a run folder with a policy in it, a model folder, or a hub id. /reset forgets the conversation, /quit
or Ctrl-D ends it. Nothing is written.
"""

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from annotate.records import Message
from stages.config import UserError

MAX_NEW_TOKENS = 256


class Conversation:
    """The messages so far, and the policy that answers them."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float, seed: str):
        self.model, self.tokenizer, self.temperature, self.seed = model, tokenizer, temperature, seed
        self.limit: int | None = getattr(model.config, "max_position_embeddings", None)
        self.messages: list[Message] = []

    def say(self, text: str) -> str:
        """The reply to `text`, which becomes part of the conversation.

        Raises UserError, and changes nothing, if there is no room left for a reply.
        """
        from reward.sampler import Sampler
        from reward.tokens import prompt_ids

        messages = [*self.messages, Message(role="user", content=text)]
        prompt = prompt_ids(self.tokenizer, messages)
        room = MAX_NEW_TOKENS if self.limit is None else min(MAX_NEW_TOKENS, self.limit - len(prompt))
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens and the model {self.limit} positions: say less, "
                "or /reset"
            )
        sampler = Sampler(self.model, self.tokenizer, room, self.temperature)
        sample = sampler.sample([prompt], [f"{self.seed}/{len(messages)}"])[0]
        reply = sampler.text(sample)
        self.messages = [*messages, Message(role="assistant", content=reply)]
        return reply if sample.stopped else reply + " [cut: no room left]"

    def reset(self) -> None:
        self.messages = []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefloop chat", description="Talk to a policy in the terminal.")
    parser.add_argument("run", metavar="RUN", help="run folder, model folder or hub id")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="1 is how policies are trained and tested"
    )
    args = parser.parse_args(argv)
    if args.temperature <= 0:
        parser.error("--temperature must be above 0")

    from reward.model import load_policy

    path = policy_path(args.run)
    talk(Conversation(*load_policy(path), args.temperature, secrets.token_hex(8)), path)
    return 0


def policy_path(run: str) -> str:
    """The model folder of a run, or what was given if it is one already. UserError where there is none."""
    folder = Path(run)
    if (folder / "manifest.json").exists():
        from stages.manifest import load_manifest

        status = load_manifest(folder).status
        if status != "complete":
            raise UserError(f"{run} is {status}: finish it with `prefloop run` first")
        folder = folder / "model"
        if not folder.exists():
            raise UserError(f"{run} has no model: chat needs the run of a policy, such as sft or ppo")
    elif not folder.exists():
        if run.startswith((".", "/", "~", "runs/")):
            raise UserError(f"{run}: no such folder; `prefloop status CONFIG` lists the runs")
        return run
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model (no config.json): give a run folder or a model folder")
    return str(folder)


def talk(conversation: Conversation, path: str) -> None:
    """Read a line, answer it, until /quit or the end of input."""
    print(f"{path} at temperature {conversation.temperature:g}. /reset starts afresh, /quit or Ctrl-D ends.")
    while True:
        try:
            text = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
            print("(a new conversation)")
        elif text.startswith("/"):
            print(f"{text.split()[0]} is no command; there are /reset and /quit")
        elif text:
            try:
                print(f"\nassistant> {conversation.say(text)}")
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:
                print("(interrupted)")


if __name__ == "__main__":
    import sys

    sys.exit(main())
