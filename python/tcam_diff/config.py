"""Configurations: pydantic models with YAML presets in configs/ and changes as ``key=value``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Self

from tcam_diff.errors import UserError


class Config(BaseModel):
    """Base of configurations. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: KIND of the presets ``configs/KIND-NAME.yaml``.
    kind: ClassVar[str] = ""

    @classmethod
    def load(cls, source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Load a preset or a YAML file.

        Args:
            source: name of a preset, or path of a YAML file.
            overrides: changes ``key=value`` or ``key.sub=value``, with values in YAML.

        Raises:
            UserError: the source, a key or a value is wrong; for unknown keys with the nearest known one.
        """
        name, known = os.fspath(source), presets(cls.kind)
        if name in known:
            text = resources.files("tcam_diff.configs").joinpath(f"{cls.kind}-{name}.yaml").read_text()
        elif Path(name).is_file():
            text = Path(name).read_text()
        else:
            raise UserError(f"{name}: expected a preset ({', '.join(known)}) or a YAML file")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{name}: not YAML: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{name}: expected keys and values, got {type(values).__name__}")
        for item in overrides:
            _change(cls, values, item)
        return validate(cls, _numbers(values), name)

    def yaml(self) -> str:
        """The configuration as YAML, which :meth:`load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


C = TypeVar("C", bound=Config)


def presets(kind: str) -> list[str]:
    """Names of the presets ``configs/KIND-NAME.yaml``."""
    files = (p.name for p in resources.files("tcam_diff.configs").iterdir())
    return sorted(n.removeprefix(f"{kind}-").removesuffix(".yaml") for n in files if n.startswith(f"{kind}-"))


def validate(model: type[C], values: dict[str, Any], name: str) -> C:
    """Validate values as a configuration. ``name`` is their source, for messages. Raises UserError with the key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"]) or name
        if first["type"] == "extra_forbidden":
            raise UserError(f"{path}: no such key{_nearest(path, keys(model))}") from error
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise UserError(f"{path}: {first['msg'].lower()}{given}") from error


def keys(model: type[BaseModel]) -> list[str]:
    """All keys of a model, with those of nested models after a dot."""
    return [name for name, _ in _fields(model)]


def describe(model: type[BaseModel]) -> str:
    """Keys, defaults and descriptions, one per line, for help texts."""
    lines = []
    for name, field in _fields(model):
        default = "" if field.is_required() else f" = {field.default}"
        lines.append(f"  {name}{default}" + (f"   {field.description}" if field.description else ""))
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _change(model: type[BaseModel], values: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"{item!r}: expected key=value, for example steps=500")
    if key not in keys(model):
        raise UserError(f"{key}: no such key{_nearest(key, keys(model))}")
    *outer, last = key.split(".")
    for name in outer:
        values = values.setdefault(name, {})
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: cannot read {text!r} as YAML") from error


def _numbers(value: Any) -> Any:
    """Convert numbers such as 1e-2, which YAML 1.1 reads as text."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "; known are " + ", ".join(sorted(known))
