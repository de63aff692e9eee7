"""What ``lightvlm bench ops`` measures: inputs of real sizes, and the other ways to each op's result."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

KEEP = 0.35
# Width, query heads, key/value heads and head width of a 0.5B and a 7B decoder.
MODELS = {"0.5b": (896, 14, 2, 64), "7b": (3584, 28, 4, 128)}
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    name: of the inputs.   op: calls the native op.   baselines: name -> the same result in plain torch.
    verify: raises AssertionError unless they agree.   floors: name -> a plain copy of as many bytes as the op
    moves.   bytes: how many are read and written.
    """

    name: str
    op: Callable[[], object]
    baselines: dict[str, Callable[[], object]]
    verify: Callable[[], None]
    floors: dict[str, Callable[[], object]] = field(default_factory=dict)
    bytes: int = 0


def _require(same: bool, message: str) -> None:
    if not same:
        raise AssertionError(message)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance, rtol=tolerance)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compact_kv(tokens: Sequence[int], cache_bytes: int, device: torch.device) -> Iterator[Case]:
    """Keys and values of several layers, rows of different length, each layer with an index of its own."""
    del tokens
    layers = 4
    # heads, head width, heads-first storage (B, Hkv, N, D)
    for heads, width, heads_first in ((4, 128, False), (2, 64, True), (4, 128, True)):
        item = heads * width * 2
        count = cache_bytes // (layers * 2 * item)
        shape = (1, heads, count, width) if heads_first else (1, count, heads, width)
        stored = [
            torch.zeros(shape, dtype=torch.bfloat16, device=device).random_(0, 100) for _ in range(2 * layers)
        ]
        caches = [cache.transpose(1, 2) if heads_first else cache for cache in stored]
        kept = [
            (torch.rand(count, device=device) < KEEP).nonzero().flatten().int()[None] for _ in range(layers)
        ]
        counts = [torch.tensor([one.shape[1]], dtype=torch.int32, device=device) for one in kept]
        row_bytes = (width if heads_first else heads * width) * 2
        layout = "B,Hkv,N,D" if heads_first else "B,N,Hkv,D"
        name = f"{layers} layers x {count} tokens, rows of {row_bytes} B ({layout} bfloat16), keep {KEEP}"
        yield _compaction(name, caches, kept, counts)


