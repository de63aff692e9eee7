"""merge_pairs, in plain torch."""

from __future__ import annotations

import math

import torch

from .._checks import FLOATING
from .._pairs_args import PairsArgs, check_pairs
from .._types import MergedPairs, Selection
from .merge_tokens import unit_vectors


def merge_pairs(
    x: torch.Tensor,
    window: torch.Tensor,
    *,
    merge: int | float | torch.Tensor,
    weight: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
    eps: float = 0.0,
    align: str = "left",
    capacity: int | None = None,
) -> MergedPairs:
    """As `lightvlm_ext.ops.merge_pairs`; all arithmetic is float64, and x, metric, weight and merge may be. Raises
    on every device."""
    args = check_pairs(
        x,
        window,
        merge=merge,
        weight=weight,
        metric=metric,
        source=source,
        protected=protected,
        eps=eps,
        align=align,
        capacity=capacity,
        dtypes=(*FLOATING, torch.float64),
    )
    rows, tokens, width = x.shape
    slots = args.capacity

    def integers(*shape: int) -> torch.Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=x.device)

    selection = Selection(integers(rows, slots), integers(rows), integers(rows, tokens))
    out = torch.zeros((rows, slots, width), dtype=x.dtype, device=x.device)
    target = integers(rows, tokens)
    out_weight = torch.zeros((rows, slots), dtype=torch.float32, device=x.device)
    for row in range(rows):
        weights = _weights(args, row)
        into = _matching(args, row)
        kept = [t for t in range(tokens) if into[t] == t]
        if len(kept) > slots:
            raise ValueError(f"capacity: row {row} keeps {len(kept)} tokens, must be at least that")
        slot_of = {token: j for j, token in enumerate(kept)}
        selection.count[row] = len(kept)
        selection.index[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        selection.inverse[row] = torch.tensor([slot_of.get(t, -1) for t in range(tokens)], dtype=torch.int32)
        target[row] = torch.tensor([slot_of.get(t, -1) for t in into], dtype=torch.int32)
        first = slots - len(kept) if args.right else 0
        for j, token in enumerate(kept):
            parts = [token, *(t for t in range(tokens) if into[t] == token and t != token)]
            out[row, first + j] = _mean(x[row], parts, weights, args.eps)
            out_weight[row, first + j] = weights[parts].sum().clamp_max(torch.finfo(torch.float32).max)
    return MergedPairs(out, selection, target, out_weight)


def _weights(args: PairsArgs, row: int) -> torch.Tensor:
    if args.weight is None:
        return torch.ones(args.x.shape[1], dtype=torch.float64, device=args.x.device)
    weights = args.weight[row]
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"weight: row {row} must be finite and >= 0")
    return weights.double()


def _matching(args: PairsArgs, row: int) -> list[int]:
    """For each token the one that it is part of: another, itself, or -1 for padding."""
    ids = args.window[row].tolist()
    into = [t if i >= -1 else -1 for t, i in enumerate(ids)]
    unit = unit_vectors(args.metric[row])
    for window in sorted({i for i in ids if i >= 0}):
        members = [t for t, i in enumerate(ids) if i == window]
        if args.source is None:
            is_source = {t: position % 2 == 0 for position, t in enumerate(members)}
        else:
            is_source = {t: bool(args.source[row, t]) for t in members}
        if args.protected is not None:
            members = [t for t in members if not args.protected[row, t]]
        sources = [t for t in members if is_source[t]]
        destinations = [t for t in members if not is_source[t]]
        pairs = _pairs(args, row, window, len(members))
        if not sources or not destinations or pairs == 0:
            continue
        best, at = _nearest(unit[sources], unit[destinations])
        # A stable sort: ties stay in ascending order.
        order = sorted(range(len(sources)), key=lambda i: -best[i])
        for i in order[:pairs]:
            into[sources[i]] = destinations[at[i]]
    return into


def _pairs(args: PairsArgs, row: int, window: int, members: int) -> int:
    """How many pairs a window of so many tokens wants."""
    if args.each is not None:
        if args.each.dim() == 2 and window >= args.each.shape[1]:
            raise ValueError(
                f"window: row {row} has id {window}, must be below {args.each.shape[1]}, the columns of merge"
            )
        wanted = args.each[row] if args.each.dim() == 1 else args.each[row, window]
        if wanted.is_floating_point():
            if not 0 <= float(wanted) <= 1:
                raise ValueError(f"merge: row {row} has share {float(wanted)}, must be in [0, 1]")
            pairs = int((wanted * members).floor())
        else:
            if int(wanted) < 0:
                raise ValueError(f"merge: row {row} has {int(wanted)}, must be >= 0")
            pairs = int(wanted)
    elif args.ratio is not None:
        pairs = math.floor(args.ratio * members)
    else:
        pairs = args.merge or 0
    return min(pairs, members // 2) if args.source is None else pairs


def _nearest(sources: torch.Tensor, destinations: torch.Tensor) -> tuple[list[float], list[int]]:
    """Of each source the highest cosine, and where it is first reached (argmax need not give the first)."""
    # Not a matrix product: that may sum equal rows in different orders.
    cosine = torch.stack([(destinations * source).sum(dim=1) for source in sources])
    best = cosine.amax(dim=1)
    at = (cosine == best[:, None]).int().argmax(dim=1)
    return best.tolist(), at.tolist()


def _mean(x: torch.Tensor, parts: list[int], weights: torch.Tensor, eps: float) -> torch.Tensor:
    """The first of the parts, with what weighs something of the others merged into it."""
    weighing = [t for t in parts if weights[t] > 0]
    if not any(t != parts[0] for t in weighing):
        return x[parts[0]]
    share = (weights[weighing] / weights[weighing].sum().clamp_min(eps))[:, None]
    return (share * x[weighing].double()).sum(dim=0).to(x.dtype)
