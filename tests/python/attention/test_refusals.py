"""What is not supported says so; nothing is ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightvlm import flash_attn_interface as fa
from torch import Tensor


def tensors() -> list[Tensor]:
    return [torch.randn(2, 5, 4, 32), torch.randn(2, 5, 2, 32), torch.randn(2, 5, 2, 32)]


def test_what_flash_attn_takes_for_flags_and_numbers() -> None:
    """Its binding converts; call sites that rely on it must not stumble here."""
    q, k, v = tensors()
    wanted = fa.flash_attn_func(q, k, v, softmax_scale=0.25, causal=True, window_size=(3, 0))
    for yes in (1, np.bool_(True)):
        options: dict[str, Any] = {"softmax_scale": np.float32(0.25), "window_size": (np.int64(3), 0)}
        assert torch.equal(fa.flash_attn_func(q, k, v, causal=yes, **options), wanted)
    for no in (None, 0):
        options = {"causal": no, "deterministic": no}
        assert torch.equal(fa.flash_attn_func(q, k, v, **options), fa.flash_attn_func(q, k, v))
    options = {"return_attn_probs": np.bool_(True)}
    assert len(fa.flash_attn_func(q, k, v, **options)) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p: got 0.1, must be 0.0: lightvlm's attention is for inference"),
        ({"dropout_p": "0"}, TypeError, "dropout_p: got str, must be a float"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: got nan, must be finite"),
        ({"causal": "yes"}, TypeError, "causal: got str, must be a bool"),
        ({"deterministic": 1.0}, TypeError, "deterministic: got float, must be a bool"),
        ({"return_attn_probs": torch.tensor(True)}, TypeError, "return_attn_probs: got Tensor, must be a bool"),
        ({"window_size": 3}, TypeError, "window_size: got 3, must be a pair of ints"),
        ({"window_size": (1, 2, 3)}, TypeError, "window_size: got .*, must be a pair of ints"),
        ({"window_size": (1.0, 2)}, TypeError, "window_size: got float, must be an int"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0, must be at least 0"),
        ({"alibi_slopes": torch.rand(3)}, ValueError, r"alibi_slopes: has shape \(3,\), must be \(4,\)"),
        ({"alibi_slopes": torch.rand(3, 4)}, ValueError, r"alibi_slopes: has shape \(3, 4\), must be \(2, 4\)"),
        ({"alibi_slopes": torch.rand(4).half()}, TypeError, "alibi_slopes: has dtype float16, must be float32"),
        ({"importance_window": 0}, ValueError, "importance_window: got 0, must be >= 1"),
        ({"importance_window": 1.5}, TypeError, "importance_window: got float, must be an int"),
        ({"importance_window": True}, TypeError, "importance_window: got bool, must be an int"),
        ({"importance_window": []}, ValueError, "importance_window: has shape"),
        ({"importance_window": [0, 5]}, ValueError, r"importance_window: has row 5, must be in \[-5, 5\)"),
        ({"importance_window": torch.tensor([-6])}, ValueError, "importance_window: has row -6"),
        ({"importance_window": torch.tensor([0.0])}, TypeError, "importance_window: has dtype torch.float32"),
        ({"importance_window": torch.zeros(3, 1).long()}, ValueError, r"must be \(W,\) or \(2, W\)"),
    ],
)  # fmt: skip
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fa.flash_attn_func(*tensors(), **options)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.randn(5, 4, 32), ValueError, r"q: has shape \(5, 4, 32\), must be \(B, Sq, Hq, D\)"),
        (0, torch.randn(2, 5, 3, 32), ValueError, "q: has 3 heads, must be a positive multiple of k's, 2"),
        (0, torch.randn(2, 5, 4, 32).double(), TypeError, "q: has dtype float64, must be float32 or"),
        (0, [[0.0]], TypeError, "q: got list, must be a torch.Tensor"),
        (1, torch.randn(2, 5, 2, 32).half(), TypeError, "k: has dtype float16, must be float32"),
        (
            1,
            torch.randn(2, 5, 2, 64),
            ValueError,
            r"k: has shape \(2, 5, 2, 64\), must be \(B, Sk, Hkv, 32\)",
        ),
        (2, torch.randn(2, 4, 2, 32), ValueError, r"v: has shape \(2, 4, 2, 32\), must be \(2, 5, 2, 32\)"),
        (2, torch.randn(2, 5, 2, 32, device="meta"), ValueError, "v: is on meta, must be on cpu as q"),
    ],
)
def test_tensors(place: int, wrong: Any, error: type[Exception], message: str) -> None:
    args: list[Any] = tensors()
    args[place] = wrong
    with pytest.raises(error, match=message):
        fa.flash_attn_func(*args)


def test_batches_and_widths() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"k: has shape \(1, 5, 2, 32\), must be \(2, 5, 2, 32\)"):
        fa.flash_attn_func(q, k[:1], v[:1])
    wide = torch.randn(1, 2, 1, 257)
    with pytest.raises(ValueError, match="q: has head_dim 257, must be 1 to 256"):
        fa.flash_attn_func(wide, wide, wide)
    with pytest.raises(ValueError, match=r"qkv: has shape \(2, 5, 4, 32\), must be \(B, S, 3, H, D\)"):
        fa.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: has shape \(2, 5, 2, 32\), must be \(B, Sk, 2, Hkv, D\)"):
        fa.flash_attn_kvpacked_func(q, k)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_gradients(place: int) -> None:
    """There is no backward: an error, unless no gradient is recorded anyway."""
    args = tensors()
    args[place].requires_grad_()
    message = f"{'qkv'[place]}: requires grad, but lightvlm's attention has no backward pass"
    packed = [x.flatten(0, 1) for x in args]
    at = torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        fa.flash_attn_func(*args)
    with pytest.raises(ValueError, match=message):
        fa.flash_attn_varlen_func(*packed, at, at, 5, 5)
    with torch.no_grad():
        assert fa.flash_attn_func(*args).shape == args[0].shape
    with torch.inference_mode():
        assert fa.flash_attn_varlen_func(*packed, at, at, 5, 5).shape == packed[0].shape
