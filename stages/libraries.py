"""Settings blocks that a library checks, such as `trainer:` by `transformers.TrainingArguments`."""

import dataclasses
import importlib
import os
import warnings
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from stages.errors import SettingsError, suggest

OURS = {"output_dir": "the run decides where it writes", "seed": "set the stage's own `seed`"}
"""Fields of trainers that the runner sets."""


def check_block(place: str, target: str, given: Mapping[str, Any]) -> None:
    """Refuse names and values that `target` does not know. Imports the library: some seconds."""
    package, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(package), name)
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    types = _types(kind)
    for key, value in given.items():
        if key in OURS:
            raise SettingsError(f"{place}.{key}: {OURS[key]}")
        if key not in known:
            raise SettingsError(f"{place}.{key}: {target} has no such setting; {suggest(key, known)}")
        try:
            adapter = TypeAdapter(types.get(key, Any))
        except PydanticUserError:  # a type of the library's own, which the library will check
            continue
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise SettingsError(f"{place}.{key}: {error.errors()[0]['msg']}, not {value!r}") from None
    _construct(place, kind, given)


def _construct(place: str, kind: Any, given: Mapping[str, Any]) -> None:
    """What the library itself says of the values taken together, if it says nothing of its defaults."""
    if "RANK" in os.environ:  # would join the processes before their time
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind(output_dir="unused", report_to="none")
        except Exception:  # of any type: what the library makes of our silence is not the user's fault
            return
        try:
            kind(**{"output_dir": "unused", "report_to": "none", **given})
        except Exception as error:
            text = " ".join(str(error).split())
            raise SettingsError(f"{place}: {text if len(text) < 200 else text[:200] + ' ...'}") from None


def _types(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):  # annotations that only a type checker can read
        return {}
