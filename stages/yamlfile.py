"""YAML as experiment files use it: 1e-5 is a number, no key is there twice, errors are one line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stages.errors import SettingsError, suggest


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (by YAML 1.1 it is a string) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`: what is given here comes first
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-.0123456789"))

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{where}{line}: {getattr(error, 'problem', None) or error}") from None


def read(path: Path, what: str = "experiment") -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise SettingsError(f"{path}: no such {what} file; configs/ has some to start from") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file") from None


def mapping(path: Path, field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = f"not {value!r}" if value is not None else "and is missing or empty"
        raise SettingsError(f"{path}: {field or 'the file'}: must be a mapping of names to settings, {what}")
    for key in value:
        if not isinstance(key, str) or not NAME.fullmatch(key):
            raise SettingsError(f"{path}: {field}{'.' if field else ''}{key}: cannot be a name")
    return value


def only_known(path: Path, field: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise SettingsError(f"{path}: {field}{key}: unknown setting; {suggest(key, known)}")


def override(settings: dict[str, dict[str, Any]], text: str) -> str:
    """Apply one override in place; returns its dotted field."""
    dotted, equals, value = text.partition("=")
    stage, *parents = dotted.split(".")
    if not equals or not parents or not all([stage, *parents]):
        raise SettingsError(f"{text}: an override has the form stage.field=value (the seed: --seeds)")
    if stage not in settings:
        raise SettingsError(f"{text}: the experiment has no stage {stage}; {suggest(stage, settings)}")
    node = settings[stage]
    for parent in parents[:-1]:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise SettingsError(f"{text}: {stage}.{parent} has no fields of its own")
    node[parents[-1]] = parse(value, text)
    return dotted
