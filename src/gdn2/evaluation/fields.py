"""Whether a JSON object from a file holds what will be read from it; an error names the field that it lacks.

A field is a path of names with dots between them. In it `*` stands for every item of a list or an object, `+` for the
same where there has to be one.
"""

from collections.abc import Mapping
from typing import Any

Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)
TEXT: Kinds = (str,)
LIST: Kinds = (list,)
NUMBER_OR_NULL: Kinds = (*NUMBER, type(None))
WORDS = {int: "a number", float: "a number", str: "text", list: "a list", type(None): "null", bool: "true or false"}


def check_fields(record: Any, fields: Mapping[str, Kinds]) -> None:
    """ValueError for the first of `fields` that the record lacks, or that holds none of its kinds of value."""
    for path, kinds in fields.items():
        for name, value in _at(record, path):
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                words = " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))
                raise ValueError(f"field {name!r} is {value!r}; expected {words}")


def _at(record: Any, path: str) -> list[tuple[str, Any]]:
    """Name and value of everything that the path leads to."""
    found = [("", record)]
    for step in path.split("."):
        found = [
            (f"{name}.{key}" if name else key, inner) for name, value in found for key, inner in _in(name, value, step)
        ]
    return found


def _in(name: str, value: Any, step: str) -> list[tuple[str, Any]]:
    """The items of a value that a step of a path leads to, by name."""
    what = f"field {name!r}" if name else "all of it"
    if step in ("*", "+"):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None or (step == "+" and not value):
            raise ValueError(f"{what} is {value!r}; expected a list{' that is not empty' if step == '+' else ''}")
        return [(str(key), inner) for key, inner in items]
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}; expected an object with a field {step!r}")
    if step not in value:
        raise ValueError(f"no field {f'{name}.{step}' if name else step!r}")
    return [(step, value[step])]
