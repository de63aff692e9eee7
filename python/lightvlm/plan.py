"""Plans: what to do to a model, as plain frozen data.

A :class:`Plan` has three independent parts. ``prefill`` reduces image tokens inside the decoder while the
prompt is read, ``cache`` compacts the KV cache while text is generated, ``precision`` stores it in fewer
bits. Each part is a frozen dataclass registered under a ``kind``; its fields are its options, so that a plan
survives JSON and a command line without any code of its own. ``keep_for_later`` says what becomes of what they drop.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

SCHEMA_VERSION = 1

KeepForLater = Literal["offload", "quantize", "drop"]
_KEEP_FOR_LATER: tuple[str, ...] = typing.get_args(KeepForLater)

_KINDS: dict[tuple[str, str], type[Part]] = {}
PartType = TypeVar("PartType", bound="type[Part]")


class Part:
    """Base of every part of a plan: a frozen dataclass whose fields are its options."""

    slot: ClassVar[str]
    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON-ready data: its kind and every option."""
        assert dataclasses.is_dataclass(self)
        return {"kind": self.kind, **dataclasses.asdict(self)}


def register_part(slot: str, kind: str) -> typing.Callable[[PartType], PartType]:
    """Class decorator: register a frozen dataclass as the part
    ``kind`` of ``slot`` (prefill, cache, precision)."""
    if slot not in ("prefill", "cache", "precision"):
        raise ValueError(f"slot must be prefill, cache or precision, got {slot!r}")

    def wrap(cls: PartType) -> PartType:
        if (slot, kind) in _KINDS:
            raise ValueError(f"a {slot} part named {kind!r} is registered already")
        cls.slot, cls.kind = slot, kind
        _KINDS[(slot, kind)] = cls
        return cls

    return wrap


def _freeze(value: Any) -> Any:
    """JSON arrays come back as lists; the fields of a part are tuples (hashable, comparable)."""
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _part_from_dict(slot: str, data: Any) -> Part | None:
    if data is None:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ValueError(f"{slot} must be null or an object with a 'kind', got {data!r}")
    options = dict(data)
    kind = options.pop("kind")
    cls = _KINDS.get((slot, kind))
    if cls is None:
        known = sorted(name for s, name in _KINDS if s == slot)
        raise ValueError(f"unknown {slot} kind {kind!r}; known: {', '.join(known) or 'none'}")
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - names)
    if unknown:
        raise ValueError(
            f"{slot} kind {kind!r} has no option {unknown[0]!r}; options: {', '.join(sorted(names))}"
        )
    return cls(**{name: _freeze(value) for name, value in options.items()})


@dataclass(frozen=True)
class Plan:
    """What :func:`lightvlm.attach` does to a model.

    Args:
        prefill: reduces image tokens at some decoder layers, or None.
        cache: compacts the KV cache during decoding, or None.
        precision: stores the KV cache in fewer bits, or None.
        keep_for_later: what a later question to the same cache finds of the tokens that prefill and cache dropped.
            "offload": the conversation's input embeddings are kept on the host, and a later question has the whole
            conversation read anew; "quantize": the same, in 8 bits on the device; "drop": nothing is kept, and the
            question finds what earlier ones left (docs/multi-turn.md).

    Raises:
        TypeError: a part of the wrong kind, or a keep_for_later that is no string.
        ValueError: another keep_for_later.

    A plan whose parts are all None is the baseline: attaching it changes no bit of the result.
    """

    prefill: Part | None = None
    cache: Part | None = None
    precision: Part | None = None
    keep_for_later: KeepForLater = dataclasses.field(
        default="offload",
        metadata={"doc": "what a later question finds of dropped tokens", "choices": _KEEP_FOR_LATER},
    )

    def __post_init__(self) -> None:
        for slot in ("prefill", "cache", "precision"):
            part = getattr(self, slot)
            if part is not None and getattr(part, "slot", None) != slot:
                raise TypeError(f"{slot} must be None or a {slot} part, got {type(part).__name__}")
        if not isinstance(self.keep_for_later, str):
            raise TypeError(f"keep_for_later must be str, got {self.keep_for_later!r}")
        if self.keep_for_later not in _KEEP_FOR_LATER:
            known = ", ".join(map(repr, _KEEP_FOR_LATER))
            raise ValueError(f"keep_for_later must be one of {known}, got {self.keep_for_later!r}")

    def to_json(self, indent: int | None = None) -> str:
        """The plan as a JSON object with a schema version."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for slot in ("prefill", "cache", "precision"):
            part = getattr(self, slot)
            data[slot] = None if part is None else part.to_dict()
        data["keep_for_later"] = self.keep_for_later
        return json.dumps(data, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote; a part that is not there is None, a keep_for_later "offload".

        Raises:
            ValueError: not JSON, another schema version, an unknown part or option, an option out of range.
            TypeError: an option of the wrong type.
        """
        from . import methods as _methods  # noqa: F401  registers the built-in parts

        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"plan must be a JSON object, got {type(data).__name__}")
        version = data.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"plan has schema_version {version!r}; this version reads {SCHEMA_VERSION}")
        later = data.pop("keep_for_later", "offload")
        unknown = sorted(set(data) - {"prefill", "cache", "precision"})
        if unknown:
            raise ValueError(f"plan has no part {unknown[0]!r}; parts: prefill, cache, precision")
        parts = {slot: _part_from_dict(slot, data.get(slot)) for slot in ("prefill", "cache", "precision")}
        return cls(**parts, keep_for_later=later)


def check_options(part: Part) -> None:
    """Check every field of a part against its annotation and the ``choices``/``low``/``high`` of its
    metadata.

    Options come from command lines and JSON files as often as from code, so a wrong one must name itself.
    """
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if value is None and type(None) in typing.get_args(hints[field.name]):
            continue
        expected = _plain_types(hints[field.name])
        if not _is_one_of(value, expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise TypeError(f"{field.name} must be {names}, got {value!r}")
        if isinstance(value, tuple):
            items = _item_types(hints[field.name])
            for item in value:
                if not _is_one_of(item, items):
                    names = " or ".join(kind.__name__ for kind in items)
                    raise TypeError(f"{field.name} must hold {names} only, got {value!r}")
        choices = field.metadata.get("choices")
        if choices is not None and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if low is not None and isinstance(value, int | float) and not value >= low:
            raise ValueError(f"{field.name} must be at least {low}, got {value!r}")
        if high is not None and isinstance(value, int | float) and not value <= high:
            raise ValueError(f"{field.name} must be at most {high}, got {value!r}")


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """isinstance, except that True and False are no numbers."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _item_types(hint: Any) -> tuple[type, ...]:
    """The classes of the items of a ``tuple[int, ...] | None``."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    items = next(typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple)
    return _plain_types(items)


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The classes that ``isinstance`` may test for an annotation
    such as ``float | None`` or ``tuple[int, ...]``."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(choice) for choice in typing.get_args(hint)})
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options if option is not type(None))
    return (*plain, int) if float in plain else plain


def option(default: Any, doc: str, **limits: Any) -> Any:
    """A documented option of a part: ``choices=``, ``low=``,
    ``high=`` are checked by :func:`check_options`."""
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})
