"""`prefloop STAGE --help`: the stage's header and its settings, each with its type, default and meaning."""

import ast
import inspect
import textwrap
from typing import Any, get_args

from stages.config import Reads, StageConfig, module


def explain(kind: str) -> str:
    """What a user needs to know to write the stage's settings, read from its module."""
    stage = module(kind)
    lines = [
        inspect.cleandoc(stage.__doc__ or ""),
        "",
        f"Settings, in the experiment file or as {kind}.FIELD=VALUE",
    ]
    bases = [base for base in reversed(stage.Config.__mro__) if issubclass(base, StageConfig)]
    meanings = {name: text for base in bases for name, text in field_docs(base).items()}
    inputs = stage.Config.inputs()
    own = [name for name in stage.Config.model_fields if name not in StageConfig.model_fields]
    for name in [*own, *StageConfig.model_fields]:
        field = stage.Config.model_fields[name]
        default = (
            "required"
            if field.is_required()
            else f"default {_short(field.get_default(call_default_factory=True))}"
        )
        lines += ["", f"  {name}: {_type(field.annotation)}, {default}"]
        meaning = meanings.get(name, "")
        if name in inputs:
            meaning = f"Reads {_read(inputs[name])}. {meaning}"
        if name in stage.Config.blocks():
            meaning = f"Handed on to {stage.Config.blocks()[name].target}, under its names. {meaning}"
        lines += textwrap.wrap(meaning, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def field_docs(config: type[StageConfig]) -> dict[str, str]:
    """The string below each field. Read from the source when asked for: it would slow every import."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _read(reads: Reads) -> str:
    if not reads.artifact:
        return "a file or folder"
    return f"{reads.artifact} of a stage or run{' of every seed' * reads.every_seed}, or a path" + (
        ", or a hub id" if reads.artifact == "model" else ""
    )


def _type(annotation: Any) -> str:
    """`int | None` rather than `typing.Optional[int]`, without our marks."""
    if annotation is type(None):
        return "null"
    inner = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(inner[0])
    origin = getattr(annotation, "__origin__", None)
    if inner and origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_type, inner))}]"
    if inner and all(isinstance(value, str) for value in inner):
        return " | ".join(map(str, inner))
    if inner:
        return " | ".join(map(_type, inner))
    return getattr(annotation, "__name__", str(annotation))


def _short(value: Any) -> str:
    return "null" if value is None else str(value)
