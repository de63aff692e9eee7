"""``merge_tokens`` against what torch has: a product, an argmax, and a weighted sum of some kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ._case import DTYPES, KEEP, Case, Sizes, dtype_name, require, require_close
from ._merging import ADDERS, Add, Find, finders, image_tokens

TOKENS = (1000, 2000)
_MOST_FLOPS = 2e14  # a case beyond it would take longer than it tells


def cases(sizes: Sizes) -> Iterator[Case]:
    """One image a row, kept tokens at random, the hidden states as their own metric."""
    for count in sizes.tokens or TOKENS:
        for batch in sizes.batches:
            for model, geometry in sizes.geometries().items():
                for dtype in DTYPES:
                    width = geometry.width
                    if 2 * KEEP * (1 - KEEP) * batch * count**2 * width > _MOST_FLOPS:
                        continue
                    name = f"{batch} x {count} x {width} {dtype_name(dtype)} ({model}), keep {KEEP}"
                    yield _merge(name, batch, count, width, dtype, sizes.device)


def _merge(name: str, batch: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = image_tokens(batch, count, width, dtype, device)
    selection = ops.select(torch.rand(batch, count, device=device), keep=int(KEEP * count))
    weight = torch.rand(batch, count, device=device) + 0.1
    group = torch.zeros(batch, count, dtype=torch.int32, device=device)
    index = selection.index.long()
    # Known before, for the baselines: the op finds them itself.
    dropped = torch.stack([(row < 0).nonzero().flatten() for row in selection.inverse])
    slots = torch.arange(index.shape[1], device=device)

    def composed(find: Find, add: Add) -> Tensor:
        rows = []
        for row, kept, gone, share in zip(x, index, dropped, weight, strict=True):
            owner = torch.empty(count, dtype=torch.long, device=device)
            owner[kept] = slots
            owner[gone] = find(row[gone], row[kept])[1]
            rows.append(add(row, owner, share, kept))
        return torch.stack(rows)

    def op() -> Tensor:
        return ops.merge_tokens(x, selection, weight, group)

    def verify() -> None:
        # The choices of the op itself, since near-ties may go either way; then the sums.
        out, target = ops.merge_tokens(x, selection, weight, group, return_target=True)
        unit = functional.normalize(x[0].double(), dim=-1)
        cosine = unit[dropped[0]] @ unit[index[0]].T
        chosen = cosine.gather(1, target[0, dropped[0]].long()[:, None])[:, 0]
        require(
            bool((chosen >= cosine.amax(dim=1) - 1e-5).all()), "merge_tokens chose another than the nearest"
        )
        merged = ADDERS["index_add"](x[0].double(), target[0].long(), weight[0], index[0])
        require_close(out[0], merged, 1e-5 if dtype == torch.float32 else 1e-2)

    baselines: dict[str, Callable[[], object]] = {}
    found = finders(dtype)
    quickest = found["normalize takers"]
    for way, find in found.items():
        baselines[f"{way}, index_add"] = lambda find=find: composed(find, ADDERS["index_add"])  # type: ignore[misc]
    for way, add in ADDERS.items():
        baselines[f"normalize takers, {way}"] = lambda add=add: composed(quickest, add)  # type: ignore[misc]
    kept_count = index.shape[1]
    return Case(
        name,
        op,
        baselines,
        verify,
        bytes=batch * (count + kept_count) * width * x.element_size(),
        flops=2 * batch * kept_count * (count - kept_count) * width,
        precision=dtype,
        parameters={"batch": batch, "dtype": dtype_name(dtype)},
    )
