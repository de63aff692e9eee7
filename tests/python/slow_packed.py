"""A packed layer of the cache, slowly: lists of tokens, each with what was stored, what is left of it, and its mass.

Tokens change their place or their bits by the rules of the docstrings, one by one. What the cache holds is compared
with these lists, and may differ from what was stored by the quantiser's bounds alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 64


@dataclass
class Token:
    """exact, held: key and value (2, Hkv, D) float64, as stored at first and as they are found now.   error: what the
    former may differ from the latter by.   mass (Hkv,).   fresh: its packed content has not been read yet."""

    serial: int
    exact: Tensor
    held: Tensor
    error: Tensor
    mass: Tensor
    allowed: Tensor | None = None


Rows = list[list[Token]]


@dataclass
class SlowLayer:
    """sinks, buffer: a list for each row.   prompt: (bits, rows).   generated: bits -> rows, in the order they came."""

    padding: list[int]
    buffer: Rows
    packed: bool = False
    sinks: Rows = field(default_factory=list)
    prompt: list[tuple[int, Rows]] = field(default_factory=list)
    generated: dict[int, Rows] = field(default_factory=dict)
    last_query: Tensor | None = None
    tail: int = 0
    dropped: bool = False
    in_order: bool = True

    @property
    def segments(self) -> list[Rows]:
        """Packed ones, as decode_attention gets them."""
        sinks = [self.sinks] if any(self.sinks) else []
        return [*sinks, *(rows for _, rows in self.prompt), *self.generated.values()]

    def row(self, b: int) -> list[Token]:
        """All tokens of a row."""
        return [token for segment in [*self.segments, self.buffer] for token in segment[b]]

    def select(self, rows: list[int]) -> None:
        def taken(of: Rows) -> Rows:
            return [[_copy(token) for token in of[row]] for row in rows]

        self.padding = [self.padding[row] for row in rows]
        self.buffer = taken(self.buffer)
        self.sinks = taken(self.sinks) if self.sinks else []
        self.prompt = [(bits, taken(of)) for bits, of in self.prompt]
        self.generated = {bits: taken(of) for bits, of in self.generated.items()}
        self.last_query = None if self.last_query is None else self.last_query[rows]

    # -- packing

    def pack(self, part: Any, levels: tuple[int, ...], chosen: list[set[int]] | None, least: int) -> None:
        """What stands between sinks and recent tokens; ``chosen``: places in the buffer of those that attended."""
        if self.packed:
            return
        sinks = [row[: part.sinks] for row in self.buffer]
        recent = [row[len(row) - min(part.recent, max(0, len(row) - part.sinks)) :] for row in self.buffer]
        middle = [
            row[len(a) : len(row) - len(b)] for row, a, b in zip(self.buffer, sinks, recent, strict=True)
        ]
        if max(map(len, middle)) < least:
            return
        groups = [middle]
        if chosen is not None and len(levels) == 2:
            groups = [[], []]
            for b, row in enumerate(middle):
                first = self.padding[b] + len(sinks[b])
                mine = [first + at in chosen[b] for at in range(len(row))]
                groups[0].append([token for token, yes in zip(row, mine, strict=True) if yes])
                groups[1].append([token for token, yes in zip(row, mine, strict=True) if not yes])
        for bits, rows in zip(levels, groups, strict=False):
            if max(map(len, rows)) > 0:
                self.prompt.append((bits, rows))
                for row in rows:
                    quantise(row, bits)
        self.sinks = sinks if part.sinks else []
        self.in_order = len(self.prompt) <= 1
        self.buffer, self.padding, self.packed = recent, [0] * len(recent), True
        self.tail = min(self.tail, *map(len, recent))

    def pack_generated(self, part: Any, levels: tuple[int, ...], scale: float) -> None:
        self.pack(part, levels, None, part.interval)
        while self.packed and min(map(len, self.buffer)) >= part.recent + part.interval:
            oldest = [row[: part.interval] for row in self.buffer]
            self.buffer = [row[part.interval :] for row in self.buffer]
            high = part.interval
            if len(levels) == 2 and self.last_query is not None:
                shares = [self._shares(b, row, scale) for b, row in enumerate(oldest)]
                high = -(-max(_fewest(one, part.tau) for one in shares) // BLOCK) * BLOCK
            if high == part.interval:
                self.append(levels[0], oldest)
            else:
                best = [set(_highest(one, high)) for one in shares]
                for bits, inside in zip(levels, (True, False), strict=True):
                    self.append(
                        bits,
                        [
                            [token for at, token in enumerate(row) if (at in mine) is inside]
                            for row, mine in zip(oldest, best, strict=True)
                        ],
                    )
            self.tail = min(self.tail, *map(len, self.buffer))

    def _shares(self, b: int, row: list[Token], scale: float) -> list[float]:
        """Attention of the last query among these tokens, mean over heads."""
        assert self.last_query is not None
        query = self.last_query[b].double()
        keys = torch.stack([token.held[0] for token in row], dim=1)
        group = query.shape[0] // keys.shape[0]
        weights = torch.stack(
            [(keys[h // group] @ query[h] * scale).softmax(0) for h in range(query.shape[0])]
        )
        return weights.mean(0).tolist()

    def append(self, bits: int, rows: Rows) -> None:
        """Generated or demoted tokens behind those of as many bits, in blocks with scales of their own."""
        have = self.generated.setdefault(bits, [[] for _ in rows])
        self.in_order = self.in_order and len(self.generated) == 1
        for before, row in zip(have, rows, strict=True):
            before += row
            for first in range(0, len(row), BLOCK):
                quantise(row[first : first + BLOCK], bits)

    # -- eviction

    def evict(self, budgets: list[int], demotes: bool) -> bool:
        """As packed_eviction says; the prompt before generated tokens, and what has most before what has less."""
        prompts = [(bits, rows) for bits, rows in self.prompt if any(rows) and (bits > 2 or not demotes)]
        grown = [bits for bits, rows in self.generated.items() if rows[0] and (bits > 2 or not demotes)]
        batch = len(self.buffer)
        sinks = self.sinks or [[] for _ in range(batch)]
        room = [max(0, budgets[b] - len(sinks[b]) - len(self.buffer[b])) for b in range(batch)]
        stays: list[set[int]] = []  # serials, of each row
        touched = {bits: [0] * batch for bits in grown}
        over = False
        for b in range(batch):
            scored = [(_worth(token), token) for _, rows in prompts for token in rows[b]]
            for bits in grown:
                row = self.generated[bits][b]
                for first in range(0, len(row), BLOCK):
                    block = row[first : first + BLOCK]
                    mean = sum(_worth(token) for token in block) / BLOCK
                    scored += [(mean, token) for token in block]
            over = over or len(scored) > room[b]
            best = _highest([worth for worth, _ in scored], room[b])
            stays.append({scored[at][1].serial for at in best})
            for bits in grown:
                row = self.generated[bits][b]
                touched[bits][b] = sum(
                    any(token.serial in stays[b] for token in row[first : first + BLOCK])
                    for first in range(0, len(row), BLOCK)
                )
        if not over:
            return False
        lost = [self._evict_prompt(rows, stays, demotes) for _, rows in prompts]
        lost += [self._evict_blocks(bits, max(touched[bits]), demotes) for bits in grown]
        if any(lost):
            self.in_order, self.dropped = False, self.dropped or not demotes
        return any(lost)

    def _evict_prompt(self, rows: Rows, stays: list[set[int]], demotes: bool) -> bool:
        going = [
            sum(token.serial not in mine for token in row) for row, mine in zip(rows, stays, strict=True)
        ]
        if demotes:
            gone = min(going) // BLOCK * BLOCK
            if not gone:
                return False
            taken = []
            for b, row in enumerate(rows):
                least = set(_highest([-_worth(token) for token in row], gone))
                taken.append([token for at, token in enumerate(row) if at in least])
                rows[b][:] = [token for at, token in enumerate(row) if at not in least]
            self.append(2, taken)
            return True
        for row, mine in zip(rows, stays, strict=True):
            row[:] = [token for token in row if token.serial in mine]
        return any(going)

    def _evict_blocks(self, bits: int, blocks: int, demotes: bool) -> bool:
        rows = self.generated[bits]
        if blocks == len(rows[0]) // BLOCK:
            return False
        taken = []
        for b, row in enumerate(rows):
            means = [sum(map(_worth, row[i : i + BLOCK])) / BLOCK for i in range(0, len(row), BLOCK)]
            best = set(_highest(means, blocks))
            taken.append([token for at, token in enumerate(row) if at // BLOCK not in best])
            rows[b] = [token for at, token in enumerate(row) if at // BLOCK in best]
        if demotes:
            self.append(2, taken)
        return True

    # -- attention

    def attend(self, b: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output (S, Hq, D) of the last S tokens of a row's buffer, and the weights (S, Hkv, N), mean over a group."""
        tokens = self.row(b)
        keys, values = (torch.stack([token.held[i] for token in tokens], dim=1) for i in (0, 1))
        heads, new = query.shape[:2]
        group = heads // keys.shape[0]
        logits = torch.stack([query[h].double() @ keys[h // group].T for h in range(heads)]) * scale
        hidden = torch.arange(len(tokens))[None] > torch.arange(len(tokens) - new, len(tokens))[:, None]
        weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
        out = torch.stack([weights[h] @ values[h // group] for h in range(heads)], dim=1)
        return out, weights.unflatten(0, (-1, group)).mean(1).transpose(0, 1)


def quantise(tokens: list[Token], bits: int) -> None:
    """One block: say what each may change by.

    Keys: half a step of their channel. Values: half a step of their token, in units of their channel, with the token's
    scale and zero rounded to 16 bits, outwards.
    """
    if not tokens:
        return
    levels = 2**bits - 1
    every = torch.stack([token.held for token in tokens], dim=2)  # (2, Hkv, n, D)
    key, value = every
    step = (key.amax(1) - key.amin(1)) / levels
    root = value.abs().amax(1).clamp_min(2.0**-100).sqrt()
    spread = root.amax(1) * 2.0625 / levels
    channel = root * (2.0 ** torch.frexp(spread).exponent)[:, None]
    for token in tokens:
        shared = token.held[1] / channel
        low, high = shared.amin(1, keepdim=True), shared.amax(1, keepdim=True)
        each = (high - low + low.abs() * 2**-10) / levels * (1 + 2**-10) + 2**-24
        # Besides, fp32 computes with relative errors of some 2**-24.
        rounding = token.held.abs().amax((1, 2), keepdim=True) * 2**-20
        token.allowed = torch.stack([step / 2, channel * each / 2]) + rounding


def _worth(token: Token) -> float:
    return float(token.mass.mean())


def _highest(scores: list[float], count: int) -> list[int]:
    """Indices of the highest scores, ties to the lower index, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def _fewest(shares: list[float], tau: float) -> int:
    """How many of the highest hold a share tau of all."""
    total, count = 0.0, 0
    for share in sorted(shares, reverse=True):
        total, count = total + share, count + 1
        if total >= tau * sum(shares):
            break
    return count


def _copy(token: Token) -> Token:
    return Token(token.serial, token.exact, token.held, token.error, token.mass, token.allowed)
