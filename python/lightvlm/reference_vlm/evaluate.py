"""Answer questions about scenes with `generate()` and score the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .questions import KINDS, Question, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import ProcessorMixin

    from .scenes import Scene


def messages(turns: Sequence[Question | str]) -> list[dict[str, Any]]:
    """Chat messages for questions and the answers between them: `[question, answer text, question, ...]`.

    The image belongs to the first question.
    """
    chat: list[dict[str, Any]] = []
    for turn in turns:
        if isinstance(turn, str):
            chat.append({"role": "assistant", "content": [{"type": "text", "text": turn}]})
        else:
            chat.append({"role": "user", "content": [{"type": "text", "text": turn.prompt}]})
    chat[0]["content"].insert(0, {"type": "image"})
    return chat


@torch.no_grad()
def answer_batch(
    model: Any,
    processor: ProcessorMixin,
    scenes: Sequence[Scene],
    questions: Sequence[Question],
    batch_size: int = 32,
) -> tuple[list[str], list[float]]:
    """Ask question i about scene i, greedily, in left-padded batches.

    `model` is the reference VLM, or anything else that has its `generate()`.

    Returns:
        The answers as text and their scores in [0, 1] (see `questions.score`).

    Raises:
        ValueError: the numbers of scenes and questions differ, or `batch_size` is below 1.
    """
    if len(scenes) != len(questions):
        raise ValueError(f"one question a scene: got {len(scenes)} scenes and {len(questions)} questions")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    answers: list[str] = []
    for start in range(0, len(scenes), batch_size):
        chosen = slice(start, start + batch_size)
        texts = [
            processor.apply_chat_template(messages([question]), add_generation_prompt=True)
            for question in questions[chosen]
        ]
        inputs = processor(
            text=texts, images=[scene.image for scene in scenes[chosen]], padding=True, return_tensors="pt"
        ).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return answers, [score(question, answer) for question, answer in zip(questions, answers, strict=True)]


def summarise(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, float]:
    """Mean score for each kind that occurs, and of all questions under "all"."""
    means = {"all": sum(scores) / len(scores)}
    for kind in KINDS:
        mine = [s for question, s in zip(questions, scores, strict=True) if question.kind == kind]
        if mine:
            means[kind] = sum(mine) / len(mine)
    return means