def _compaction(name: str, caches: list[Tensor], kept: list[Tensor], counts: list[Tensor]) -> Case:
    layers = len(kept)
    keys, values = caches[:layers], caches[layers:]
    wide = [one[0].long() for one in kept] * 2

    def out_of_place() -> list[Tensor]:
        return [cache.index_select(1, index) for cache, index in zip(caches, wide, strict=True)]

    def with_gather() -> list[Tensor]:
        shapes = [(1, len(index), *cache.shape[2:]) for cache, index in zip(caches, wide, strict=True)]
        return [
            cache.gather(1, index[None, :, None, None].expand(shape))
            for cache, index, shape in zip(caches, wide, shapes, strict=True)
        ]

    def copied_back() -> None:
        for cache, index in zip(caches, wide, strict=True):
            cache[:, : len(index)].copy_(cache.index_select(1, index))

    def op() -> None:
        ops.compact_kv_(keys, values, kept, counts)

    def verify() -> None:
        wanted = out_of_place()
        op()
        for cache, rows in zip(caches, wanted, strict=True):
            _require(torch.equal(cache[:, : rows.shape[1]], rows), "compact_kv_ disagrees with index_select")

    # Read and written, of keys and values; rows that stay in place are not moved.
    moved = sum(int((one[0] != torch.arange(one.shape[1], device=one.device)).sum()) for one in kept)
    total = 4 * moved * caches[0][0, 0].numel() * caches[0].element_size()
    baselines: dict[str, Callable[[], object]] = {
        "index_select, copied back": copied_back,
        "index_select, out of place": out_of_place,
        "gather, out of place": with_gather,
    }
    return Case(name, op, baselines, verify, _plain_copies(total // 2, caches[0].device), total)


def _plain_copies(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to copy `size` bytes: torch's, and on a CPU libc's, which takes one thread but stores past the caches."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copies: dict[str, Callable[[], object]] = {"memcpy (torch)": lambda: target.copy_(source)}
    if device.type == "cpu":
        copies["memcpy (libc)"] = lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
    return copies


def merge_tokens(tokens: Sequence[int], cache_bytes: int, device: torch.device) -> Iterator[Case]:
    """One image, kept tokens at random, the hidden states as their own metric."""
    del cache_bytes
    for count in tokens:
        for model, (width, *_) in MODELS.items():
            for dtype in DTYPES:
                yield _merge(
                    f"{count} x {width} {_name(dtype)} ({model}), keep {KEEP}", count, width, dtype, device
                )


def _merge(name: str, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    # A few directions and noise: tokens of an image resemble each other.
    shared = torch.randn(count // 8 + 1, width, device=device)
    which = torch.randint(0, len(shared), (count,), device=device)
    x = (shared[which] + torch.randn(count, width, device=device)).to(dtype)[None]
    selection = ops.select(torch.rand(1, count, device=device), keep=int(KEEP * count))
    weight = torch.rand(1, count, device=device) + 0.1
    group = torch.zeros(1, count, dtype=torch.int32, device=device)
    kept = selection.index[0].long()
    dropped = (selection.inverse[0] < 0).nonzero().flatten()

    def composed(unit: Tensor) -> Tensor:
        nearest = (unit[dropped] @ unit[kept].T).argmax(dim=1)
        total = weight[0, kept].clone().index_add_(0, nearest, weight[0, dropped])
        summed = x[0, kept].float() * weight[0, kept, None]
        summed.index_add_(0, nearest, x[0, dropped].float() * weight[0, dropped, None])
        return (summed / total[:, None]).to(dtype)

    def op() -> Tensor:
        return ops.merge_tokens(x, selection, weight, group)

    def verify() -> None:
        # The choices of the op itself, since near-ties may go either way; then the sums.
        out, target = ops.merge_tokens(x, selection, weight, group, return_target=True)
        unit = functional.normalize(x[0].double(), dim=-1)
        cosine = unit[dropped] @ unit[kept].T
        chosen = cosine.gather(1, target[0, dropped].long()[:, None])[:, 0]
        _require(
            bool((chosen >= cosine.amax(dim=1) - 1e-5).all()), "merge_tokens chose another than the nearest"
        )
        shares = functional.one_hot(target[0].long(), len(kept)).double() * weight[0, :, None]
        merged = (shares.T @ x[0].double()) / shares.sum(dim=0)[:, None]
        _close(out[0], merged, 1e-5 if dtype == torch.float32 else 1e-2)

    baselines: dict[str, Callable[[], object]] = {
        "normalize, matmul, argmax, index_add": lambda: composed(functional.normalize(x[0], dim=-1)),
    }
    if dtype != torch.float32:
        baselines["the same, similarity in float32"] = lambda: composed(
            functional.normalize(x[0].float(), dim=-1)
        )
    return Case(name, op, baselines, verify)


def select(tokens: Sequence[int], cache_bytes: int, device: torch.device) -> Iterator[Case]:
    """The highest scores of one row, and of every layer and head of a cache at once."""
    del cache_bytes
    for rows, count in [(1, count) for count in tokens] + [(112, 8192)]:
        scores = torch.rand(rows, count, device=device)
        keep = int(KEEP * count)

        def op(scores: Tensor = scores, keep: int = keep) -> Tensor:
            return ops.select(scores, keep=keep).index

        def composed(scores: Tensor = scores, keep: int = keep) -> Tensor:
            index = scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
            inverse = torch.full(scores.shape, -1, device=scores.device)
            inverse.scatter_(1, index, torch.arange(keep, device=scores.device).expand_as(index))
            return index

        def verify(op: Callable[[], Tensor] = op, composed: Callable[[], Tensor] = composed) -> None:
            _require(torch.equal(op().long(), composed()), "select disagrees with topk")

        yield Case(f"{rows} x {count}, keep {KEEP}", op, {"topk, sort, scatter": composed}, verify)


def importance(tokens: Sequence[int], cache_bytes: int, device: torch.device) -> Iterator[Case]:
    """Attention from the last 32 rows to every key, mean over rows and heads."""
    del cache_bytes
    window = 32
    for count in tokens:
        for model, (_, heads, kv_heads, width) in MODELS.items():
            for dtype in DTYPES:
                query = torch.randn(1, window, heads, width, device=device).to(dtype)
                key = torch.randn(1, count, kv_heads, width, device=device).to(dtype)
                name = f"{window} rows x {count} keys, {heads}/{kv_heads} heads of {width} {_name(dtype)} ({model})"
                yield _importance(name, query, key)


def _importance(name: str, query: Tensor, key: Tensor) -> Case:
    _, window, heads, width = query.shape
    count, kv_heads = key.shape[1:3]
    hidden = torch.ones(window, count, dtype=torch.bool, device=query.device).triu(count - window + 1)
    sees = (~hidden).sum(dim=0)

    def composed(q: Tensor, k: Tensor) -> Tensor:
        logits = (q @ k.mT).float() * width**-0.5
        mass = logits.masked_fill(hidden.repeat(logits.shape[2] // window, 1), -torch.inf).softmax(dim=-1)
        return mass.sum(dim=(1, 2)) / (heads * sees)

    def repeated() -> Tensor:
        return composed(
            query.transpose(1, 2), key.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2)
        )

    def packed() -> Tensor:
        grouped = query.transpose(1, 2).reshape(1, kv_heads, -1, width)
        return composed(grouped, key.transpose(1, 2))

    def op() -> Tensor:
        return ops.importance(query, key)

    def verify() -> None:
        exact = composed(
            query.double().transpose(1, 2).reshape(1, kv_heads, -1, width), key.double().transpose(1, 2)
        )
        # Relative to what a key gets on average.
        _close(op() * count, exact * count, 1e-3)

    return Case(
        name, op, {"repeat_kv, matmul, softmax": repeated, "packed group, matmul, softmax": packed}, verify
    )


def gather_tokens(tokens: Sequence[int], cache_bytes: int, device: torch.device) -> Iterator[Case]:
    """Hidden states, positions and both rotary tables of one row."""
    del cache_bytes
    for count in tokens:
        for model, (width, _, _, head) in MODELS.items():
            hidden = torch.randn(1, count, width, device=device).bfloat16()
            tables = [torch.randn(1, count, head, device=device).bfloat16() for _ in range(2)]
            position = torch.randint(0, count, (1, count, 3), device=device)
            selection = ops.select(torch.rand(1, count, device=device), keep=int(KEEP * count))
            yield _gather(f"{count} tokens ({model}), keep {KEEP}", [hidden, position, *tables], selection)


def _gather(name: str, tensors: list[Tensor], selection: ops.Selection) -> Case:
    index = selection.index[0].long()

    def op() -> list[Tensor]:
        return ops.gather_tokens(tensors, selection.index, selection.count)

    def selected() -> list[Tensor]:
        return [one.index_select(1, index) for one in tensors]

    def indexed() -> list[Tensor]:
        return [one[:, index] for one in tensors]

    def verify() -> None:
        same = all(torch.equal(a, b) for a, b in zip(op(), selected(), strict=True))
        _require(same, "gather_tokens disagrees with index_select")

    moved = sum(one[:, :1].numel() * one.element_size() * len(index) for one in tensors)
    floors = _plain_copies(moved, tensors[0].device)
    return Case(name, op, {"index_select": selected, "x[:, index]": indexed}, verify, floors, 2 * moved)


CASES: dict[str, Callable[[Sequence[int], int, torch.device], Iterator[Case]]] = {
    "compact_kv_": compact_kv,
    "gather_tokens": gather_tokens,
    "importance": importance,
    "merge_tokens": merge_tokens,
    "select": select,
}
