"""KIVI: the whole cache in 2 bits, but for its last tokens.

Source: Liu et al., "KIVI", arXiv 2402.02750: keys get a scale and a zero for each channel and group of G tokens, values
for each token and group of G channels, asymmetric; the last R tokens stay in 16 bits (paper: G = 32, R = 128).

This is a preset of :class:`lightvlm.KVPrecision`, whose storage is not KIVI's:

- keys: one scale and zero for each channel and 64 tokens, in fp32 (KIVI: 32 tokens, 16 bits). Our blocks are
  multiples of 64.
- values: one scale and zero for each token over all channels of a head, in fp16, after each channel was divided by the
  square root of its largest value in the same 64 tokens. Scales for groups of channels within a token are
  not possible: the packed format has one pair a token, which its kernels apply to the weights of attention.
- the last tokens: here at least R, keys and values alike, until 64 more have come together. In KIVI up to R keys wait
  and are then stored at once, and values one by one.

The prompt's blocks are fixed, so it does not go with a cache part that evicts from them while decoding; with one that
evicts from the prompt before it is stored it does.
"""

from __future__ import annotations

from ..plan import KeepForLater, Plan
from .kv_precision import KVPrecision

_PRESET: dict[str, object] = {"sinks": 0, "interval": 64, "prompt_block": 64}


def KIVI(
    bits: int = 2, recent: int = 128, *, keep_for_later: KeepForLater = "offload", **options: object
) -> Plan:
    """A plan that stores the cache in few bits, without sinks.

    ``recent``: KIVI's R. Other options: see :class:`lightvlm.KVPrecision`, and ``keep_for_later``:
    :class:`lightvlm.Plan`.
    """
    return Plan(
        precision=KVPrecision(bits=bits, recent=recent, **{**_PRESET, **options}),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
