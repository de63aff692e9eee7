"""One attention call in the form that every backend reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class NewTokens:
    """What is to be written behind a cache's keys.

    key, value: (B, Snew, Hkv, D).   cos, sin: (positions, R / 2), or None: no rotary
    embedding.   interleaved: pairs are neighbours.   at_once: all queries are rotated at the position of the first.
    """

    key: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    at_once: bool


@dataclass(slots=True)
class Call:
    """What to attend to what. One of three layouts, told apart by ``cu_q`` and ``lens``.

    Row i of a sequence with Sq queries and the keys [begin, end) stands at the key position p = i + end - Sq (the
    causal corner is at the bottom right). It sees key j of [begin, end) where ``left`` < 0 or j >= p - left, and
    ``right`` < 0 or j <= p + right; plain causal attention is left -1, right 0. Its logit is::

        s = scale * <q, k>;   s = softcap * tanh(s / softcap) if softcap > 0;   s -= alibi[head] * |p - j|

    Dense: query (B, Sq, Hq, D), key, value (B, Sk, Hkv, D).
    Packed ("varlen"): query (total_q, Hq, D), key, value (total_k, Hkv, D), cu_q, cu_k (B + 1,) int32.
    Cache: query (B, Sq, Hq, D), key, value (B_cache, capacity, Hkv, D); row b reads the cache's row batch_idx[b]
    (default b), keys [leftpad[b], lens[b]) (default 0 and the capacity).
    With block_table (B, max_blocks) int32, key and value are pages (P, page_size, Hkv, D), token n of row b in page
    block_table[b, n // page_size]; in the packed layout cu_k then only says how many keys each row has.

    new: keys and values that are to be written behind lens first, and query rotated with them. Only backends that say
    that they append get to see it.
    max_q, max_k: no sequence is longer.   alibi: (Hq,) or (B, Hq) fp32.   splits: a hint, as flash-attn's num_splits.
    wants_lse: whether anybody will look at the log-sum-exp.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    max_q: int
    max_k: int
    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    alibi: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    lens: Tensor | None = None
    leftpad: Tensor | None = None
    batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    splits: int = 0
    new: NewTokens | None = None
    wants_lse: bool = True

    @property
    def packed(self) -> bool:
        """Whether sequences stand one after the other, without a batch dimension."""
        return self.cu_q is not None

    @property
    def batch(self) -> int:
        return self.query.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def dense(self) -> bool:
        """Whether each batch row's keys are one whole row of key."""
        cached = (self.lens, self.leftpad, self.batch_idx, self.block_table, self.cu_q)
        return all(part is None for part in cached)

    @property
    def causal(self) -> bool:
        """Plain causal attention, no window."""
        return self.left < 0 and self.right == 0

    @property
    def windowed(self) -> bool:
        """A window that is neither the whole row nor the causal triangle."""
        return self.left >= 0 or self.right > 0

    @property
    def group(self) -> int:
        """Query heads of each key head."""
        return self.query.shape[-2] // self.key.shape[-2]

    def ends(self) -> Tensor | None:
        """(B,) int32, lens with the new tokens."""
        return self.lens if self.new is None or self.lens is None else self.lens + self.new.key.shape[1]

    def slopes(self, row: int) -> Tensor | None:
        """(Hq,) ALiBi slopes of a batch row."""
        return self.alibi if self.alibi is None or self.alibi.dim() == 1 else self.alibi[row]
