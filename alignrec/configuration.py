"""Typed, frozen configuration: a YAML mapping and ``--set`` assignments in, dataclasses out."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from alignrec.errors import UserError

T = TypeVar("T")
Tree = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def option(
    default: Any = dataclasses.MISSING,  # noqa: ANN401 - the field's own type is checked by mypy
    help: str = "",  # noqa: A002 - the word that command lines use
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    affects_result: bool = True,
) -> Any:  # noqa: ANN401
    """Declare one setting of a frozen configuration dataclass.

    Args:
        default: value when the recipe is silent; without one the setting is required. A dict, list
            or nested dataclass instance is copied for each configuration.
        help: meaning and unit, one line.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        affects_result: False for settings such as the number of workers, which change how fast
            but not what is computed: changing them does not make a finished artifact stale.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "affects_result": affects_result,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def watchdog_option() -> Any:  # noqa: ANN401
    """Declare ``watchdog_seconds``, which every long stage has."""
    return option(
        240.0,
        "a rank without progress for this long writes its stacks to its log and is named; best "
        "less than timeout_seconds; null: never",
        minimum=1,
        affects_result=False,
    )


def build(cls: type[T], mapping: Mapping[str, Any] | None, *, section: str) -> T:
    """Build the configuration dataclass ``cls`` from one section of a recipe.

    Args:
        cls: a frozen dataclass whose fields were declared with ``option``.
        mapping: the section as YAML gave it; None is an empty section.
        section: dotted name of the section, used in messages.

    Raises:
        UserError: an unknown key, a missing required key, a wrong type or a value out of range.
    """
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise UserError(
            f"{section} must be a section of key: value lines, not {_describe(mapping)}. "
            f"Valid keys: {', '.join(_field_names(cls))}."
        )
    known = _field_names(cls)
    for key in mapping:
        if key not in known:
            raise UserError(_unknown_key(f"{section}.{key}", str(key), known))
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = f"{section}.{field.name}"
        if field.name in mapping:
            value = _convert(mapping[field.name], hints[field.name], name)
            _check_range(value, field.metadata, name)
            values[field.name] = value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"{name} is required ({field.metadata.get('help', 'no description')}). "
                f"Add it to the recipe or pass --set {name}=VALUE."
            )
    return cls(**values)


