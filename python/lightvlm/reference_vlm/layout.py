"""Token layout for training: one shared image prefix, then independent conversations that can't see each
other.

A row is `[<bos> user <image> x 256] [branch 0] [branch 1] ... [padding]`. Each branch is what the chat
template puts after the image for one conversation, attends to the prefix and to itself only, and its
positions start right after the prefix, so each branch is computed exactly as if it were alone with the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .build import IMAGE_TOKENS, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .questions import Question

IDS = {word: index for index, word in enumerate(VOCABULARY)}
PREFIX = 2 + IMAGE_TOKENS
"""Tokens of the shared prefix: <bos>, user and the image."""
TEXT = 118
"""Tokens kept for the branches of a row."""


@dataclass
class Rows:
    """A batch of B rows of S = PREFIX + TEXT tokens.

    Attributes:
        tokens: int64 (B, S).
        positions: int64 (B, S).
        mask: additive attention mask (B, 1, S, S): 0 where a query may look, a large negative number
            elsewhere.
        where: int64 (3, A): batch row, column and owner of each answer token; the column before predicts it.
        owners: the question that each owner number stands for.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    where: torch.Tensor
    owners: list[Question]


def branch_tokens(turns: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation after the image, and each token's turn if it answers, else -1."""
    tokens: list[int] = []
    turn_of: list[int] = []
    for number, question in enumerate(turns):
        if question.kind == "pairs":
            words = question.answer.split()
            return [IDS[word] for word in words], [number if i % 2 else -1 for i in range(len(words))]
        asked = ["user"] * (number > 0) + [*question.prompt.split(), "assistant"]
        answered = [*question.answer.split(), "<eos>"]
        tokens += [IDS[word] for word in asked + answered]
        turn_of += [-1] * len(asked) + [number] * len(answered)
    return tokens, turn_of


def pack(conversations: Sequence[Sequence[Sequence[Question]]], dtype: torch.dtype) -> Rows:
    """Lay out one row for each scene's conversations; those beyond `TEXT` tokens are left out."""
    count, length = len(conversations), PREFIX + TEXT
    tokens = torch.full((count, length), IDS["<pad>"])
    tokens[:, 0], tokens[:, 1], tokens[:, 2:PREFIX] = IDS["<bos>"], IDS["user"], IDS["<image>"]
    positions = torch.arange(length).repeat(count, 1)
    branch = torch.full((count, length), -1)
    where: list[tuple[int, int, int]] = []
    owners: list[Question] = []
    for row, scene_conversations in enumerate(conversations):
        start = PREFIX
        for number, turns in enumerate(scene_conversations):
            ids, turn_of = branch_tokens(turns)
            end = start + len(ids)
            if end > length:
                continue
            tokens[row, start:end] = torch.tensor(ids)
            positions[row, start:end] = torch.arange(PREFIX, PREFIX + len(ids))
            branch[row, start:end] = number
            where += [(row, start + i, len(owners) + turn) for i, turn in enumerate(turn_of) if turn >= 0]
            owners += turns
            start = end
    branch[:, :PREFIX] = -2
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == -2)
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(count, 1, length, length, dtype=dtype)
    mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)
    return Rows(tokens, positions, mask, torch.tensor(where).T.contiguous(), owners)
