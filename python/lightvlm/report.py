"""What an attached run did: tokens, bytes, time, calls, and what stepped aside."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Result of :meth:`lightvlm.Run.report`, over everything since attach.

    Attributes:
        prefills: prompts that were read (rows of all batches).
        tokens_per_layer: tokens that each decoder layer computed at prefill, mean over prompts.
        image_tokens: image tokens of a prompt, mean over prompts that have any.
        image_tokens_kept: image tokens that each layer computed, mean over prompts that have any.
        image_keep_share: image tokens computed over image tokens, mean over layers (1 is the full model).
        attending_share: share of the tokens that attended in each layer, over prompts whose attention was sparse.
        attention_flops_share: FLOPs of attention in those prompts over the full model's.
        flops_share: prefill FLOPs of the decoder over the full model's.
        kv_bytes_used: bytes of valid keys and values after the last step.
        kv_bytes_allocated: bytes of the buffers that hold them.
        kv_bytes_full: bytes that the uncompressed cache would use at that length.
        kv_compression: kv_bytes_full over kv_bytes_used.
        reread: times that a later question had a conversation read anew (its rows are among prefills, its time in
            "prefill").
        later_bytes: bytes kept for that after the last step, on the host or the device.
        seconds: per phase ("prefill", "decode"); the model's time, images included, without the language-model head.
        own_seconds: the method's own work while prompts were read: planning, probes, choices, reductions and cuts, and
            ops outside of them (these on a CPU alone). Part of the prefill's time, but for ops on the cache after it.
        op_calls, op_seconds: per op; on a GPU seconds are left out, because measuring them would synchronise.
        compactions: times the cache was compacted while decoding.
        graph: of :func:`lightvlm.generate`, where a CUDA graph did the steps: "captures", and "replays" (tokens).
        kl: KL divergence of the plan's next-token distributions from the full model's: {"mean", "max", "agreement",
            "tokens"}, as :meth:`lightvlm.Run.divergence` found it last; None where it was never asked.
        stepped_aside: reason -> times that a plan, or a part of it, did not apply.
        errors: what the device reported.
    """

    prefills: int = 0
    tokens_per_layer: list[float] = field(default_factory=list)
    image_tokens: float = 0.0
    image_tokens_kept: list[float] = field(default_factory=list)
    image_keep_share: float = 1.0
    attending_share: list[float] = field(default_factory=list)
    attention_flops_share: float = 1.0
    flops_share: float = 1.0
    kv_bytes_used: int = 0
    kv_bytes_allocated: int = 0
    kv_bytes_full: int = 0
    kv_compression: float = 1.0
    reread: int = 0
    later_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    own_seconds: float = 0.0
    op_calls: dict[str, int] = field(default_factory=dict)
    op_seconds: dict[str, float] = field(default_factory=dict)
    compactions: int = 0
    graph: dict[str, int] = field(default_factory=dict)
    kl: dict[str, float | int] | None = None
    stepped_aside: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        rows = [
            ("prompts", f"{self.prefills}"),
            ("tokens per layer", _numbers(self.tokens_per_layer)),
            ("image tokens per layer", _numbers(self.image_tokens_kept)),
            ("image tokens, share over layers", f"{self.image_keep_share:.1%}"),
            *self._attention_rows(),
            ("decoder prefill FLOPs", f"{self.flops_share:.1%} of the full model's"),
            ("KV cache", f"{_bytes(self.kv_bytes_used)} used, {_bytes(self.kv_bytes_allocated)} allocated, "
                         f"{_bytes(self.kv_bytes_full)} if nothing were removed, {self.kv_compression:.2f}x"),
            ("compactions while decoding", f"{self.compactions}"),
            ("read anew for later questions", f"{self.reread}x, {_bytes(self.later_bytes)} kept for it"),
            *self._kl_rows(),
        ]  # fmt: skip
        if self.graph:
            rows.append(
                ("decode steps from a CUDA graph", "{replays}, captured {captures}x".format(**self.graph))
            )
        rows += [(f"{phase} time", f"{seconds * 1e3:.1f} ms") for phase, seconds in self.seconds.items()]
        if self.own_seconds:
            rows.append(("the method's own work at prefill", f"{self.own_seconds * 1e3:.2f} ms"))
        for name, calls in sorted(self.op_calls.items()):
            seconds = self.op_seconds.get(name)
            rows.append(
                (name, f"{calls} calls" + (f", {seconds * 1e3:.2f} ms" if seconds is not None else ""))
            )
        rows += [("stepped aside", f"{reason} ({times}x)") for reason, times in self.stepped_aside.items()]
        rows += [("error", message) for message in self.errors]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _attention_rows(self) -> list[tuple[str, str]]:
        if not self.attending_share:
            return []
        mean = sum(self.attending_share) / len(self.attending_share)
        return [
            ("tokens that attend", f"{mean:.1%}, mean over layers"),
            (
                "attention FLOPs at prefill",
                f"{self.attention_flops_share:.1%} of the full model's: {1 - self.attention_flops_share:.1%} less",
            ),
        ]

    def _kl_rows(self) -> list[tuple[str, str]]:
        if self.kl is None:
            return []
        mean, largest, same = (self.kl[name] for name in ("mean", "max", "agreement"))
        said = f"{mean:.3g} nats mean, {largest:.3g} most; {same:.1%} of {self.kl['tokens']} tokens the same"
        return [("KL from the full model", said)]


def _numbers(values: list[float]) -> str:
    """Runs of equal numbers as 'n x value'."""
    parts: list[tuple[float, int]] = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1] = (value, parts[-1][1] + 1)
        else:
            parts.append((value, 1))
    return ", ".join(f"{value:g}" + (f" x{times}" if times > 1 else "") for value, times in parts) or "-"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
