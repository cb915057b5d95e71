"""What the labelling page asks of the server. Who asks is known from the session; no answer names a model."""

from typing import Any

from pydantic import Field, ValidationError

from annotate import quality
from annotate.form import Closed, Form
from annotate.keys import hidden, is_hidden, plain
from annotate.markdown import render
from annotate.queue import Shown
from annotate.recording import KEY, Label
from annotate.records import DataError
from annotate.store import Store, Who

FUNCTIONS = ("hello", "step", "markdown")
Answer = dict[str, Any]


class Step(Closed):
    """Finished labels, how many open tasks the page wants to hold, whether to count."""

    labels: list[Label] = Field(max_length=50)
    want: int = Field(ge=0, le=10)
    count: bool = False


class Markdown(Closed):
    """Tasks whose texts the page wants rendered."""

    keys: list[KEY] = Field(max_length=10)


class Calls:
    """The page's server functions. Each answers {"ok": True, ...}, or {"error": what is wrong}."""

    def __init__(self, store: Store, round_id: int, title: str, guidelines: str, form: Form):
        self.store, self.round_id, self.title = store, round_id, title
        self.form = {"id": store.form(form), **form.model_dump(), "question": form.asked}
        self.guidelines = {"id": store.guidelines(guidelines), "html": render(guidelines)}
        self.served = f"{round_id}/{self.form['id']}/{self.guidelines['id']}"
        """What a page was loaded for: one that was loaded for anything else loads itself anew."""
        self.checked = quality.has_checks(store, round_id)

    def hello(self, _: object, who: Who) -> Answer:
        """All that the page needs at its start."""
        try:
            past, progress = self.store.history(self.round_id, who[0]), self._progress(who)
        except DataError as error:
            return {"error": str(error)}
        return {
            "ok": True,
            "database": self.store.id[:8],
            "round": self.round_id,
            "served": self.served,
            "annotator": who[0],
            "name": who[1],
            "researcher": who.role == "researcher",
            "title": self.title,
            "guidelines": self.guidelines,
            "form": self.form,
            "progress": progress,
            "history": [
                {
                    **self._task(label.shown),
                    "preference": label.preference,
                    "both_bad": label.both_bad,
                    "answers": label.answers.model_dump(),
                }
                for label in past
            ],
        }

    def step(self, argument: object, who: Who) -> Answer:
        """Record labels and hand out tasks: answered when both are on disk."""
        try:
            asked = Step.model_validate(argument)
            # A bare number must tell nothing, not even whether it is one's own.
            labels = [label for label in asked.labels if is_hidden(label.token)]
            told, shown = self.store.step(self.round_id, who[0], labels, asked.want)
            progress = {"progress": self._progress(who)} if asked.count else {}
        except (ValidationError, DataError) as error:
            return {"error": f"not saved: {_said(error)}"}
        of = iter(told)
        statuses = [next(of) if is_hidden(label.token) else "refused" for label in asked.labels]
        answer = {"ok": True, "statuses": statuses, "tasks": [self._task(task) for task in shown]}
        answer["served"] = self.served
        if len(shown) < asked.want:
            answer["standing"] = quality.standing(self.store, self.round_id, who[0])
        if self.checked and asked.labels:
            answer["feedback"] = self._feedback(asked.labels, who)
        return answer | progress

    def markdown(self, argument: object, who: Who) -> Answer:
        """HTML of the texts of tasks that this annotator holds."""
        try:
            asked = Markdown.model_validate(argument)
            keys = {plain(self.store.id, key): key for key in asked.keys if is_hidden(key)}
            held = self.store.held(self.round_id, who[0], list(keys))
        except (ValidationError, DataError) as error:
            return {"error": f"not rendered: {_said(error)}"}
        return {"ok": True, "html": {keys[task.key]: _html(task) for task in held}}

    def _progress(self, who: Who) -> dict[str, int]:
        mine = quality.progress(self.store, self.round_id, who[0])
        return {"asked": mine.asked, "done": mine.done}

    def _feedback(self, labels: list[Label], who: Who) -> list[Answer]:
        told = quality.feedback(self.store, who[0], [label.token for label in labels])
        return [{"token": token, "right": right, "text": text} for token, right, text in told]

    def _task(self, shown: Shown) -> Answer:
        key = hidden(self.store.id, shown.key)
        return {"key": key, "messages": shown.messages, "completions": shown.completions}


def _said(error: ValidationError | DataError) -> str:
    if isinstance(error, DataError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _html(shown: Shown) -> Answer:
    return {
        "messages": [render(message["content"]) for message in shown.messages],
        "completions": [render(text) for text in shown.completions],
    }
