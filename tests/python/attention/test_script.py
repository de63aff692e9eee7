"""A script that was written for flash-attn runs unchanged but for its import."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightvlm import replace_flash_attn
from torch import Tensor

SCRIPT = '''
import math

import torch

IMPORT


def rotate(x, cos, sin, positions):
    """Rotary embedding of channel pairs (i, i + R / 2); x (S, H, D)."""
    c, s = cos[positions][:, None], sin[positions][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, first * s + second * c], dim=-1)


class Layer(torch.nn.Module):
    """Grouped-query attention with a sliding window, for training-like packed batches and for decoding."""

    def __init__(self, width=64, heads=4, kv_heads=2, window=6):
        super().__init__()
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, width // heads, window
        self.wq = torch.nn.Linear(width, width, bias=False)
        self.wkv = torch.nn.Linear(width, 2 * kv_heads * self.size, bias=False)
        angles = torch.arange(32.0)[:, None] / 10000.0 ** (torch.arange(0, self.size, 2) / self.size)
        self.cos, self.sin = angles.cos(), angles.sin()

    def packed(self, tokens, cu_seqlens, max_seqlen):
        """All rows one after the other, keys and values in one tensor."""
        q = self.wq(tokens).view(-1, self.heads, self.size)
        kv = self.wkv(tokens).view(-1, 2, self.kv_heads, self.size)
        ends = cu_seqlens.tolist()
        positions = torch.cat([torch.arange(b - a) for a, b in zip(ends[:-1], ends[1:])])
        q = rotate(q, self.cos, self.sin, positions)
        k = rotate(kv[:, 0], self.cos, self.sin, positions)
        kv = torch.stack([k, kv[:, 1]], dim=1)
        out = flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=0.0,
            softmax_scale=1 / math.sqrt(self.size), causal=True, window_size=(self.window, 0),
        )
        again = flash_attn_varlen_func(
            q, kv[:, 0], kv[:, 1], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True,
            window_size=(self.window, 0), deterministic=True,
        )
        assert torch.equal(out, again)
        return out.flatten(1)

    def decode(self, token, k_cache, v_cache, cache_seqlens):
        """One token of each row; the kernel rotates it and writes it into the cache."""
        batch = token.shape[0]
        q = self.wq(token).view(batch, 1, self.heads, self.size)
        k, v = self.wkv(token).view(batch, 1, 2, self.kv_heads, self.size).unbind(2)
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos=self.cos, rotary_sin=self.sin, cache_seqlens=cache_seqlens,
            softmax_scale=1 / math.sqrt(self.size), causal=True, window_size=(self.window, 0),
            rotary_interleaved=False,
        )
        return out.view(batch, -1)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    layer, lengths = Layer(), [11, 7, 3]
    x = torch.randn(len(lengths), max(lengths), 64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert seqused.tolist() == lengths
    whole = pad_input(layer.packed(tokens, cu_seqlens, max_seqlen), indices, *x.shape[:2])

    k_cache = torch.zeros(len(lengths), 32, layer.kv_heads, layer.size)
    v_cache, seqlens = torch.zeros_like(k_cache), torch.zeros(len(lengths), dtype=torch.int32)
    steps = []
    for step in range(max(lengths)):
        steps.append(layer.decode(x[:, step], k_cache, v_cache, seqlens))
        seqlens += 1
    return whole[mask], torch.stack(steps, dim=1)[mask]


whole, steps = main()
'''
NAMES = "flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_with_kvcache"
THEIRS = f"from flash_attn import {NAMES}\nfrom flash_attn.bert_padding import pad_input, unpad_input"
OURS = f"from lightvlm.flash_attn_interface import {NAMES}, pad_input, unpad_input"


def run(imports: str) -> tuple[Tensor, Tensor]:
    found: dict[str, Any] = {"__name__": "script"}
    exec(compile(SCRIPT.replace("IMPORT", imports), "script.py", "exec"), found)
    return found["whole"], found["steps"]


@pytest.mark.parametrize("imports", ["changed", "unchanged, in the context"])
def test_decoding_is_what_the_packed_pass_is(imports: str) -> None:
    """Prefill of packed rows, and the same tokens one at a time on a cache."""
    if imports == "changed":
        whole, steps = run(OURS)
    else:
        with replace_flash_attn(override=True):
            whole, steps = run(THEIRS)
    assert whole.shape == (21, 64)
    assert whole.abs().mean() > 0.1
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)
