"""What one can write in torch for ``importance``: every way that was found to win somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024  # keys


@dataclass(frozen=True)
class Problem:
    """query (B, W, Hq, D): the last W of N rows; key (B, N, Hkv, D). Scores are means over rows and heads."""

    query: Tensor
    key: Tensor

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.query.shape[3]) ** -0.5

    def packed(self) -> Tensor:
        """The queries of each key head's group side by side: (B, Hkv, group W, D)."""
        batch, _, _, width = self.query.shape
        return self.query.transpose(1, 2).reshape(batch, self.key.shape[2], -1, width)

    def keys(self) -> Tensor:
        """(B, Hkv, N, D)."""
        return self.key.transpose(1, 2)

    def hidden(self) -> Tensor:
        """(W, W): which of the last W keys a row does not see. It sees all before them."""
        window = self.query.shape[1]
        return torch.ones(window, window, dtype=torch.bool, device=self.query.device).triu(1)

    def mean(self, sums: Tensor) -> Tensor:
        """Sums over rows and heads (B, N), divided by how many there are that see the key."""
        window, heads = self.query.shape[1:3]
        tokens = sums.shape[1]
        seen = torch.full((tokens,), window, device=sums.device)
        seen[tokens - window :] = torch.arange(window, 0, -1, device=sums.device)
        return sums / (heads * seen)

    def lse(self) -> Tensor:
        """(B, Hq, W) fp32, as FlashAttention returns it."""
        rows = []
        for b in range(self.query.shape[0]):
            query, keys = self.packed()[b].float(), self.keys()[b].float()
            logits = (query @ keys.mT).mul_(self.scale)
            hide(logits, self.hidden(), -torch.inf)
            rows.append(logits.logsumexp(dim=-1).view(self.query.shape[2], -1))
        return torch.stack(rows)


def hide(values: Tensor, hidden: Tensor, value: float) -> Tensor:
    """values (..., group W, N), in place: the last W keys where a row does not see them."""
    window = hidden.shape[0]
    values.unflatten(-2, (-1, window))[..., values.shape[-1] - window :].masked_fill_(hidden, value)
    return values


def given_baselines(problem: Problem, lse: Tensor) -> dict[str, Callable[[], object]]:
    """With the log-sum-exp (B, Hq, W) at hand."""
    batch, window = problem.query.shape[:2]
    tokens, kv_heads = problem.key.shape[1:3]
    hidden, scale = problem.hidden(), problem.scale
    half = problem.query.dtype != torch.float32
    packed_lse = lse.view(batch, kv_heads, -1, 1)

    def masses(logits: Tensor) -> Tensor:
        return hide(logits.mul_(scale).sub_(packed_lse).exp_(), hidden, 0)

    def repeated() -> Tensor:
        keys = problem.keys().repeat_interleave(problem.group, dim=1)
        logits = (problem.query.transpose(1, 2) @ keys.mT).float() * scale - lse[..., None]
        return problem.mean(hide(logits.exp(), hidden, 0).sum(dim=(1, 2)))

    def packed() -> Tensor:
        logits = (problem.packed() @ problem.keys().mT).float()
        return problem.mean(masses(logits).sum(dim=(1, 2)))

    def widened() -> Tensor:
        query = problem.packed().float().mul_(scale)
        logits = (query @ problem.keys().float().mT).sub_(packed_lse).exp_()
        return problem.mean(hide(logits, hidden, 0).sum(dim=(1, 2)))

    def keys_first() -> Tensor:
        logits = (problem.keys() @ problem.packed().mT).float()
        mass = logits.mul_(scale).sub_(packed_lse.mT).exp_()
        hide(mass.mT, hidden, 0)
        return problem.mean(mass.sum(dim=-1).sum(dim=1))

    def keys_first_widened() -> Tensor:
        query = problem.packed().float().mul_(scale)
        mass = (problem.keys().float() @ query.mT).sub_(packed_lse.mT).exp_()
        hide(mass.mT, hidden, 0)
        return problem.mean(mass.sum(dim=-1).sum(dim=1))

    def baddbmm() -> Tensor:
        query, keys = problem.packed().float().flatten(0, 1), problem.keys().float().flatten(0, 1)
        start = packed_lse.neg().flatten(0, 1).expand(-1, -1, tokens)
        mass = hide(torch.baddbmm(start, query, keys.mT, alpha=scale).exp_(), hidden, 0)
        return problem.mean(mass.view(batch, -1, tokens).sum(dim=1))

    def einsum() -> Tensor:
        query = problem.query.unflatten(2, (kv_heads, -1))
        logits = torch.einsum("bwkgd,bnkd->bkgwn", query, problem.key).float().flatten(2, 3)
        return problem.mean(masses(logits).sum(dim=(1, 2)))

    def chunked() -> Tensor:
        query, keys = problem.packed(), problem.keys()
        sums = torch.empty(batch, tokens, device=query.device)
        wide = torch.ones(window, tokens, dtype=torch.bool, device=query.device).triu(tokens - window + 1)
        for begin in range(0, tokens, _CHUNK):
            some = slice(begin, min(begin + _CHUNK, tokens))
            mass = (query @ keys[:, :, some].mT).float().mul_(scale).sub_(packed_lse).exp_()
            if some.stop > tokens - window:
                mass.unflatten(2, (-1, window)).masked_fill_(wide[:, some], 0)
            sums[:, some] = mass.sum(dim=(1, 2))
        return problem.mean(sums)

    baselines: dict[str, Callable[[], object]] = {
        "repeat_kv, matmul, exp": repeated,
        "matmul, exp in place": packed,
        "keys first, exp in place": keys_first,
        "baddbmm in fp32, exp in place": baddbmm,
        "einsum, exp in place": einsum,
    }
    if half:
        baselines |= {
            "matmul in fp32, exp in place": widened,
            "keys first in fp32, exp in place": keys_first_widened,
        }
    if tokens > _CHUNK:
        baselines["chunks of keys, exp in place"] = chunked
    return baselines


