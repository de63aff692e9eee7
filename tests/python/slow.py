"""A second, slow implementation of what lightvlm does to a decoder, written from the documentation alone.

One row at a time, in float64, with explicit loops over tokens and a plain softmax over explicit lists of keys.
It shares no code with the package: weights come from the model, everything else from here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from python.tiny import IMAGE_ID, VIDEO_ID
from torch import Tensor

Selected = list[int]


class SlowDecoder:
    """One row of a batch on its way through a reduced decoder.

    ``options`` are those of LightVLMPrefill (or RandomPrefill, with ``random`` numbers per image index) under their
    own names; ``decode`` those of DecodeCompaction, or None.
    """

    def __init__(
        self, model: Any, prefill: dict[str, Any] | None, decode: dict[str, Any] | None = None
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.layers = self.model.model.language_model.layers
        self.prefill, self.decode = prefill, decode
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.queries: list[list[Tensor]] = [[] for _ in self.layers]
        self.mass: dict[int, Tensor] = {}
        self.kept: dict[int, list[Selected]] = {}
        self.seen = self.since = 0
        self.next_position = 0
        self.shifts: list[tuple[int, int]] = []

    # -- prompt

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (M, V) of every token that is left of a prompt of one row without padding."""
        ids = inputs["input_ids"][0]
        hidden, sizes = self._embed(inputs)
        self._sides = [(math.isqrt(size), math.isqrt(size)) for size in sizes]
        if "image_grid_thw" in inputs:
            self._sides = [
                (height // 2, width // 2) for _, height, width in inputs["image_grid_thw"].tolist()
            ]
        segment = _segments(ids, sizes)
        within = [segment[:i].count(segment[i]) if segment[i] >= 0 else -1 for i in range(len(segment))]
        positions = self._positions(inputs)
        self.seen, self.next_position = len(ids), int(positions.max()) + 1
        stages = dict(self.prefill["stages"]) if self.prefill and sizes else {}
        scores = None
        for index, layer in enumerate(self.layers):
            if index in stages:
                hidden, left = self._reduce(hidden, segment, within, sizes, scores, stages[index])
                segment = [segment[i] for i in left]
                within = [within[i] for i in left]
                positions = self._renumber(index, positions[..., left], len(ids) - len(left))
                self.kept[index] = [
                    [within[i] for i in range(len(segment)) if segment[i] == image]
                    for image in range(len(sizes))
                ]
            query, key, value = self._project(layer, hidden, positions)
            self.keys.append(key)
            self.values.append(value)
            weights = _weights(query, key, layer.self_attn.scaling)
            if index + 1 in stages:
                scores = self._score(weights, segment)
            hidden = _finish(layer, hidden, weights, value)
        return self._logits(hidden)

    def _embed(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        """Embeddings (S, C) with image features in the place of placeholders, and tokens of each image."""
        ids = inputs["input_ids"][0]
        hidden = self.model.get_input_embeddings()(ids).clone()
        found: dict[int, list[Tensor]] = {}
        if "pixel_values" in inputs:
            pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
            pixels["pixel_values"] = pixels["pixel_values"].double()
            features = self.model.model.get_image_features(**pixels)
            found[IMAGE_ID] = list(getattr(features, "pooler_output", features))
        if "pixel_values_videos" in inputs:
            features = self.model.model.get_video_features(
                inputs["pixel_values_videos"].double(), inputs["video_grid_thw"]
            )
            found[VIDEO_ID] = list(getattr(features, "pooler_output", features))
        for token, images in found.items():
            hidden[ids == token] = torch.cat(images)
        sizes: list[int] = []
        at = 0
        while at < len(ids):  # in reading order
            images = found.get(int(ids[at]), [])
            sizes += [len(images[0])] if images else []
            at += len(images.pop(0)) if images else 1
        return hidden, sizes

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Positions (S,), or with M-RoPE (3, S): a text token is one further on all axes, an image's are its frame,
        row and column, and what follows it stands behind its longer side."""
        ids = inputs["input_ids"][0].tolist()
        if "qwen" not in self.model.config.model_type:
            return torch.arange(len(ids))
        grids = {
            IMAGE_ID: iter(inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()),
            VIDEO_ID: iter(inputs.get("video_grid_thw", torch.empty(0, 3)).tolist()),
        }
        second = int(self.model.config.vision_config.tokens_per_second)  # a frame a second
        found: list[tuple[int, int, int]] = []
        start = 0
        while len(found) < len(ids):
            if ids[len(found)] in grids:
                frames, height, width = next(grids[ids[len(found)]])
                height, width = height // 2, width // 2
                found += [
                    (start + frame * second, start + row, start + column)
                    for frame in range(frames)
                    for row in range(height)
                    for column in range(width)
                ]
                start += max(height, width)
            else:
                found.append((start, start, start))
                start += 1
        return torch.tensor(found).T

    def _renumber(self, index: int, positions: Tensor, lost: int) -> Tensor:
        """Positions of the tokens that stay at a stage, and in ``shifts`` where generated ones go on."""
        assert self.prefill is not None
        how, left = self.prefill.get("positions", "keep"), positions.shape[-1]
        if how == "keep" or not lost:
            return positions
        if how == "renumber":
            self.shifts.append((index, left - self.next_position))
        return torch.arange(left).expand(positions.shape)

    def _score(self, weights: Tensor, segment: Sequence[int]) -> Tensor:
        """Scores (S,) from attention weights (H, S, S) of the layer before a stage."""
        assert self.prefill is not None
        size = len(segment)
        rows = [size - 1]
        if self.prefill.get("probe_rows", "text") == "text":
            first = min(i for i in range(size) if segment[i] >= 0)
            text = [i for i in range(first, size) if segment[i] < 0]
            rows = text[-self.prefill.get("probe_limit", 64) :] or rows
        scores = torch.zeros(size, dtype=torch.float64)
        for token in range(size):
            seen = [row for row in rows if row >= token]
            if not seen:
                continue
            head_scores = []
            for head in range(weights.shape[0]):
                received = [float(weights[head, row, token]) for row in seen]
                worst = self.prefill.get("over_rows", "mean") == "max"
                head_scores.append(max(received) if worst else sum(received) / len(received))
            worst = self.prefill.get("over_heads", "mean") == "max"
            scores[token] = max(head_scores) if worst else sum(head_scores) / len(head_scores)
        return scores

    def _reduce(
        self,
        hidden: Tensor,
        segment: list[int],
        within: list[int],
        sizes: list[int],
        scores: Tensor | None,
        keep: float,
    ) -> tuple[Tensor, list[int]]:
        """Hidden states of the tokens that stay, and which they are."""
        assert self.prefill is not None
        if self.prefill["kind"] == "random":
            scores = torch.tensor([self.prefill["random"][i] if i >= 0 else 0.0 for i in within]).double()
        out = hidden.clone()
        left = [i for i in range(len(segment)) if segment[i] < 0]
        for image, size in enumerate(sizes):
            tokens = [i for i in range(len(segment)) if segment[i] == image]
            budget = min(len(tokens), max(1, math.floor(keep * size + 0.5)))
            if scores is None:  # before the first layer
                order = even_order(*self._sides[image])
                chosen = sorted(sorted(tokens, key=lambda i: order[within[i]])[:budget])
            else:
                chosen = self._choose(tokens, scores, hidden, budget)
            left += chosen
            self._merge(out, hidden, scores, chosen, [i for i in tokens if i not in chosen])
        left.sort()
        return out[left], left

    def _choose(self, tokens: list[int], scores: Tensor, hidden: Tensor, budget: int) -> list[int]:
        assert self.prefill is not None
        if self.prefill["kind"] == "random" or self.prefill.get("selection", "diverse") == "top":
            return sorted(sorted(tokens, key=lambda i: (-float(scores[i]), i))[:budget])
        strength = self.prefill.get("strength", 1.0)
        chosen: list[int] = []
        while len(chosen) < budget:
            best, best_worth = -1, -math.inf
            for i in tokens:
                if i in chosen:
                    continue
                near = max([0.0, *(_cosine(hidden[i], hidden[j]) for j in chosen)])
                worth = max(float(scores[i]), 0.0) * (1 - strength * near)
                if worth > best_worth:
                    best, best_worth = i, worth
            chosen.append(best)
        return sorted(chosen)

    def _merge(
        self, out: Tensor, hidden: Tensor, scores: Tensor | None, kept: list[int], dropped: list[int]
    ) -> None:
        assert self.prefill is not None
        how = self.prefill.get("merge", "drop" if self.prefill["kind"] == "random" else "uniform")
        if how == "drop":
            return
        weight = [1.0] * len(hidden)
        if how == "score" and scores is not None:
            weight = [max(float(s), 0.0) for s in scores]
        sums = {i: (weight[i] * hidden[i], weight[i]) for i in kept}
        for i in dropped:
            likeness = [_cosine(hidden[i], hidden[j]) for j in kept]
            j = kept[likeness.index(max(likeness))]
            value, total = sums[j]
            sums[j] = (value + weight[i] * hidden[i], total + weight[i])
        for j, (value, total) in sums.items():
            if total > 0:
                out[j] = value / total

    # -- more tokens

    def step(self, token: int) -> Tensor:
        """Logits (V,) after one more token; compacts the stored keys when it is time."""
        return self.extend({"input_ids": torch.tensor([[token]])})[0]

    @torch.no_grad()
    def extend(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (S, V) of more tokens, none of which is ever reduced."""
        hidden, _ = self._embed(inputs)
        positions = self.next_position + torch.arange(len(hidden))
        self.next_position += len(hidden)
        self.seen += len(hidden)
        for index, layer in enumerate(self.layers):
            shift = max((first, shift) for first, shift in [(-1, 0), *self.shifts] if first <= index)[1]
            query, key, value = self._project(layer, hidden, positions + shift)
            self.keys[index] = torch.cat([self.keys[index], key], dim=1)
            self.values[index] = torch.cat([self.values[index], value], dim=1)
            self.queries[index] += query.unbind(dim=1)
            weights = _weights(query, self.keys[index], layer.self_attn.scaling)
            self._receive(index, weights)
            hidden = _finish(layer, hidden, weights, self.values[index])
        self.since += len(hidden)
        if self.decode is not None and self.since >= self.decode["interval"]:
            self.since = 0
            for index in range(len(self.layers)):
                self._compact(index)
        return self._logits(hidden)

    def _receive(self, index: int, weights: Tensor) -> None:
        """Add up what each stored token receives from new tokens (H, S, N), at most the last 8 of them."""
        received = weights[:, -8:].mean(dim=0).sum(dim=0)
        before = self.mass.get(index, torch.zeros(0, dtype=torch.float64))
        self.mass[index] = received + torch.cat([before, torch.zeros(len(received) - len(before))])

    def _compact(self, index: int) -> None:
        assert self.decode is not None
        options, keys = self.decode, self.keys[index]
        stored = keys.shape[1]
        always = options["sinks"] + options["recent"]
        budget = max(always, int(options["keep"] * self.seen + 0.5))
        if stored <= budget:
            return
        scores = self.mass[index] if options["score"] == "mass" else self._scores_of_queries(index)
        forced = {*range(options["sinks"]), *range(stored - options["recent"], stored)}
        free = sorted((i for i in range(stored) if i not in forced), key=lambda i: (-float(scores[i]), i))
        left = sorted(forced | set(free[: budget - len(forced)]))
        self.keys[index], self.values[index] = keys[:, left], self.values[index][:, left]
        self.mass[index] = self.mass[index][left]

    def _scores_of_queries(self, index: int) -> Tensor:
        assert self.decode is not None
        options, keys = self.decode, self.keys[index]
        stored = keys.shape[1]
        scores = torch.zeros(stored, dtype=torch.float64)
        queries = self.queries[index][-min(options["rows"], options["recent"]) :]
        scale = self.layers[index].self_attn.scaling
        for back, query in enumerate(reversed(queries)):
            visible = stored - back
            weights = _weights(query[:, None], keys[:, :visible], scale)
            scores[:visible] += weights[:, 0].mean(dim=0)
        return scores

    # -- one layer

    def _project(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (Hq, S, D), rotated keys and values (Hkv, S, D)."""
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        split = [p(x).reshape(len(x), -1, attention.head_dim) for p in _projections(attention)]
        query, key, value = (part.transpose(0, 1) for part in split)
        angles = self._angles(positions)
        return _rotate(query, angles), _rotate(key, angles), value

    def _angles(self, positions: Tensor) -> Tensor:
        """(S, D/2) rotary angles; with M-RoPE each band of frequencies follows its own axis."""
        rotary = self.model.model.language_model.rotary_emb
        frequency = rotary.inv_freq.double()
        if positions.dim() == 1:
            return positions[:, None].double() * frequency
        sections = self.model.model.language_model.config.rope_parameters["mrope_section"]
        axis = [number for number, width in enumerate(sections) for _ in range(width)]
        return positions[axis].double().T * frequency

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.language_model.norm(hidden))


def even_order(height: int, width: int) -> list[int]:
    """When each token of a grid is taken, in reading order: Bayer's matrix of the next power of two, cut to the grid.

    A matrix twice as large has, in each 2 x 2 block of its halves, the smaller matrix four times, taken in the order
    upper left, lower right, upper right, lower left.
    """
    matrix = [[0]]
    while len(matrix) < max(height, width):
        matrix = [
            [4 * value + first for value in row] + [4 * value + second for value in row]
            for first, second, half in ((0, 2, matrix), (3, 1, matrix))
            for row in half
        ]
    return [matrix[row][column] for row in range(height) for column in range(width)]


def _segments(ids: Tensor, sizes: list[int]) -> list[int]:
    """Image number of each token, -1 for text."""
    numbers = [image for image, size in enumerate(sizes) for _ in range(size)]
    pending = iter(numbers)
    return [next(pending) if token in (IMAGE_ID, VIDEO_ID) and numbers else -1 for token in ids.tolist()]


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of (H, S, D) by (S, D/2) angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal attention weights (Hq, S, N) of the last S tokens over N keys."""
    groups = query.shape[0] // key.shape[0]
    new, stored = query.shape[1], key.shape[1]
    logits = torch.stack([query[h] @ key[h // groups].T for h in range(query.shape[0])]) * scale
    hidden = torch.arange(stored)[None] > torch.arange(stored - new, stored)[:, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1)


def _finish(layer: Any, hidden: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """The rest of a layer after its attention weights."""
    groups = weights.shape[0] // value.shape[0]
    heads = [weights[h] @ value[h // groups] for h in range(weights.shape[0])]
    hidden = hidden + layer.self_attn.o_proj(torch.stack(heads, dim=1).flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0
