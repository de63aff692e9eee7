"""CompactCache: a transformers cache whose layers may hold fewer tokens than they have seen.

Two lengths. The *logical* length of a layer is what transformers counts: tokens seen, padding included;
positions and generate()'s bookkeeping follow it. The *physical* one is what is stored. In a layer that was
born short (after a reduction at prefill) or was compacted, row b's keys stand at ``[starts[b], ends[b])`` of
the buffer, and that, never the 2-D attention mask, says which keys are valid.

Storage is (B, capacity, Hkv, D): FlashAttention's layout, in which a token is one contiguous row, so that
    appending
is a copy and compaction moves whole rows.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .buffers import check_rows
from .cache_file import load_cache, of_another_model, save_cache
from .cache_layer import CompactLayer
from .contract.cache import CachePart
from .contract.precision import PrecisionPart
from .host import upload
from .models.base import attention_kinds
from .packed_eviction import evict_packed
from .packing import check_storage, move_rows, pack_generated, pack_prompt
from .plan import Plan
from .positions import Shifts, select_rows
from .stored_layer import SLACK

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lightvlm_ext.ops import Selection

    from .contract.cache import PromptChoice
    from .runtime import Run
    from .transcript import Transcript


class CompactCache(Cache):
    """A KV cache that is compacted in place; pass it as ``past_key_values`` or let :func:`lightvlm.attach`
    make it.

    Args:
        config: the model's configuration (of the whole VLM or of its text decoder).
        plan: its ``cache`` part says when and what to evict; None: that of the run the cache is used with.
            Eviction needs the queries, so it happens on a model that is attached; on another, everything is
            kept (and a warning says so).
        capacity: tokens a row may hold, padding included. None: buffers grow by doubling and may move. An int:
            allocated once, at addresses that stay, also through :meth:`reset` and reordering, as long as the
            number of rows stays; a step that needs more raises a ValueError and changes nothing.

    Raises:
        TypeError, ValueError: a config, plan or capacity of the wrong kind; a decoder with layers that are not
            full attention, or whose heads the plan's precision part cannot store; cache and precision parts that do
            not go together.
    """

    def __init__(
        self, config: PretrainedConfig, plan: Plan | None = None, *, capacity: int | None = None
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a configuration of transformers, got {type(config).__name__}")
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"plan must be a lightvlm.Plan, got {type(plan).__name__}")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
            raise TypeError(f"capacity must be None or an int, got {type(capacity).__name__}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        text = config.get_text_config(decoder=True)
        other = attention_kinds(text) - {"full_attention"}
        if other:
            raise ValueError(f"config has layers that are not full attention: {', '.join(sorted(other))}")
        self.layers: list[CompactLayer]  # type: ignore[assignment]
        super().__init__(layers=[self._new_layer(capacity) for _ in range(text.num_hidden_layers)])
        self.heads = heads_of(text)
        check_storage(plan, self.heads[1])
        self._has_own_plan = plan is not None
        self._set_plan(plan if plan is not None else Plan())
        self.run: weakref.ref[Run] | None = None
        self.transcript: Transcript | None = None
        self.leftpad: list[int] = []
        self.position_shifts: Shifts = []
        """Where generated tokens stand in layers whose prompt was numbered anew (positions.py)."""
        self.since_compaction = 0
        self.waits = False
        self._unread = True

    def _new_layer(self, capacity: int | None) -> CompactLayer:
        return CompactLayer(capacity)

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        cache, precision = plan.cache, plan.precision
        mass = isinstance(cache, CachePart) and cache.wants_mass
        rows = cache.rows if isinstance(cache, CachePart) and not mass else 0
        if isinstance(precision, PrecisionPart) and precision.separates:
            rows = max(rows, 1)  # the last query tells important tokens apart
        for index, layer in enumerate(self.layers):
            layer.query_rows, layer.wants_mass = rows, mass
            layer.will_be_packed = isinstance(precision, PrecisionPart) and bool(
                precision.levels(index, len(self.layers))
            )

    def check_model(self, config: PretrainedConfig) -> None:
        """Raise a ValueError unless this cache is one for such a decoder."""
        found = (len(self.layers), *self.heads)
        wanted = (config.num_hidden_layers, *heads_of(config))
        if found != wanted:
            raise ValueError(f"past_key_values is {of_another_model(found, wanted)}")

    def begin(self, run: Run, leftpad: list[int]) -> None:
        """Say that a prompt whose rows have that much padding will now be stored, on the model of ``run``."""
        if self.layers[0].is_initialized:  # cropped until nothing was left
            self.reset()
        if not self._has_own_plan:
            self._set_plan(run.plan)
        self.run = weakref.ref(run)
        self.leftpad, self.since_compaction, self.waits = list(leftpad), 0, False
        self.position_shifts = []

    def take_place_of(self, other: Cache) -> CompactCache:
        """Turn ``other``, an empty cache, into this one, so that whoever holds it can go on with it."""
        other.__class__ = CompactCache
        other.__dict__ = self.__dict__
        assert isinstance(other, CompactCache)
        return other

    @property
    def reads_itself(self) -> bool:
        """Whether what is stored, not the 2-D mask, says which keys are valid, now or after a compaction to come."""
        return self.ragged or self.plan.cache is not None or self.plan.precision is not None

    @property
    def ragged(self) -> bool:
        """Whether a layer holds fewer tokens than it has seen."""
        return any(layer.ragged for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            self._take_back(key_states.shape[2])
            raise ValueError(
                f"layer {layer_idx} was asked of a cache for {len(self.layers)} layers: it belongs to another model"
            )
        layer = self.layers[layer_idx]
        if layer_idx == 0:  # asked of all layers at the first, so that none has changed when it raises
            for one in self.layers:
                one.check_capacity(key_states.shape[2])
        run = self._reader()
        if run is not None:
            if run.writes(layer, key_states, value_states):
                return layer.announce(key_states, value_states)
            return layer.update(key_states, value_states, *args, **kwargs)
        if not (self.complete if layer_idx == 0 else layer.complete):
            raise ValueError(
                "this cache was shortened by a plan and only an attached model can read it; attach the plan again"
            )
        if layer_idx == 0:
            self._before_step(key_states, value_states)
        stored = layer.update(key_states, value_states, *args, **kwargs)
        return stored if layer.packed is None else layer.unpacked(self.leftpad)

    def _take_back(self, tokens: int) -> None:
        """Remove what a model of more layers has just written, so that the cache is as it was before the call."""
        if self.get_seq_length() > tokens:
            self.crop(-tokens)
        else:
            self.reset()

    def _before_step(self, key_states: Tensor, value_states: Tensor) -> None:
        """What nobody else does for a cache on a model that is not attached: pack the steps before this one."""
        if self.plan.cache is not None and not self.layers[0].seen:
            warnings.warn(
                "CompactCache evicts nothing on a model that is not attached: scoring needs the queries; "
                "use lightvlm.attach(model, plan)",
                stacklevel=3,
            )
        if isinstance(self.plan.precision, PrecisionPart) and self.layers[0].is_initialized:
            self.layers[0].check_room(key_states, value_states)
            if self._unread:
                pack_prompt(self.layers, self.plan.precision, None)
            pack_generated(self.layers, self.plan.precision)
            self._unread = False

    @property
    def attached(self) -> bool:
        """Whether the call under way is one of an attached model; another model may use the cache in between."""
        return self._reader() is not None

    def _reader(self) -> Run | None:
        """The run whose call is under way with this cache."""
        run = self.run() if self.run is not None else None
        return run if run is not None and run.reads(self) else None

    @property
    def complete(self) -> bool:
        """Whether every token seen is stored, in an order that is known: a model that is not attached can go on."""
        return all(layer.complete for layer in self.layers)

    def step(self, new_tokens: int, drafts: int = 0) -> bool:
        """Count ``new_tokens`` decoded tokens; pack what became old, and, when the plan says it is time or a fixed
        capacity is used up, compact every layer in one launch.

        Args:
            new_tokens: tokens just stored.
            drafts: how many of them may be cropped again. What they would set off waits until that is known: for the
                next call, which finds ``waits`` set.

        Returns:
            Whether anything was evicted.
        """
        for layer in self.layers:
            layer.settle()
        self.waits = drafts > 0
        if self.waits:
            self.since_compaction += new_tokens
            return False
        if isinstance(self.plan.precision, PrecisionPart):
            pack_generated(self.layers, self.plan.precision)
        policy = self.plan.cache
        if not isinstance(policy, CachePart) or not policy.evicts_generated:
            return False
        self.since_compaction += new_tokens
        if self.since_compaction < policy.interval and not self._full:
            return False
        self.since_compaction = 0
        evicted = evict_packed(
            [layer for layer in self.layers if layer.packed is not None], policy, self.leftpad
        )
        if evicted and not policy.demotes and self.transcript is not None:
            self.transcript.dropped = True
        # what will be packed later waits for it, where it may then be stored in fewer bits instead of being dropped
        whole = [
            layer
            for layer in self.layers
            if layer.packed is None and not (policy.demotes and layer.will_be_packed)
        ]
        chosen = [(layer, policy.choose(layer, self.leftpad)) for layer in whole]
        moves = [(layer, choice) for layer, choice in chosen if choice is not None]
        if not moves:
            return evicted
        self._move(
            [layer for layer, _ in moves],
            [choice[0] for _, choice in moves],
            [choice[1] for _, choice in moves],
        )
        for layer, (_, _, kept) in moves:
            layer.compacted(kept, policy.tail(kept))
            layer.dropped = True
        if self.transcript is not None:
            self.transcript.dropped = True
        return True

    @property
    def _full(self) -> bool:
        """Whether the next token finds no room."""
        return any(layer.capacity is not None and layer.held >= layer.capacity for layer in self.layers)

    def lacks_room(self, tokens: int) -> str | None:
        """Why a conversation of so many tokens a row cannot be read anew in the place of what is stored, or None."""
        capacity = self.layers[0].capacity
        if capacity is not None and capacity < tokens:
            return f"the cache's capacity ({capacity}) is too small to read the conversation anew"
        return None

    def _move(self, layers: Sequence[CompactLayer], index: list[Tensor], count: list[Tensor]) -> None:
        """Move the tokens that stay, and what they received, to the front of these layers' rows."""
        move_rows(layers, index, count)

    def pack_prompt(
        self,
        selections: dict[int, Selection] | None,
        drafts: int = 0,
        *,
        text: Sequence[list[list[int]]] | None = None,
        only: int | None = None,
    ) -> None:
        """Store the prompt just read in the bits that the plan says.

        Args:
            selections: layer -> tokens that attended, which are the important ones; None: all are.
            drafts: so many of the last tokens may be cropped again, and are not packed.
            text: for each layer and row the places of text, which a plan may leave as it is.
            only: the layer that was just filled, where the others are not yet, or packed already.
        """
        self._unread = self._unread and only is not None
        if isinstance(self.plan.precision, PrecisionPart):
            keeps = self.plan.precision.keep_text
            pack_prompt(self.layers, self.plan.precision, selections, drafts, text if keeps else None, only)

    def keep_only(self, selections: dict[int, Selection], tail: int) -> None:
        """Keep the selected tokens of each layer, in one launch, and give the rest of growing buffers back.

        Args:
            selections: layer -> tokens, by their places in the buffer. How many they are is read from the device,
                once for all layers.
            tail: so many of the last tokens are among them.
        """
        layers = [self.layers[index] for index in selections]
        self._move(
            layers, [one.index for one in selections.values()], [one.count for one in selections.values()]
        )
        counts = torch.stack([one.count for one in selections.values()]).tolist()
        for layer, kept in zip(layers, counts, strict=True):
            layer.compacted(kept, tail)
            layer.dropped = True
            layer.shrink(SLACK)

    def keep_chosen(self, choices: dict[int, PromptChoice]) -> None:
        """Keep what was chosen of the prompt just read, in one launch, and give the rest of growing buffers back.

        Args:
            choices: layer -> tokens, by their places in the prompt.
        """
        layers = [self.layers[index] for index in choices]
        counts = [upload(one.kept, one.index.device) for one in choices.values()]
        self._move(layers, [one.index for one in choices.values()], counts)
        for layer, one in zip(layers, choices.values(), strict=True):
            layer.compacted(one.kept, one.tail)
            layer.dropped = True
            layer.shrink(SLACK)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from every layer, or raise a ValueError and change none."""
        # the layer that can remove fewest is asked first, since it is the one to name the limit
        layers = sorted(self.layers, key=lambda layer: layer.tail)
        removed = min(layer.check_crop(tokens_to_remove) for layer in layers)
        super().crop(removed)
        if self.transcript is not None:
            self.transcript.follow(self.get_seq_length())
        self.since_compaction = max(0, self.since_compaction + removed)
        self.leftpad = [min(pad, self.get_seq_length()) for pad in self.leftpad]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` (B',) of the batch, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch ``repeats`` times.

        Raises:
            ValueError: repeats is below 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        if self.layers[0].is_initialized:
            self.batch_select_indices(torch.arange(self.layers[0].batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices`` (B',) of the batch, in that order.

        Raises:
            ValueError: indices is empty or not a vector of integers, or, on the CPU, names a row that is not there.
        """
        check_rows(indices, self.layers[0].batch_size)
        differ = len(set(self.leftpad)) > 1 or any(layer.rows_differ for layer in self.layers)
        rows = indices.tolist() if differ else [0] * len(indices)
        for layer in self.layers:
            layer.batch_select_indices(indices, rows)
        if self.leftpad:
            self.leftpad = [self.leftpad[row] for row in rows]
        self.position_shifts = select_rows(self.position_shifts, indices)
        if self.transcript is not None:
            self.transcript.select_rows(indices)

    def reset(self) -> None:
        super().reset()
        self.leftpad, self.since_compaction, self.waits, self._unread = [], 0, False, True
        self.position_shifts = []
        self.transcript = None

    def shrink(self) -> None:
        """Give free rows of the buffers back to the allocator (buffers move; not with a fixed capacity)."""
        for layer in self.layers:
            layer.shrink()

    def save(self, path: str | Path) -> None:
        """Write the cache to a file in the safetensors format: what is stored, packed as it is, the plan, and what a
        later question needs to have the conversation read anew."""
        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: PretrainedConfig,
        *,
        capacity: int | None = None,
        device: str | torch.device = "cpu",
    ) -> CompactCache:
        """Read what :meth:`save` wrote, for a model of this configuration; capacity as for a new cache.

        A cache that a plan had shortened is read by an attached model alone, as before.

        Raises:
            ValueError: the file is of another kind, another format, or of another model; it holds more than capacity.
        """
        return load_cache(path, config, capacity=capacity, device=device)

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of valid keys and values, all layers; of packed ones with the scales that belong to them."""
        return sum(layer.bytes_used() for layer in self.layers)

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of all tensors that the cache keeps alive: free room, attention received and remembered queries too."""
        return sum(layer.bytes_allocated() for layer in self.layers)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes that a cache holding every token seen would use, all layers."""
        return sum(layer.bytes_full() for layer in self.layers)


def heads_of(config: Any) -> tuple[int, int]:
    """Key/value heads of a decoder, and their width."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, int(width)
