"""``select_diverse`` against a loop over a similarity matrix.

Its FLOPs are those of the norms: how many cosines the greedy choice needs depends on the features, see
docs/kernels/select_diverse.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ._case import DTYPES, KEEP, Case, Sizes, dtype_name, require

TOKENS = (1000, 2000)
WIDTH = 128  # of a mean key


def cases(sizes: Sizes) -> Iterator[Case]:
    """One image: by mean keys, and (1,000 tokens) by the hidden states themselves."""
    counts = sizes.tokens or TOKENS
    for tokens in counts:
        widths = [WIDTH]
        if tokens == TOKENS[0]:
            widths += sorted({geometry.width for geometry in sizes.geometries().values()})
        for width in widths:
            for dtype in DTYPES:
                yield from _diverse(tokens, width, dtype, sizes.device)


def _diverse(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    # Some directions, one that all share, and noise: tokens of an image resemble each other.
    centres = torch.randn(count // 8 + 1, width, device=device)
    which = torch.randint(0, len(centres), (count,), device=device)
    features = centres[which] + 0.5 * torch.randn(count, width, device=device)
    features = (features + torch.randn(1, width, device=device)).to(dtype)[None]
    scores = (1.5 * torch.randn(1, count, device=device)).softmax(dim=1)
    keep = max(1, int(KEEP * count))

    def similarity() -> Tensor:
        unit = functional.normalize(features[0].float(), dim=-1)
        return unit @ unit.T

    def loop_on_device(cosine: Tensor) -> Tensor:
        worth, nearest, value = scores[0].clone(), torch.zeros_like(scores[0]), torch.empty_like(scores[0])
        chosen = torch.empty(keep, dtype=torch.long, device=device)
        for step in range(keep):
            torch.mul(worth, nearest, out=value)
            torch.sub(worth, value, out=value)
            best = value.argmax()
            chosen[step] = best
            torch.maximum(nearest, cosine.index_select(0, best[None])[0], out=nearest)
            # Worth less than any other.
            worth.index_fill_(0, best[None], -1.0)
        return chosen.sort().values

    def loop(cosine: Tensor) -> Tensor:
        # Each choice comes to the host: on a CPU that saves calls, on a GPU it waits.
        worth, nearest, value = scores[0].clone(), torch.zeros_like(scores[0]), torch.empty_like(scores[0])
        chosen = []
        for _ in range(keep):
            torch.mul(worth, nearest, out=value)
            torch.sub(worth, value, out=value)
            best = int(value.argmax())
            chosen.append(best)
            torch.maximum(nearest, cosine[best], out=nearest)
            worth[best] = -1.0
        return torch.tensor(sorted(chosen), device=device)

    made = similarity()

    def op() -> Tensor:
        return ops.select_diverse(scores, features, keep=keep).index

    def verify() -> None:
        found, wanted = op()[0].long(), loop(made)
        # Where two values differ by rounding the two may part; hardly a token changes.
        common = int(torch.isin(found, wanted).sum())
        require(common >= 0.98 * keep, f"select_diverse shares {common} of {keep} tokens with the loop")

    name = f"{count} x {width} {dtype_name(dtype)}, keep {KEEP}"
    baselines: dict[str, dict[str, Callable[[], object]]] = {
        name: {
            "similarity matrix, loop": lambda: loop(similarity()),
            "similarity matrix, loop on the device": lambda: loop_on_device(similarity()),
        },
        # What is left of the baseline where somebody has made the matrix already.
        f"{name}, matrix for nothing": {
            "loop": lambda: loop(made),
            "loop on the device": lambda: loop_on_device(made),
        },
    }
    for case, ways in baselines.items():
        yield Case(
            case,
            op,
            ways,
            verify,
            bytes=features.numel() * features.element_size() + 12 * count,
            flops=2 * count * width,
            precision=dtype,
            parameters={"tokens": count, "batch": 1, "channels": width, "dtype": dtype_name(dtype)},
        )
