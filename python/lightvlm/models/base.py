"""What the runtime must know of a model family: where its layers are, and where its image tokens.

A family is one small file: a subclass of :class:`Adapter` that names the transformers classes it fits.
    Nothing here
imports transformers: classes are recognised by name, so that importing lightvlm stays cheap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..layout import Grid


def attention_kinds(config: Any) -> set[str]:
    """Kinds of attention that the layers of a text decoder use, in transformers' words.

    Decoders that mix kinds say so in ``layer_types``; others only have a window, or none.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if not kinds and getattr(config, "attention_chunk_size", None) is not None:
        kinds = {"chunked_attention"}
    return kinds or {"full_attention"}


def modules_at(tower: nn.Module, paths: tuple[str, ...], attention: str) -> list[nn.Module]:
    """The attention of each layer of a tower whose layers are at the first of ``paths`` that it has.

    Raises:
        ValueError: it has none of them.
    """
    for path in paths:
        try:
            layers = tower.get_submodule(path)
            return [layer.get_submodule(attention) for layer in layers.children()]
        except AttributeError:
            continue
    raise ValueError(f"plan reads the vision tower, but a {type(tower).__name__} has its layers elsewhere")


def _square(size: int) -> Grid | None:
    """Grid of an image of so many tokens, if it can be a square."""
    side = math.isqrt(size)
    return (1, side, side) if side * side == size else None


class Adapter:
    """Access to the parts of one VLM.

    Class attributes: ``classes``, the names of the transformers classes (with their heads) the family fits;
    ``first_layer``, the first decoder layer at whose input tokens may be reduced.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    first_layer: ClassVar[int] = 0

    def __init__(self, model: nn.Module) -> None:
        # Models differ in attributes that no common class declares, hence Any here and below.
        self.model: Any = model

    @property
    def base(self) -> Any:
        """The module whose forward takes input_ids and images, and runs the text decoder."""
        return self.model.model

    @property
    def decoder(self) -> Any:
        """The text decoder."""
        return self.base.language_model

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return list(self.decoder.layers)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention module of each layer."""
        return [layer.get_submodule("self_attn") for layer in self.layers]

    def image_token_ids(self) -> tuple[int, ...]:
        """Ids of the placeholder tokens that stand for image or video features."""
        return (int(self.model.config.image_token_id),)

    def image_shapes(self, inputs: dict[str, Any]) -> tuple[list[int] | None, list[Grid | None] | None]:
        """Tokens of each image, in reading order, and its (frames, height, width) in tokens where that is known.

        No sizes: every stretch of placeholders is one image. A family that has to ask the device does so once.
        """
        encoded = self.encoded(inputs)
        sizes = self.encoded_sizes(encoded) if encoded else self.pixel_sizes(inputs)
        return sizes, None if sizes is None else [_square(size) for size in sizes]

    def encoded_sizes(self, encoded: list[Any]) -> list[int] | None:
        """Tokens of each image that generate() has encoded: the vision tower's outputs know their sizes best."""
        # images and videos mixed: their order is in the prompt, not in the features
        return [int(image.shape[0]) for image in encoded[0].pooler_output] if len(encoded) == 1 else None

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        """Tokens of each image of a call that brings pixels."""
        return None

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> Any:
        """What the decoder's layers get as position_embeddings for tokens at positions (B, S) or (axes, B, S)."""
        return self.decoder.rotary_emb(hidden, positions)

    def encoded(self, inputs: dict[str, Any]) -> list[Any]:
        """Outputs of the vision tower that came with the call."""
        outputs = inputs.get("mm_encoder_outputs") or {}
        return [output for output in outputs.values() if output is not None]

    def has_pixels(self, inputs: dict[str, Any]) -> bool:
        """Whether the call brings images."""
        names = ("pixel_values", "pixel_values_videos")
        return bool(self.encoded(inputs)) or any(inputs.get(name) is not None for name in names)

    def is_image(self, inputs: dict[str, Any]) -> Tensor | None:
        """(B, S) bool: placeholder tokens; None where the call brings no image."""
        if not self.has_pixels(inputs):
            return None
        ids = self.image_token_ids()
        if inputs.get("input_ids") is not None:
            return torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))
        embeds = inputs["inputs_embeds"]
        table = self.decoder.get_input_embeddings().weight
        return torch.stack([(embeds == table[token]).all(-1) for token in ids]).any(0)

    # -- the vision tower

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.base.vision_tower

    @property
    def tower_has_class_token(self) -> bool:
        """Whether the first token of every picture in the tower is a class token."""
        return False

    def tower_attentions(self) -> list[nn.Module]:
        """The attention module of each layer of the tower.

        Raises:
            ValueError: a tower that is built in another way.
        """
        raise ValueError(
            f"plan reads the vision tower, which lightvlm does not for {type(self.model).__name__}"
        )

    def tower_layer(self, layer: int) -> int:
        """The layer to read where ``layer`` (from 0) is asked for: the nearest in which whole frames attend."""
        return layer

    def tower_grids(self, inputs: dict[str, Any]) -> list[Grid] | None:
        """(frames, rows, columns) of patches of each picture, where the tower takes all of them as one row, from the
        arguments of its forward; None where each picture is a row of its own."""
        return None

    def tower_tokens(self, patches: Tensor, grid: Grid | None) -> Tensor:
        """What image tokens have, (n, T, K) or (T, K), from what the tower's tokens have: (n, S, K) of n pictures, or
        (P, K) of one with a grid. A token that joins several has their mean."""
        raise NotImplementedError
