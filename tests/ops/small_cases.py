"""Each op once or twice, at one more than its tiles: what a memory checker, a CUDA graph or a second run is tried on.

    call = make("select, mass", torch.float32, seed=0)
    result = call.on(backend)

The same name and dtype give the same shapes with every seed, so that a graph of one call can be replayed on the values
of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import reference
from lightvlm_ext._kv import KVSegment
from tests.ops.backends import Backend
from tests.ops.moving import map_tensors

INT = torch.int32


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an op.   defined: of all tensors of on(), what the op says something of."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    defined: Callable[[list[Tensor]], list[Tensor]] = list

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same with other tensors."""
        args, options = map_tensors(function, (self.args, self.options))
        return dataclasses.replace(self, args=args, options=options)

    def on(self, backend: Backend | Any) -> list[Tensor]:
        """Calls the op of a tier; the tensors it returned, and those it was given, which it may have written."""
        result = getattr(backend, self.op)(*self.args, **self.options)
        return self.defined([*tensors(result), *self.tensors()])

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in their order."""
        return tensors((self.args, self.options))

    def copy(self) -> Call:
        """The same on memory of its own."""
        return self.map(lambda tensor: tensor.clone(memory_format=torch.preserve_format))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of lists, tuples, mappings and dataclasses."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def make(name: str, dtype: torch.dtype, seed: int) -> Call:
    """The call of CASES[name] with values that belong to the seed."""
    torch.manual_seed(seed)
    return CASES[name](dtype)


def numbers(low: int, high: int, *shape: int) -> Tensor:
    """int32, from low to high inclusive."""
    return torch.randint(low, high + 1, shape, dtype=INT)


def chosen(rows: int, tokens: int, most: int) -> lightvlm_ext.ops.Selection:
    """A selection of random counts in `most` slots."""
    return reference.select(torch.rand(rows, tokens), keep=numbers(most // 2, most, rows), capacity=most)


def importance(dtype: torch.dtype, **options: Any) -> Call:
    query, key = torch.randn(2, 17, 6, 64).to(dtype), torch.randn(2, 129, 2, 64).to(dtype)
    bounds = {"leftpad": numbers(0, 40, 2), "lens": numbers(70, 129, 2)}
    return Call("importance", (query, key), {**bounds, "return_visible": True, **options})


def importance_with_lse(dtype: torch.dtype) -> Call:
    call = importance(dtype, lse=torch.empty(2, 6, 17))
    query, key = (one.float() for one in call.args)
    logits = torch.einsum("bwhd,bnhd->bhwn", query, key.repeat_interleave(3, dim=2)) * 64**-0.5
    return dataclasses.replace(call, options={**call.options, "lse": logits.logsumexp(dim=-1)})


def select(dtype: torch.dtype) -> Call:
    options = {"keep": numbers(1, 500, 2, 2), "segment": numbers(-1, 1, 2, 1025)}
    return Call("select", (torch.rand(2, 1025),), {**options, "forced": torch.rand(2, 1025) < 0.02})


def select_mass(dtype: torch.dtype) -> Call:
    return Call("select", (torch.rand(2, 1025) ** 4,), {"mass": 0.7, "candidates": torch.rand(2, 1025) < 0.9})


def select_diverse(dtype: torch.dtype) -> Call:
    options = {"keep": numbers(10, 40, 2), "forced": torch.rand(2, 129) < 0.05, "strength": 0.8}
    return Call("select_diverse", (torch.rand(2, 129), torch.randn(2, 129, 33).to(dtype)), options)


def gather_tokens(dtype: torch.dtype) -> Call:
    moved = [torch.randn(2, 65, 33).to(dtype), numbers(0, 9, 2, 65, 3).long(), torch.randn(2, 65, 2, 8)]
    return Call("gather_tokens", (moved, *chosen(2, 65, 33)[:2]), {"align": "right"})


def merge_tokens(dtype: torch.dtype) -> Call:
    inputs = (
        torch.randn(2, 129, 65).to(dtype),
        chosen(2, 129, 65),
        torch.rand(2, 129),
        numbers(-1, 1, 2, 129),
    )
    return Call("merge_tokens", inputs, {"return_target": True})


def merge_pairs(dtype: torch.dtype) -> Call:
    window = numbers(0, 2, 2, 129)
    return Call(
        "merge_pairs",
        (torch.randn(2, 129, 65).to(dtype), window),
        {"merge": 0.5, "weight": torch.rand(2, 129)},
    )


def compact_kv(dtype: torch.dtype, heads: int | None = None) -> Call:
    """Two layers of different length, values stored heads first, a third of the tokens kept."""
    lengths = (65, 130)
    keys = [torch.randn(2, tokens, 2, 64).to(dtype) for tokens in lengths]
    values = [torch.randn(2, 2, tokens, 64).to(dtype).transpose(1, 2) for tokens in lengths]
    rows = (2,) if heads is None else (2, heads)
    kept = [reference.select(torch.rand(2 * (heads or 1), tokens), keep=tokens // 3) for tokens in lengths]
    index, count = [one.index.view(*rows, -1) for one in kept], [one.count.view(rows) for one in kept]
    extras = [torch.randn(*rows, tokens, 3) for tokens in lengths]

    def defined(found: list[Tensor]) -> list[Tensor]:
        """What stands past count is nobody's."""
        slots = [length // 3 for length in lengths]
        caches = [one[:, :most] for one, most in zip(found[:4], slots * 2, strict=True)]
        return caches + found[4:8] + [one[..., :most, :] for one, most in zip(found[8:], slots, strict=True)]

    return Call("compact_kv_", (keys, values, index, count), {"extras": extras}, defined)


def compact_paged_kv(dtype: torch.dtype) -> Call:
    """Two sequences of up to five pages of 16 tokens, out of order in a pool of twelve, the same in two layers."""
    pages = [torch.randn(12, 16, 2, 64).to(dtype) for _ in range(4)]
    table = torch.randperm(12)[:10].view(2, 5).to(INT)
    kept = reference.select(torch.rand(2, 65), keep=33)
    options = {"lens": numbers(65, 80, 2)}

    def defined(found: list[Tensor]) -> list[Tensor]:
        """Row pages and pages given up; the tokens kept, by the table, and the other arguments."""
        results, pools, (used, *rest) = found[:3], found[3:7], found[7:]
        tokens = [pool[used.long()].flatten(1, 2)[:, :33] for pool in pools]
        return [*results, *tokens, used, *rest]

    return Call("compact_paged_kv_", (pages[:2], pages[2:], table, *kept[:2]), options, defined)


def packed(bits: int, tokens: int = 129, dtype: torch.dtype = torch.float32) -> lightvlm_ext.ops.PackedKV:
    key, value = (torch.randn(2, tokens, 2, 64).to(dtype) for _ in range(2))
    return reference.quantize_kv(key, value, bits=bits, lens=numbers(tokens // 2, tokens, 2))


def quantize_kv(dtype: torch.dtype, bits: int = 4) -> Call:
    key, value = (torch.randn(2, 129, 2, 64).to(dtype) for _ in range(2))
    return Call("quantize_kv", (key, value), {"bits": bits, "lens": numbers(60, 129, 2), "block": 64})


def quantize_kv_in_place(dtype: torch.dtype) -> Call:
    key, value = (torch.randn(2, 64, 2, 64).to(dtype) for _ in range(2))
    room = reference.quantize_kv(*(torch.randn(2, 192, 2, 64) for _ in range(2)), bits=2, block=64)
    return Call("quantize_kv_", (room, key, value), {"offset": 64, "lens": numbers(1, 64, 2)})


def dequantize_kv(dtype: torch.dtype) -> Call:
    return Call("dequantize_kv", (packed(2), dtype))


def decode_attention(dtype: torch.dtype) -> Call:
    recent = KVSegment(
        torch.randn(2, 65, 2, 64).to(dtype),
        torch.randn(2, 65, 2, 64).to(dtype),
        numbers(33, 65, 2),
        numbers(0, 9, 2),
    )
    segments = [packed(4), packed(2, 65), recent, packed(8, 33)]
    mass = [torch.rand(2, 2, tokens) for tokens in (129, 65, 65, 33)]
    return Call("decode_attention", (torch.randn(2, 1, 6, 64).to(dtype), segments), {"mass": mass})


def decode_attention_in_pages(dtype: torch.dtype) -> Call:
    """Pages that come in any order, also twice; with each seed in another."""
    key, value = (torch.randn(7, 16, 2, 64).to(dtype) for _ in range(2))
    bounds = (numbers(50, 80, 2), numbers(0, 20, 2))
    segments = [KVSegment(key, value, *bounds, numbers(0, 6, 2, 5)), packed(4, 65)]
    mass = [torch.rand(2, 2, tokens) for tokens in (80, 65)]
    return Call("decode_attention", (torch.randn(2, 1, 6, 64).to(dtype), segments), {"mass": mass})


def append_attend(dtype: torch.dtype) -> Call:
    """Two new tokens a row, the second row's up to the end."""
    key, value = (torch.randn(2, 65, 2, 64).to(dtype) for _ in range(2))
    added = [torch.randn(2, 2, 2, 64).to(dtype) for _ in range(2)]
    lens = torch.tensor([int(numbers(33, 63, 1)), 63], dtype=INT)
    options = {"leftpad": numbers(0, 9, 2), "mass": torch.rand(2, 2, 65)}
    return Call("append_attend_", (torch.randn(2, 1, 6, 64).to(dtype), key, value, *added, lens), options)


def append_attend_in_pages(dtype: torch.dtype) -> Call:
    """Pages in any order, none of them twice: a row would write into another's."""
    key, value = (torch.randn(12, 16, 2, 64).to(dtype) for _ in range(2))
    added = [torch.randn(2, 1, 2, 64).to(dtype) for _ in range(2)]
    options = {"block_table": torch.randperm(12)[:10].view(2, 5).to(INT)}
    inputs = (torch.randn(2, 1, 6, 64).to(dtype), key, value, *added, numbers(15, 79, 2))
    return Call("append_attend_", inputs, options)


CASES: dict[str, Callable[[torch.dtype], Call]] = {
    "importance": importance,
    "importance, lse": importance_with_lse,
    "importance, axis query": lambda dtype: importance(dtype, axis="query"),
    "select, keep": select,
    "select, mass": select_mass,
    "select_diverse": select_diverse,
    "gather_tokens": gather_tokens,
    "merge_tokens": merge_tokens,
    "merge_pairs": merge_pairs,
    "compact_kv_": compact_kv,
    "compact_kv_, heads": lambda dtype: compact_kv(dtype, heads=2),
    "compact_paged_kv_": compact_paged_kv,
    "quantize_kv": quantize_kv,
    "quantize_kv, 8 bit": lambda dtype: quantize_kv(dtype, bits=8),
    "quantize_kv_": quantize_kv_in_place,
    "dequantize_kv": dequantize_kv,
    "decode_attention": decode_attention,
    "decode_attention, pages": decode_attention_in_pages,
    "append_attend_": append_attend,
    "append_attend_, pages": append_attend_in_pages,
}
"""Name -> the call for a dtype of its large tensors, with random values."""


def bad_calls() -> dict[str, Call]:
    """Op -> a call with a value in a tensor that is out of its range, which a device reports to its error word."""
    x, window = torch.randn(1, 8, 4), torch.zeros(1, 8, dtype=INT)
    outside, one = torch.tensor([[1, 9]], dtype=INT), torch.tensor([2], dtype=INT)
    far = torch.tensor([99], dtype=INT)
    key, value = torch.randn(1, 8, 2, 32), torch.randn(1, 8, 2, 32)
    infinite = key.clone()
    infinite[0, 3, 1, 5] = torch.inf
    weight = torch.ones(1, 8)
    weight[0, 3] = -1.0
    kept = reference.select(torch.rand(1, 8), keep=4)
    small = reference.quantize_kv(key, value, bits=4)
    query = torch.randn(1, 1, 2, 32)
    return {
        "importance": Call("importance", (query, key), {"lens": far}),
        "select": Call("select", (torch.tensor([[1.0, torch.inf]]),), {"mass": 0.5}),
        "select_diverse": Call("select_diverse", (torch.rand(1, 8), x), {"keep": -one}),
        "gather_tokens": Call("gather_tokens", (x, outside, one)),
        "merge_tokens": Call("merge_tokens", (x, kept, weight, window)),
        "merge_pairs": Call("merge_pairs", (x, window), {"merge": 2, "weight": weight}),
        "compact_kv_": Call("compact_kv_", (key, value, outside, one)),
        "compact_paged_kv_": Call(
            "compact_paged_kv_", (key, value, torch.zeros(1, 1, dtype=INT), outside, one)
        ),
        "quantize_kv": Call("quantize_kv", (infinite, value), {"bits": 4}),
        "quantize_kv_": Call("quantize_kv_", (small, infinite, value)),
        "dequantize_kv": Call("dequantize_kv", (dataclasses.replace(small, lens=far), torch.float32)),
        "decode_attention": Call("decode_attention", (query, [KVSegment(key, value, far)])),
        "append_attend_": Call("append_attend_", (query, key, value, key[:, :1], value[:, :1], far)),
    }
