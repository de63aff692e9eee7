"""Methods and their options, for people: ``lightvlm methods``, and plans made from words of a command line."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any

from .methods import METHODS, method, method_names
from .plan import Part, Plan


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as keyword arguments; a value is a Python literal, else a string.

    Raises:
        ValueError: a pair without a name or an equals sign.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        try:
            options[name.strip().replace("-", "_")] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip().replace("-", "_")] = value.strip()
    return options


def make_plan(name: str, options: dict[str, Any]) -> Plan:
    """The plan of a method; like :func:`lightvlm.method`, but an option it lacks is named with those it has.

    Raises:
        ValueError: no such method, no such option, or an option out of range.
        TypeError: an option of the wrong type.
    """
    if name in method_names():
        known = [option["name"] for option in describe(name)["options"]]
        for option in options:
            if option not in known:
                raise ValueError(f"method {name} has no option {option!r}; options: {', '.join(known)}")
    return method(name, **options)


def describe(name: str) -> dict[str, Any]:
    """A method's name, source, summary and options, as JSON-ready data.

    A method function's own arguments come first, then the fields that they leave out of its first part. What an
    argument means is in the field of its name, of the prefill or the precision part, in the cache part's (also for
    ``decode_...``), or in the plan's.
    """
    found = METHODS[name]
    signature = inspect.signature(found.make)
    plan = found.make()
    prefill, cache, precision = map(_fields, (plan.prefill, plan.cache, plan.precision))
    options = []
    for argument in signature.parameters.values():
        if argument.kind is not argument.VAR_KEYWORD:
            own = prefill.get(argument.name) or precision.get(argument.name)
            own = own or cache.get(argument.name.removeprefix("decode_"))
            field = own or _fields(plan).get(argument.name)
            options.append(_option(argument.name, argument.default, field))
    named = {option["name"] for option in options}
    if any(argument.kind is argument.VAR_KEYWORD for argument in signature.parameters.values()):
        part = (
            plan.prefill or plan.cache or plan.precision
        )  # a preset has other values than the part's defaults
        options += [
            _option(key, getattr(part, key), field)
            for key, field in _fields(part).items()
            if key not in named
        ]
    summary = re.sub(r":\w+:`([^`]*)`", r"\1", (inspect.getdoc(found.make) or "").partition("\n")[0])
    return {"name": name, "source": found.source, "summary": summary, "options": options}


def _fields(part: Part | Plan | None) -> dict[str, Any]:
    return {} if part is None else {field.name: field for field in dataclasses.fields(part)}  # type: ignore[arg-type]


def _option(name: str, default: Any, field: Any) -> dict[str, Any]:
    metadata = field.metadata if field is not None else {}
    limits = {key: metadata[key] for key in ("choices", "low", "high") if key in metadata}
    return {"name": name, "default": default, "doc": metadata.get("doc", ""), **limits}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``lightvlm methods`` has no options of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"methods": [...]}, each as :func:`describe` says."""
    return {"methods": [describe(name) for name in method_names()]}


def show(result: dict[str, Any]) -> None:
    """Print a table a method."""
    from rich.table import Table

    from .terminal import print_table

    for found in result["methods"]:
        title = f"{found['name']} — {found['source']}"
        table = Table(title=title, caption=found["summary"], title_justify="left", caption_justify="left")
        for column in ("option", "default", "meaning"):
            table.add_column(column)
        for option in found["options"]:
            table.add_row(option["name"], repr(option["default"]), option["doc"] + _limits(option))
        print_table(table)


def _limits(option: dict[str, Any]) -> str:
    if "choices" in option:
        return f" ({', '.join(map(str, option['choices']))})"
    parts = [
        f"{word} {option[key]}" for key, word in (("low", "at least"), ("high", "at most")) if key in option
    ]
    return f" ({', '.join(parts)})" if parts else ""
