"""How far a plan moves the model's next-token distributions: their KL divergence from the full model's.

The full model, with nothing attached and its own cache, answers greedily once. Then each plan is attached and led along
that very answer, token by token, through generate(), so that positions, masks and caches are what they are in use; at
every step its distribution is set beside the full model's. Nothing a plan changes can hide behind a different text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Plan

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Divergence:
    """KL(full || plan) of next-token distributions, in nats, over the answers of a batch.

    Attributes:
        mean, max: over all tokens of all rows.
        agreement: share of them at which both distributions have the same most likely token.
        tokens: how many there are: each row's answer, its end token included. The first of an answer follows the
            prompt alone, so that only what happens to the prompt's own attention can change it.
        rows: mean of each row.
        stepped_aside: reason -> times that the plan, or a part of it, did not apply.
    """

    mean: float
    max: float
    agreement: float
    tokens: int
    rows: list[float] = field(default_factory=list)
    stepped_aside: dict[str, int] = field(default_factory=dict)

    @classmethod
    def together(cls, parts: Sequence[Divergence]) -> Divergence:
        """Of several batches, each token counting alike."""
        tokens = sum(part.tokens for part in parts)
        aside: Counter[str] = Counter()
        for part in parts:
            aside.update(part.stepped_aside)
        return cls(
            mean=sum(part.mean * part.tokens for part in parts) / tokens,
            max=max(part.max for part in parts),
            agreement=sum(part.agreement * part.tokens for part in parts) / tokens,
            tokens=tokens,
            rows=[row for part in parts for row in part.rows],
            stepped_aside=dict(aside),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, float | int]:
        """mean, max, agreement and tokens: what a report has of it."""
        return {"mean": self.mean, "max": self.max, "agreement": self.agreement, "tokens": self.tokens}


@overload
def divergence(
    model: nn.Module, inputs: Mapping[str, Any], plans: Plan, *, new_tokens: int = 64
) -> Divergence: ...
@overload
def divergence(
    model: nn.Module, inputs: Mapping[str, Any], plans: Mapping[str, Plan], *, new_tokens: int = 64
) -> dict[str, Divergence]: ...
def divergence(
    model: nn.Module, inputs: Mapping[str, Any], plans: Plan | Mapping[str, Plan], *, new_tokens: int = 64
) -> Divergence | dict[str, Divergence]:
    """KL(full || plan) of the next-token distributions along the full model's greedy answer, in float64.

    Distributions are softmax of the logits as the model gives them, before anything that generate() does to them.

    Args:
        model: a VLM that lightvlm knows, with nothing attached.
        inputs: what ``model.generate`` takes: ``input_ids`` (B, S), ``attention_mask``, images. Padding on the left.
        plans: one plan, or plans by name; the full model answers once for all of them.
        new_tokens: tokens of an answer at most; a row ends earlier at its end token. The full model's logits of all of
            them are kept: (new_tokens, B, vocabulary).

    Returns:
        A :class:`Divergence`, or one for each name.

    Raises:
        TypeError, ValueError: what is wrong with an argument, or why a plan cannot be attached; the model is as it was.
    """
    named = {"": plans} if isinstance(plans, Plan) else plans
    _check(model, inputs, named, new_tokens)
    with torch.no_grad(), _same_positions(model):
        with _Reader(model) as full:
            sequences = _generate(model, inputs, new_tokens, full)
        answer = sequences[:, inputs["input_ids"].shape[1] :]
        counted = _until_end(model, answer)
        found = {
            name: _along(model, inputs, plan, full.logits, answer, counted) for name, plan in named.items()
        }
    return found[""] if isinstance(plans, Plan) else found


@contextlib.contextmanager
def _same_positions(model: Any) -> Iterator[None]:
    """Models with M-RoPE remember where the last prompt's positions ended; whoever has a cache goes on with that."""
    before = getattr(model.model, "rope_deltas", None)
    try:
        yield
    finally:
        if before is not None:
            model.model.rope_deltas = before


class _Reader:
    """Takes down the logits that choose each token of an answer, and, given an answer, has it chosen.

    What generate() hands to a logits processor went through others before, so the logits are the model's own, seen by
    a hook; a processor is called once a token, whatever calls of the model that took.
    """

    def __init__(self, model: Any, answer: Tensor | None = None) -> None:
        self.logits: list[Tensor] = []
        """Of each token (B, V), in the model's dtype."""
        self._model, self._answer = model, answer
        self._last = torch.empty(0)

    def __enter__(self) -> _Reader:
        self._handle = self._model.register_forward_hook(self._after)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self._last = output.logits[:, -1].detach()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = len(self.logits)
        self.logits.append(self._last.clone())
        if self._answer is None or at >= self._answer.shape[1]:  # a step too far, which generate() takes back
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self._answer[:, at : at + 1].to(scores.device), 0.0)


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int, reader: _Reader) -> Tensor:
    # transformers writes into the dictionary of encoder outputs it is given
    call = {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "logits_processor": [reader]}
    out: Tensor = model.generate(**call, max_new_tokens=new_tokens, return_dict_in_generate=False, **options)
    return out


def _along(
    model: Any, inputs: Mapping[str, Any], plan: Plan, full: list[Tensor], answer: Tensor, counted: Tensor
) -> Divergence:
    """Divergence of a plan. full: logits (B, V) of each token; answer (B, T) and counted, its tokens to count."""
    from .runtime import attach

    reader = _Reader(model, answer)
    with attach(model, plan) as run, reader:
        _generate(model, inputs, answer.shape[1], reader)
    steps = range(answer.shape[1])
    kl = torch.stack([kl_divergence(full[at], reader.logits[at]) for at in steps], dim=1)
    same = torch.stack([full[at].argmax(-1) == reader.logits[at].argmax(-1) for at in steps], dim=1)
    kl, same, counted = kl.cpu(), same.cpu(), counted.cpu()
    tokens = int(counted.sum())
    each = torch.where(counted, kl, 0.0)
    return Divergence(
        mean=float(each.sum() / tokens),
        max=float(each.max()),
        agreement=int((same & counted).sum()) / tokens,
        tokens=tokens,
        rows=(each.sum(1) / counted.sum(1)).tolist(),
        stepped_aside=run.report().stepped_aside,
    )


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(full) || softmax(other)) over the last dimension, in nats, float64, at least 0."""
    log_p, log_q = (F.log_softmax(x.double(), dim=-1) for x in (full, other))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a token that cannot come adds nothing
    return terms.sum(-1).clamp_min(0.0)


def _until_end(model: Any, answer: Tensor) -> Tensor:
    """(B, T) bool: tokens of each row up to its end token, this included."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(answer, dtype=torch.bool)
    end = torch.isin(answer, torch.as_tensor(ends, device=answer.device))
    return end.cumsum(1) - end.int() == 0


def _check(model: Any, inputs: Any, plans: Any, new_tokens: Any) -> None:
    """Raise before anything is run."""
    from .runtime import attach

    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int):
        raise TypeError(f"new_tokens must be an int, got {type(new_tokens).__name__}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    if not isinstance(plans, Mapping):
        raise TypeError(f"plans must be a lightvlm.Plan or plans by name, got {type(plans).__name__}")
    if not plans:
        raise ValueError("plans must name at least one plan, got none")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of generate()'s arguments, got {type(inputs).__name__}")
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise ValueError(f"inputs must have input_ids as a tensor, got {', '.join(inputs) or 'nothing'}")
    for plan in plans.values():
        attach(model, plan).detach()
