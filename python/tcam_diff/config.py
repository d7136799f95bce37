"""Configurations: pydantic models with YAML presets in configs/ and changes as ``key=value``."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from tcam_diff.errors import UserError
from tcam_diff.files import reason
from tcam_diff.text import shown


class Config(BaseModel):
    """Base of configurations. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    #: KIND of the presets ``configs/KIND-NAME.yaml``.
    kind: ClassVar[str] = ""

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_number(cls, value: Any, handler: Any) -> Any:
        """Refuse yes, no, true and false where a number is expected: pydantic takes them for 1 and 0."""
        result = handler(value)
        if _taken_for_number(value, result):
            raise ValueError("expected numbers")
        return result

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
            values = read_yaml(resources.files("tcam_diff.configs").joinpath(f"{cls.kind}-{name}.yaml").read_bytes(), name)
        elif Path(name).is_file():
            values = read_settings(Path(name))
        else:
            raise UserError(f"{name}: expected a preset ({', '.join(known)}) or a YAML file")
        changed = [_change(cls, values, item) for item in overrides]
        return validate(cls, _numbers(values), name, () if name in known else changed)

    def yaml(self) -> str:
        """The configuration as YAML, which :meth:`load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


C = TypeVar("C", bound=Config)


def _taken_for_number(given: Any, got: Any) -> bool:
    """Whether a truth value became a number, also in a list."""
    if isinstance(given, list | tuple) and isinstance(got, list | tuple):
        return any(map(_taken_for_number, given, got))
    return isinstance(given, bool) and not isinstance(got, bool)


#: Most values of a YAML file with its aliases written out: a few lines of aliases can stand for billions.
MOST_VALUES = 100_000


def read_settings(path: Path) -> dict[str, Any]:
    """Keys and values in a YAML file. Raises UserError with the file's name."""
    try:
        values = read_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def read_yaml(text: str | bytes, name: str) -> Any:
    """The value of a YAML text. ``name`` is its source, for messages. Raises UserError."""
    try:
        if _values(yaml.compose(text, yaml.SafeLoader), {}) > MOST_VALUES:
            raise UserError(f"{name}: not YAML of this program: its aliases (*name) stand for more than {MOST_VALUES} values")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise UserError(f"{name}: not YAML: {line}{shown(error.problem or error.context)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {shown(reason(error))}") from error
    except RecursionError as error:
        raise UserError(f"{name}: not YAML of this program: too many brackets or lists in one another") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of values with a wrong tag
        raise UserError(f"{name}: not YAML: a value cannot be read: {shown(reason(error))}") from error


def _values(node: Any, known: dict[int, float]) -> float:
    """Number of values of a node, with aliases written out; infinite for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def presets(kind: str) -> list[str]:
    """Names of the presets ``configs/KIND-NAME.yaml``."""
    files = (p.name for p in resources.files("tcam_diff.configs").iterdir())
    return sorted(n.removeprefix(f"{kind}-").removesuffix(".yaml") for n in files if n.startswith(f"{kind}-"))


def validate(model: type[C], values: Any, name: str, changed: Sequence[str] | None = None) -> C:
    """Validate values as a configuration. Raises UserError with the key.

    Args:
        model: class of the configuration.
        values: keys and values.
        name: source of the values, for messages.
        changed: keys with values from elsewhere, if the source is a file; the file is named with the other keys.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = shown(".".join(str(p) for p in first["loc"]))
        where = name if not path else path if changed is None or path in changed else f"{name}: {path}"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: no such key{_nearest(path, keys(model))}") from error
        whole = first["type"] == "value_error" and isinstance(first["input"], dict)  # of keys that do not fit one another
        given = "" if first["type"] == "missing" or whole else f", got {shown(repr(first['input']))}"
        raise UserError(f"{where}: {first['msg'].lower()}{given}") from error


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


def _change(model: type[BaseModel], values: dict[str, Any], item: str) -> str:
    """Change values by ``key=value``. Returns the key."""
    key, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"{item!r}: expected key=value, for example steps=500")
    if key not in keys(model):
        raise UserError(f"{key}: no such key{_nearest(key, keys(model))}")
    *outer, last = key.split(".")
    for name in outer:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{name}: expected keys and values, got {shown(repr(values))}")
    values[last] = read_yaml(text, key)
    return key


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
