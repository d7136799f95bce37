"""Configurations: pydantic models that live beside what they configure, YAML presets in configs/, changes as ``key=value``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from tcam_diff.errors import UserError


class Config(BaseModel):
    """A configuration: every key is known and has its type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Presets are ``configs/KIND-NAME.yaml``.
    kind: ClassVar[str] = ""

    @classmethod
    def load(cls, source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """The configuration of a preset or of a YAML file, with ``key=value`` changes (values are YAML; ``key.sub=value`` too).

        Raises UserError with the key's path and the nearest known key.
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
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


C = TypeVar("C", bound=Config)


def presets(kind: str) -> list[str]:
    """Names of the presets ``configs/KIND-NAME.yaml``."""
    files = (p.name for p in resources.files("tcam_diff.configs").iterdir())
    return sorted(n.removeprefix(f"{kind}-").removesuffix(".yaml") for n in files if n.startswith(f"{kind}-"))


def validate(model: type[C], values: dict[str, Any], name: str) -> C:
    """``values`` as ``model``. Raises UserError naming the key, and the nearest one where it is unknown."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"]) or name
        if first["type"] == "extra_forbidden":
            raise UserError(f"{path}: no such key{_nearest(path, keys(model))}") from error
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise UserError(f"{path}: {first['msg'].lower()}{given}") from error


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a model, those of models within it with a dot."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def describe(model: type[BaseModel], prefix: str = "") -> str:
    """Keys, defaults and meanings: for help texts."""
    lines = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines.append(describe(inner, f"{prefix}{name}."))
        else:
            default = "" if field.is_required() else f" = {field.default}"
            lines.append(f"  {prefix}{name}{default}" + (f"   {field.description}" if field.description else ""))
    return "\n".join(lines)


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
    """YAML 1.1 reads 1e-2 as text."""
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
