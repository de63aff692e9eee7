"""Train the reference VLM from scratch: `python -m lightvlm.reference_vlm.train --out DIR --minutes 90`.

Stage 1 trains the vision tower and the projector with a linear head that names, from each projected image
token alone, the digit and the colour it belongs to. Stage 2 trains everything on the questions, with that
head's loss kept at a small weight; the head is dropped afterwards. Tokens are never reduced during training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .auxiliary import PatchHead, auxiliary_loss, glyph_accuracy
from .build import GRID, PATCH, build_model, save
from .layout import IDS, PREFIX, Rows, pack
from .questions import KINDS, Question, conversation, pairs, questions
from .scenes import Scene, TrainingScenes, make_scenes
from .targets import pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlavaForConditionalGeneration

AUXILIARY_WEIGHT = 0.1
_DENSE = (5, 6)
_REFRESH_STEPS = 400


def multiply_patches(model: LlavaForConditionalGeneration) -> None:
    """Compute the patch convolution as a matrix product, whose backward pass is several times faster."""
    convolution = model.model.vision_tower.embeddings.patch_embedding

    def forward(images: torch.Tensor) -> torch.Tensor:
        cells = images.reshape(-1, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(cells, convolution.weight.flatten(1)).permute(0, 3, 1, 2)

    convolution.forward = forward


def image_tokens(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """Projected image tokens, (B, 256, width)."""
    return torch.stack(list(model.model.get_image_features(images, return_dict=True).pooler_output))


def answer_logits(model: LlavaForConditionalGeneration, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Logits that predict each answer token of `rows`, (A, vocabulary)."""
    embeddings = model.get_input_embeddings()(rows.tokens)
    embeddings = torch.cat([embeddings[:, :2], tokens.to(embeddings.dtype), embeddings[:, PREFIX:]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[rows.where[0], rows.where[1] - 1]).float()


def draw_conversations(scene: Scene, rng: np.random.Generator) -> list[list[Question]]:
    """About ten branches: reading, counting, pairs, two conversations, single questions."""
    single = questions(scene, rng)
    about_scene = [[q] for q in single if q.kind in ("read", "count")]
    about_digit = [[q] for q in single if q.kind not in ("read", "count")]
    chained = [conversation(scene, rng, 3), conversation(scene, rng, 2)]
    aids = [[question] for question in pairs(scene, rng)]
    return about_scene + aids + about_digit[:4] + chained + about_digit[4:]


def pack_for(conversations: list[list[list[Question]]], device: torch.device, dtype: torch.dtype) -> Rows:
    rows = pack(conversations, dtype)
    rows.tokens, rows.positions = rows.tokens.to(device), rows.positions.to(device)
    rows.mask, rows.where = rows.mask.to(device), rows.where.to(device)
    return rows


class Trainer:
    """Model, head, optimizer, data and progress; everything that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = build_model(args.seed)
        nn.Module.to(self.model, self.device)
        multiply_patches(self.model)
        self.head = PatchHead(self.model.lm_head.in_features).to(self.device)
        tower: list[nn.Parameter] = []
        decoder: list[nn.Parameter] = []
        for name, parameter in [*self.model.named_parameters(), *self.head.named_parameters()]:
            is_decoder = "language_model" in name or name.startswith("lm_head")
            (decoder if is_decoder else tower).append(parameter)
        self.decoder = decoder
        groups = []
        for members, which in ((tower, "tower"), (decoder, "decoder")):
            matrices = [p for p in members if p.ndim >= 2]
            vectors = [p for p in members if p.ndim < 2]
            groups.append({"params": matrices, "weight_decay": 0.05, "which": which})
            groups.append({"params": vectors, "weight_decay": 0.0, "which": which})
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
        self.scenes = TrainingScenes(args.seed)
        self.rng = np.random.default_rng([2000, args.seed])
        self.validation = make_scenes("val", 160, 1)
        self.step = 0
        self.stage_two_step: int | None = None
        self.elapsed = 0.0
        self.smooth: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": (self.rng.bit_generator.state, self.scenes.rng.bit_generator.state, torch.get_rng_state()),
            "progress": (self.step, self.stage_two_step, self.elapsed),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state, self.scenes.rng.bit_generator.state = state["rng"][:2]
        torch.set_rng_state(state["rng"][2])
        self.step, self.stage_two_step, self.elapsed = state["progress"]

    def progress(self) -> float:
        """Share of the run that is done: by steps if a number of steps was given, else by the clock."""
        if self.args.steps:
            return min(1.0, self.step / self.args.steps)
        return min(1.0, self.elapsed / (60 * self.args.minutes))

    def set_learning_rates(self, progress: float) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * progress)) * 0.99 + 0.01
        decoder_steps = 0 if self.stage_two_step is None else self.step - self.stage_two_step
        for group in self.optimizer.param_groups:
            steps = self.step if group["which"] == "tower" else decoder_steps
            group["lr"] = self.args.lr * cosine * min(1.0, (steps + 1) / self.args.warmup)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        start = time.perf_counter()
        if self.step and self.step % _REFRESH_STEPS == 0:
            self.scenes.refresh()
        dense = self.stage_two_step is None
        if dense:
            scenes = self.scenes.draw(self.args.tower_batch, *_DENSE)
        else:
            scenes = self.scenes.draw(self.args.batch)
        images = pixels(scenes).to(self.device)
        data_seconds = time.perf_counter() - start
        figures: dict[str, float] = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            tokens = image_tokens(self.model, images)
            loss, patch_figures = auxiliary_loss(self.head, tokens, scenes)
            figures |= {"auxiliary": loss.item()} | patch_figures
            if not dense:
                conversations = [draw_conversations(scene, self.rng) for scene in scenes]
                rows = pack_for(conversations, self.device, torch.bfloat16)
                logits = answer_logits(self.model, tokens, rows)
                targets = rows.tokens[rows.where[0], rows.where[1]]
                answer_loss = F.cross_entropy(logits, targets)
                loss = AUXILIARY_WEIGHT * loss + answer_loss
                figures["answers"] = answer_loss.item()
                right = logits.argmax(-1) == targets
                for kind in (*KINDS, "pairs"):
                    mine = torch.tensor([q.kind == kind for q in rows.owners])[rows.where[2].cpu()]
                    figures[kind] = right.cpu()[mine].float().mean().item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        groups = self.optimizer.param_groups
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"] if p.grad is not None], 1.0)
        self.optimizer.step()
        figures["data_share"] = data_seconds / (time.perf_counter() - start)
        return figures

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on validation scenes: patch head per digit, and each kind, teacher-forced, per word."""
        glyphs: list[bool] = []
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        rng = np.random.default_rng(3)
        for start in range(0, len(self.validation), 32):
            scenes = self.validation[start : start + 32]
            with torch.autocast(self.device.type, torch.bfloat16):
                tokens = image_tokens(self.model, pixels(scenes).to(self.device))
                glyphs += glyph_accuracy(self.head, tokens, scenes)
                if self.stage_two_step is None:
                    continue
                singles = [[[q] for q in questions(scene, rng)] for scene in scenes]
                rows = pack_for(singles, self.device, torch.bfloat16)
                guess = answer_logits(self.model, tokens, rows).argmax(-1)
            targets = rows.tokens[rows.where[0], rows.where[1]]
            for hit, target, owner in zip(
                (guess == targets).tolist(), targets.tolist(), rows.where[2].tolist(), strict=True
            ):
                if target != IDS["<eos>"]:
                    right[rows.owners[owner].kind].append(hit)
        figures = {"glyphs": sum(glyphs) / len(glyphs)}
        return figures | {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}

    def run(self, out: Path) -> None:
        """Train to the end, writing log.jsonl and checkpoint.pt to `out`, then export the weights."""
        out.mkdir(parents=True, exist_ok=True)
        log = (out / "log.jsonl").open("a")
        bar = tqdm(total=1000, initial=int(1000 * self.progress()), unit="permille", mininterval=5)
        saved = self.elapsed
        while (progress := self.progress()) < 1:
            start = time.perf_counter()
            if self.stage_two_step is None and progress >= self.args.stage_one_share:
                self.stage_two_step = self.step
            self.set_learning_rates(progress)
            figures = self.train_step()
            for name, value in figures.items():
                self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value
            self.step += 1
            record: dict[str, Any] = {}
            if self.step % 20 == 0:
                record["train"] = {name: round(value, 4) for name, value in self.smooth.items()}
            if self.step % self.args.validate_every == 0:
                record["val"] = {name: round(value, 4) for name, value in self.validate().items()}
            self.elapsed += time.perf_counter() - start
            if record:
                rate = self.optimizer.param_groups[0]["lr"]
                record = {"step": self.step, "elapsed": round(self.elapsed, 1), "lr": round(rate, 6)} | record
                print(json.dumps(record), file=log, flush=True)
            bar.set_postfix(step=self.step, **{name: f"{value:.3f}" for name, value in self.smooth.items()})
            bar.update(int(1000 * self.progress()) - bar.n)
            if self.elapsed - saved > 60 * self.args.checkpoint_minutes:
                self.save_checkpoint(out)
                saved = self.elapsed
        self.save_checkpoint(out)
        last = {"step": self.step, "elapsed": self.elapsed, "val": self.validate()}
        print(json.dumps(last), file=log, flush=True)
        save(self.model, out / "weights")

    def save_checkpoint(self, out: Path) -> None:
        torch.save(self.state(), out / "checkpoint.partial")
        (out / "checkpoint.partial").replace(out / "checkpoint.pt")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoint.pt, log.jsonl and weights/")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, default=0, help="length of the run in optimizer steps")
    length.add_argument("--minutes", type=float, default=0.0, help="length by the clock, instead of --steps")
    add("--stage-one-share", type=float, default=0.16, help="share of the run spent on the tower alone")
    add("--batch", type=int, default=16, help="scenes a step in stage 2")
    add("--tower-batch", type=int, default=32, help="scenes a step in stage 1")
    add("--lr", type=float, default=1.5e-3, help="learning rate after warm-up")
    add("--warmup", type=int, default=150, help="steps of warm-up of the tower and of the decoder")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--validate-every", type=int, default=250, help="steps between validations")
    add("--checkpoint-minutes", type=float, default=5.0)
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    # Without it, steps on a CPU take seconds instead of tenths of one once values fade away.
    torch.set_flush_denormal(True)
    trainer = Trainer(args)
    if args.resume:
        trainer.restore(torch.load(args.out / "checkpoint.pt", map_location=args.device, weights_only=False))
    trainer.run(args.out)


if __name__ == "__main__":
    main()
