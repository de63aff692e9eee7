"""``lightvlm demo``: the reference VLM on held-out scenes, with the full model and under each method."""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answer import pick_device
from .terminal import print_table, progress

if TYPE_CHECKING:
    from transformers import BatchFeature

    from .reference_vlm.questions import Question
    from .reference_vlm.scenes import Scene
    from .trial import Case, Outcome

_BATCH = 25
_SHOWN = 4
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--out", default="lightvlm-demo", metavar="DIR", help="folder for pictures; default %(default)s"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=200,
        metavar="N",
        help="default %(default)s, each about its own scene",
    )
    parser.add_argument(
        "--decode-tokens",
        type=int,
        default=256,
        metavar="N",
        help="length of the long answer; default %(default)s",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        metavar="N",
        help="timed rounds, the fastest counts; default %(default)s",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default %(default)s")
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="of the CPU; default: torch's choice"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {"questions", "rows", "decode", "op_calls", "pictures", ...}; docs/command-line.md says what each is."""
    for name in ("questions", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not 2 <= args.decode_tokens <= 512:
        raise ValueError(f"--decode-tokens must be from 2 to 512, got {args.decode_tokens}")
    for module, package in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"lightvlm demo needs {package}: pip install 'lightvlm[demo]'")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, must be a folder")
    device = pick_device(args.device)

    import torch
    from PIL import Image

    from lightvlm_ext import observe

    from . import reference_vlm
    from .bench.common import describe
    from .trial import answer_at_length, ask, cases

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model: Any
    model, processor = reference_vlm.load()
    model.to(device)
    calls: Counter[str] = Counter()
    trials = cases()
    with progress() as bar, observe(lambda call: calls.update([call.name])):
        making = bar.add_task("making scenes", total=None)
        scenes, questions = draw(args.questions)
        batches = [encode(processor, scenes[i : i + _BATCH], questions[i : i + _BATCH]).to(device)
                   for i in range(0, len(scenes), _BATCH)]  # fmt: skip
        few = encode(processor, scenes[:_SHOWN], questions[:_SHOWN]).to(device)
        bar.remove_task(making)
        asking = bar.add_task("asking questions", total=len(trials) * len(batches) * (args.rounds + 1))
        outcomes = ask(model, batches, trials, args.rounds, lambda: bar.advance(asking))
        writing = bar.add_task("long answers", total=3 * (args.rounds + 1))
        decode = answer_at_length(model, few, args.decode_tokens, args.rounds, lambda: bar.advance(writing))
        out.mkdir(parents=True, exist_ok=True)
        drawing = bar.add_task("pictures", total=None)
        pictures = draw_pictures(model, processor, few, scenes, questions, trials, outcomes, out)
        scene_files = [out / f"scene-{number + 1}.png" for number in range(len(few["input_ids"]))]
        for path, scene in zip(scene_files, scenes, strict=False):
            Image.fromarray(scene.image).save(path)
        bar.remove_task(drawing)
    return {
        "questions": len(questions),
        "rows": [
            row(case, outcome, processor, questions, model.config.image_seq_length)
            for case, outcome in zip(trials, outcomes, strict=True)
        ],
        "decode": decode,
        "op_calls": dict(sorted(calls.items())),
        "pictures": [str(path) for path in pictures],
        "scenes": [str(path) for path in scene_files],
        **describe(str(device)),
    }


def draw(count: int) -> tuple[list[Scene], list[Question]]:
    """``count`` scenes of the test split and a question about each; the kinds take turns."""
    import numpy as np

    from .reference_vlm.questions import KINDS, questions
    from .reference_vlm.scenes import make_scenes

    scenes, asked = make_scenes("test", count, 0), []
    for number, scene in enumerate(scenes):
        options = questions(scene, np.random.default_rng([0, number]))
        wanted = [question for question in options if question.kind == KINDS[number % len(KINDS)]]
        asked.append(
            (wanted or options)[0]
        )  # a scene without a unique digit has no question about its colour
    return scenes, asked


def encode(processor: Any, scenes: list[Scene], questions: list[Question]) -> BatchFeature:
    """A left-padded batch of prompts."""
    from .reference_vlm.evaluate import messages

    texts = [
        processor.apply_chat_template(messages([question]), add_generation_prompt=True)
        for question in questions
    ]
    return processor(text=texts, images=[scene.image for scene in scenes], padding=True, return_tensors="pt")


def row(
    case: Case, outcome: Outcome, processor: Any, questions: list[Question], image_tokens: int
) -> dict[str, Any]:
    """A case's row of the table."""
    from .reference_vlm.evaluate import summarise
    from .reference_vlm.questions import score

    texts = processor.batch_decode(outcome.answers, skip_special_tokens=True)
    by_kind = summarise(questions, [score(q, text) for q, text in zip(questions, texts, strict=True)])
    report = outcome.report
    kept = report.image_tokens_kept if report is not None else [float(image_tokens)]
    return {
        "method": case.method,
        "keep": case.keep,
        "accuracy": by_kind.pop("all"),
        "by_kind": by_kind,
        "image_tokens": sum(kept) / len(kept),
        "final_image_tokens": round(kept[-1]),
        "flops_share": report.flops_share if report is not None else 1.0,
        "kv_bytes": round(outcome.kv_bytes / len(questions)),
        "prefill_seconds": outcome.prefill,
        "total_seconds": outcome.total,
        "op_calls": report.op_calls if report is not None else {},
        "stepped_aside": report.stepped_aside if report is not None else {},
    }


def draw_pictures(
    model: Any,
    processor: Any,
    inputs: BatchFeature,
    scenes: list[Scene],
    questions: list[Question],
    trials: list[Case],
    outcomes: list[Outcome],
    out: Path,
) -> list[Path]:
    """One picture for each share LightVLM keeps: what its stages kept of the first scenes, and all answers."""
    from .pictures import Shown, draw_kept
    from .reference_vlm.questions import score
    from .trial import ANSWER_TOKENS, put

    count = len(inputs["input_ids"])
    found = []
    for case in trials:
        if case.method != "lightvlm":
            continue
        with put(model, case.plan, trace=True) as handle:
            model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        assert handle is not None
        shown = []
        for number, (scene, question) in enumerate(zip(scenes[:count], questions[:count], strict=True)):
            answers = []
            for other, outcome in zip(trials, outcomes, strict=True):
                if other.plan is None or other.keep == case.keep:
                    text = processor.decode(outcome.answers[number], skip_special_tokens=True)
                    answers.append((other.method, text, score(question, text) == 1))
            stages = {layer: rows[number][0] for layer, rows in sorted(handle.kept.items())}
            shown.append(Shown(scene.image, question.prompt, question.answer, answers, stages))
        found.append(out / f"kept-{case.keep:.0%}.png".replace("%", "-percent"))
        draw_kept(found[-1], shown, case.keep)
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables and say what their columns are."""
    print_table(_answers_table(result))
    print_table(_decode_table(result["decode"]))
    print("ops called:", ", ".join(f"{name} {calls}x" for name, calls in result["op_calls"].items()))
    print("pictures:", ", ".join(result["pictures"]))
    print(
        "scenes, to ask other questions with lightvlm generate --model reference:",
        ", ".join(result["scenes"]),
    )


def _answers_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    full = result["rows"][0]
    caption = (
        "keep: final share of the image's tokens. accuracy: mean score; reading all digits scores by position. image"
        " tokens: mean over layers, and after the last stage. FLOPs: of the decoder's prefill. KV: keys and values"
        " that a question's prompt leaves in the cache. first token, whole answer: seconds of generate() for all"
        f" questions, vision tower included, in batches of {_BATCH}, fastest of the rounds. The full model is plain"
        " transformers with SDPA, nothing attached."
    )
    table = Table(
        title=f"{result['questions']} questions about held-out scenes, {result['device']}, torch {result['torch']}",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("method")
    for name in ("keep", "accuracy", "image tokens", "FLOPs", "KV", "first token", "whole answer"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["method"],
            f"{row['keep']:.0%}",
            f"{row['accuracy']:.1%}",
            f"{row['image_tokens']:.0f}, {row['final_image_tokens']}",
            f"{row['flops_share']:.0%}",
            f"{row['kv_bytes'] / 1024:.0f} KiB",
            *(
                f"{row[key]:.2f} s ({full[key] / row[key]:.2f}x)"
                for key in ("prefill_seconds", "total_seconds")
            ),
        )
    return table


def _decode_table(decode: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        title=f"answers of {decode['new_tokens']} tokens, batch of {decode['batch']}, {decode['prompt_tokens']} before",
        caption="KV at the end of the answer, whole batch: valid keys and values, and buffers; mean time of a step.",
        caption_justify="left",
    )
    table.add_column("method")
    for name in ("keep", "KV used", "KV allocated", "compactions", "a token"):
        table.add_column(name, justify="right")
    for row in decode["rows"]:
        table.add_row(
            row["method"],
            f"{row['keep']:.0%}",
            f"{row['kv_bytes_used'] / 1024:.0f} KiB",
            f"{row['kv_bytes_allocated'] / 1024:.0f} KiB",
            str(row["compactions"]),
            f"{row['milliseconds_per_token']:.2f} ms",
        )
    return table