def own_baselines(problem: Problem) -> dict[str, Callable[[], object]]:
    """With a softmax over the keys."""
    hidden, scale = problem.hidden(), problem.scale

    def repeated() -> Tensor:
        keys = problem.keys().repeat_interleave(problem.group, dim=1)
        logits = (problem.query.transpose(1, 2) @ keys.mT).float() * scale
        return problem.mean(hide(logits, hidden, -torch.inf).softmax(dim=-1).sum(dim=(1, 2)))

    def packed() -> Tensor:
        logits = (problem.packed() @ problem.keys().mT).float().mul_(scale)
        return problem.mean(hide(logits, hidden, -torch.inf).softmax(dim=-1).sum(dim=(1, 2)))

    def widened() -> Tensor:
        query = problem.packed().float().mul_(scale)
        logits = query @ problem.keys().float().mT
        return problem.mean(hide(logits, hidden, -torch.inf).softmax(dim=-1).sum(dim=(1, 2)))

    def by_head() -> Tensor:
        query, keys = problem.packed(), problem.keys()
        total = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
        for head in range(keys.shape[1]):
            logits = (query[:, head] @ keys[:, head].mT).float().mul_(scale)
            total += hide(logits, hidden, -torch.inf).softmax(dim=-1).sum(dim=1)
        return problem.mean(total)

    def weighted() -> Tensor:
        """The sums as a product with 1 / sum of exponentials, so that nothing is divided in place."""
        logits = (problem.packed() @ problem.keys().mT).float().mul_(scale)
        hide(logits, hidden, -torch.inf)
        mass = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        inverse = mass.sum(dim=-1, keepdim=True).reciprocal_()
        return problem.mean((inverse.mT @ mass).sum(dim=(1, 2)))

    baselines: dict[str, Callable[[], object]] = {
        "repeat_kv, matmul, softmax": repeated,
        "matmul, softmax": packed,
        "matmul, softmax, a head at a time": by_head,
        "matmul, exp in place, product with 1 / sum": weighted,
    }
    if problem.query.dtype != torch.float32:
        baselines["matmul in fp32, softmax"] = widened
    return baselines
