"""``merge_pairs`` against torch: one window of an image (ToMe), and windows of its grid (LightKV)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ._case import DTYPES, Case, Sizes, dtype_name, require, require_close
from ._merging import ADDERS, Find, finders, image_tokens

TOKENS = (576, 2000)
_SIDE = 4  # of LightKV's first windows, in windows
_MOST_FLOPS = 2e14


def cases(sizes: Sizes) -> Iterator[Case]:
    """Half of the tokens at even places are merged; the hidden states are their own metric."""
    for count in sizes.tokens or TOKENS:
        for batch in sizes.batches:
            for model, geometry in sizes.geometries().items():
                for dtype in DTYPES:
                    width = geometry.width
                    about = f"{batch} x {count} x {width} {dtype_name(dtype)} ({model})"
                    if batch * count**2 * width / 2 <= _MOST_FLOPS:
                        yield _pairs(f"{about}, one window", batch, count, width, dtype, sizes.device, 1)
                    yield _pairs(
                        f"{about}, {_SIDE}x{_SIDE} windows", batch, count, width, dtype, sizes.device, _SIDE
                    )


def _grid(count: int, side: int) -> Tensor:
    """The window of each of `count` tokens on a square grid, LightKV's way."""
    edge = math.isqrt(count - 1) + 1
    part = torch.repeat_interleave(
        torch.arange(side), torch.tensor([edge // side + (i < edge % side) for i in range(side)])
    )
    return (part[:, None] * side + part).flatten()[:count].int()


def _pairs(
    name: str, batch: int, count: int, width: int, dtype: torch.dtype, device: torch.device, side: int
) -> Case:
    x = image_tokens(batch, count, width, dtype, device)
    grid = _grid(count, side).to(device)
    window = grid.repeat(batch, 1)
    weight = torch.rand(batch, count, device=device) + 0.1
    # Known before, for the baselines: who gives and who takes in each window, and how many pairs.
    members = [(grid == i).nonzero().flatten() for i in range(side * side)]
    left = sum(len(m) - len(m) // 2 for m in members)

    def composed(find: Find, way: str) -> Tensor:
        rows = []
        for row, share in zip(x, weight, strict=True):
            into = torch.arange(count, device=device)
            for inside in members:
                gives, takes = inside[0::2], inside[1::2]
                best, at = find(row[gives], row[takes])
                gone = best.topk(len(inside) // 2).indices
                into[gives[gone]] = takes[at[gone]]
            kept = (into == torch.arange(count, device=device)).nonzero().flatten()
            slot = torch.empty_like(into)
            slot[kept] = torch.arange(len(kept), device=device)
            rows.append(ADDERS[way](row, slot[into], share, kept))
        return torch.stack(rows)

    def op() -> ops.MergedPairs:
        return ops.merge_pairs(x, window, merge=0.5, weight=weight, capacity=left)

    def verify() -> None:
        result = op()
        require(
            result.selection.count.tolist() == [left] * batch, "merge_pairs left another number of tokens"
        )
        merged = ADDERS["index_add"](
            x[0].double(), result.target[0].long(), weight[0], result.selection.index[0]
        )
        require_close(result.x[0], merged, 1e-5 if dtype == torch.float32 else 1e-2)
        # Near-ties may fall either way: pairs as close as any, up to rounding.
        into = result.selection.index[0, result.target[0].long()].long()
        unit = functional.normalize(x[0].double(), dim=-1)
        for inside in members:
            gives, takes = inside[0::2], inside[1::2]
            best = (unit[gives] @ unit[takes].T).amax(dim=1)
            gone = into[gives] != gives
            chosen = (unit[gives] * unit[into[gives]]).sum(dim=1)
            require(bool((chosen >= best - 1e-5)[gone].all()), "merge_pairs chose another than the nearest")
            worst, behind = best[gone].amin(), best[~gone].amax() if (~gone).any() else -1
            require(bool(worst >= behind - 1e-5), "merge_pairs merged others than the closest pairs")

    baselines: dict[str, Callable[[], object]] = {}
    for way, find in finders(dtype).items():
        baselines[f"{way}, topk, index_add"] = lambda find=find: composed(find, "index_add")  # type: ignore[misc]
    quickest = finders(dtype)["normalize takers"]
    for way in ADDERS:
        baselines[f"normalize takers, topk, {way}"] = lambda way=way: composed(quickest, way)  # type: ignore[misc]
    products = sum((len(m) - len(m) // 2) * (len(m) // 2) for m in members)
    return Case(
        name,
        op,
        baselines,
        verify,
        bytes=batch * (count + left) * width * x.element_size(),
        flops=2 * batch * products * width,
        precision=dtype,
        parameters={"batch": batch, "dtype": dtype_name(dtype)},
    )