def load_yaml(path: Path) -> Tree:
    """Read a YAML mapping.

    Raises:
        UserError: the file is absent, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}. Check the path.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        where = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {where}. Correct that line.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {_describe(tree)}, not sections: one section per stage.")
    return tree


def apply_assignments(tree: Mapping[str, Any], assignments: Iterable[str]) -> Tree:
    """Return ``tree`` with every ``section.key=value`` applied; values are read as YAML.

    Raises:
        UserError: an assignment without ``=`` or without a dotted key, or through a plain value.
    """
    result = json.loads(json.dumps(tree, default=str))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise UserError(
                f"--set {assignment!r} is not of the form section.key=value, for example "
                f"--set align.learning_rate=0.001."
            )
        node = result
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(
                    f"--set {assignment!r}: {part} is a single value, not a section, so nothing "
                    f"can be set below it. Set {part} itself."
                )
        try:
            node[parts[-1]] = _read_scalar(text)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(
                f"--set {assignment!r}: the value is not valid YAML. Quote it for the shell."
            ) from error
    return typing.cast(Tree, result)


def expand_variables(value: Any) -> Any:  # noqa: ANN401 - any part of a recipe
    """Replace ``${NAME}`` and ``${NAME:-default}`` in every text by environment variables.

    Raises:
        UserError: a variable without a default is not set.
    """
    if isinstance(value, Mapping):
        return {key: expand_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_variables(inner) for inner in value]
    return _VARIABLE.sub(_variable, value) if isinstance(value, str) else value


def variables(value: Any) -> set[str]:  # noqa: ANN401 - any part of a recipe
    """Return the names of the environment variables that ``expand_variables`` would replace."""
    if isinstance(value, Mapping):
        return set().union(*map(variables, value.values()))
    if isinstance(value, list):
        return set().union(*map(variables, value))
    return {match[1] for match in _VARIABLE.finditer(value)} if isinstance(value, str) else set()


def to_mapping(config: Any) -> Tree:  # noqa: ANN401 - any configuration dataclass
    """Return a configuration as plain JSON values (paths become strings, tuples lists)."""
    return typing.cast(Tree, json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def result_settings(config: Any) -> Tree:  # noqa: ANN401 - any configuration dataclass
    """Return the settings that decide the result, without those that only decide the speed."""
    settings = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("affects_result", True):
            continue
        if dataclasses.is_dataclass(value):
            settings[field.name] = result_settings(value)
        else:
            settings[field.name] = json.loads(json.dumps(value, default=_plain))
    return settings


def digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return the SHA-256 of a JSON value in its canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the up to three known names most like ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)


def _variable(match: re.Match[str]) -> str:
    name, default = match.group(1), match.group(2)
    found = os.environ.get(name) or default
    if found is None:
        raise UserError(
            f"{match.group()}: the environment variable {name} is not set. Set it, or write a "
            f"default: ${{{name}:-DEFAULT}}."
        )
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


def _read_scalar(text: str) -> Any:  # noqa: ANN401
    value = yaml.safe_load(text)
    if isinstance(value, str):
        # YAML 1.1 takes 1e-3 for a string: every user of learning rates means the number.
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def _field_names(cls: Any) -> list[str]:  # noqa: ANN401
    return [field.name for field in dataclasses.fields(cls)]


def _unknown_key(full_name: str, key: str, known: list[str]) -> str:
    close = nearest(key, known)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Valid keys: {', '.join(known)}."
    return f"{full_name} is not a setting, so it would have no effect. {hint}"


def _check_range(value: Any, metadata: Mapping[str, Any], name: str) -> None:  # noqa: ANN401
    if not isinstance(value, (int, float)):
        return
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = " and ".join(
            part
            for part in (
                f"at least {low}" if low is not None else "",
                f"at most {high}" if high is not None else "",
            )
            if part
        )
        raise UserError(
            f"{name}={value} is out of range: {metadata.get('help') or name} must be {bounds}."
        )


def _convert(value: Any, hint: Any, name: str) -> Any:  # noqa: ANN401
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, section=name)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, name)
    if origin is typing.Literal:
        if value not in arguments:
            close = nearest(str(value), map(str, arguments))
            hint_text = f" Did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{name}={value!r} is not one of {', '.join(map(str, arguments))}.{hint_text}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(value, "a list such as [a, b]", name)
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise _wrong_type(value, f"a list of {len(arguments)} values", name)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(
            _convert(v, kind, f"{name}[{i}]")
            for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(value, "a section of key: value lines", name)
        return {str(k): _convert(v, arguments[1], f"{name}.{k}") for k, v in value.items()}
    return _convert_plain(value, hint, name)


def _convert_union(value: Any, arguments: tuple[Any, ...], name: str) -> Any:  # noqa: ANN401
    if value is None and type(None) in arguments:
        return None
    choices = [a for a in arguments if a is not type(None)]
    for index, choice in enumerate(choices):
        try:
            return _convert(value, choice, name)
        except UserError:
            if index == len(choices) - 1:
                raise
    raise AssertionError(f"{name}: a union without members")


def _convert_plain(value: Any, hint: Any, name: str) -> Any:  # noqa: ANN401
    if hint is Path:
        if not isinstance(value, (str, Path)):
            raise _wrong_type(value, "a path", name)
        return Path(value)
    if hint is float:
        if isinstance(value, str):
            try:
                value = float(value)  # YAML 1.1 reads 1e-3 as a string
            except ValueError:
                raise _wrong_type(value, "a number", name) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong_type(value, "a number", name)
        if value != value:
            raise UserError(
                f"{name} is not a number (NaN): every result would be NaN. Set a number."
            )
        return float(value)
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(value, "a whole number", name)
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise _wrong_type(value, "true or false", name)
        return value
    if hint is str:
        if not isinstance(value, str):
            raise _wrong_type(value, "text (quote it in YAML)", name)
        return value
    raise AssertionError(f"{name}: no conversion to {hint}")


def _wrong_type(value: Any, expected: str, name: str) -> UserError:  # noqa: ANN401
    return UserError(
        f"{name} must be {expected}, not {_describe(value)}. Correct the recipe or --set."
    )


def _describe(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "empty"
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    kind = kinds.get(
        type(value), "a section" if isinstance(value, Mapping) else type(value).__name__
    )
    return kind if isinstance(value, (Mapping, list)) else f"{kind} ({value!r})"
