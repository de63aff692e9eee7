"""``gather_tokens`` against index_select and other ways to index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Sizes, plain_copies, require

TOKENS = (1000, 2000)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Hidden states, positions and both rotary tables of one row."""
    for count in sizes.tokens or TOKENS:
        for model, geometry in sizes.geometries().items():
            hidden = torch.randn(1, count, geometry.width, device=sizes.device).bfloat16()
            tables = [
                torch.randn(1, count, geometry.head_dim, device=sizes.device).bfloat16() for _ in range(2)
            ]
            position = torch.randint(0, count, (1, count, 3), device=sizes.device)
            selection = ops.select(torch.rand(1, count, device=sizes.device), keep=int(KEEP * count))
            yield _gather(f"{count} tokens ({model}), keep {KEEP}", [hidden, position, *tables], selection)


def _gather(name: str, tensors: list[Tensor], selection: ops.Selection) -> Case:
    index = selection.index[0].long()

    def op() -> list[Tensor]:
        return ops.gather_tokens(tensors, selection.index, selection.count)

    def selected() -> list[Tensor]:
        return [one.index_select(1, index) for one in tensors]

    def indexed() -> list[Tensor]:
        return [one[:, index] for one in tensors]

    def gathered() -> list[Tensor]:
        return [one.gather(1, index[None, :, None].expand(1, -1, one.shape[2])) for one in tensors]

    def masked() -> list[Tensor]:
        mask = selection.inverse[0] >= 0
        return [one[:, mask] for one in tensors]

    def verify() -> None:
        same = all(torch.equal(a, b) for a, b in zip(op(), selected(), strict=True))
        require(same, "gather_tokens disagrees with index_select")

    moved = sum(one[:, :1].numel() * one.element_size() * len(index) for one in tensors)
    floors = plain_copies(moved, tensors[0].device)
    baselines: dict[str, Callable[[], object]] = {
        "index_select": selected,
        "x[:, index]": indexed,
        "gather": gathered,
        "x[:, mask]": masked,
    }
    return Case(name, op, baselines, verify, floors, 2 * moved)
