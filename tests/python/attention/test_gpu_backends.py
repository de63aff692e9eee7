"""The GPU backends against stand-ins for their kernels (`stubs.py`): what they hand over, what they make of the answer.

What the kernels themselves compute, test_attention_gpu.py asks.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from lightvlm import flash_attn_interface as fa
from lightvlm.attention import cudnn, flex, gpu, torch_flash, use_backend
from lightvlm.attention.call import Call
from torch import Tensor

from . import oracle, stubs, test_dense, test_kvcache, test_varlen
from .oracle import Shaping

PACKAGES = {
    "flash_attn": stubs.FLASH_ATTN_2,
    "flash_attn_interface": stubs.FLASH_ATTN_3,
    "flash_attn.cute": stubs.FLASH_ATTN_4,
}
ALIBI = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])}
EVERY: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (3, -1), "causal": True},
    {"causal": True, "softcap": 2.0},
    ALIBI,
    {"causal": True, **ALIBI},
]
BY_BACKEND: dict[str, list[dict[str, Any]]] = {
    "flash_attn_2": EVERY,
    "flash_attn_3": EVERY[:5],
    "flash_attn_4": EVERY[:5],
    "torch_flash": [*EVERY[:4], *EVERY[5:]],
    "cudnn": EVERY[:2],
}


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for those of a Hopper GPU, stand-ins for its kernels."""
    monkeypatch.setattr(gpu, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "package", lambda name, parent="": PACKAGES[name])
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch_flash, "_op", lambda: stubs.flash_attention_forward)
    monkeypatch.setattr(cudnn, "_op", lambda: stubs.cudnn_attention)


CASES = [(name, options) for name, every in BY_BACKEND.items() for options in every]


def label(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(value) or "full"


LENGTHS = [(5, 5), (3, 9), (9, 3), (1, 6)]


def refused_by_cudnn(options: dict[str, Any], lengths: tuple[int, int]) -> bool:
    return lengths[0] == 1 or ("causal" in options and lengths[0] != lengths[1])


@pytest.mark.parametrize(
    ("backend", "options", "lengths"),
    [
        (*case, lengths)
        for case in CASES
        for lengths in LENGTHS
        if case[0] != "cudnn" or not refused_by_cudnn(case[1], lengths)
    ],
    ids=lambda value: label(value) if isinstance(value, str | dict) else str(value),
)
def test_dense_calls(backend: str, options: dict[str, Any], lengths: tuple[int, int]) -> None:
    q, k, v = test_dense.inputs(*lengths, width=64, dtype=torch.float16)
    with use_backend(backend):
        test_dense.check(q, k, v, Shaping(**options))


@pytest.mark.parametrize(("backend", "options"), [case for case in CASES if case[0] != "cudnn"], ids=label)
def test_packed_calls(backend: str, options: dict[str, Any]) -> None:
    rows, keys = [5, 0, 2, 7], [7, 4, 0, 3]
    q, k, v = test_varlen.inputs(rows, keys, width=64, dtype=torch.bfloat16)
    with use_backend(backend):
        test_varlen.check(q, k, v, rows, keys, Shaping(**options))


CACHES = [case for case in CASES if case[0] not in ("cudnn", "flash_attn_4")]


@pytest.mark.parametrize("backend", BY_BACKEND)
def test_a_full_cache_with_more_rows(backend: str) -> None:
    """The rows beyond the batch take no part; dense calls of kernels refuse them."""
    stored = [torch.randn(4, 6, 2, 64).half() for _ in range(2)]
    q = torch.randn(3, 6, 4, 64).half()
    with use_backend(backend):
        out, lse = fa.flash_attn_with_kvcache(q, *stored, causal=True, return_softmax_lse=True)
    for b in range(3):
        oracle.check((out[b], lse[b]), q[b], *(cache[b] for cache in stored), Shaping(causal=True))


@pytest.mark.parametrize(("backend", "options"), CACHES, ids=label)
@pytest.mark.parametrize("rows", [1, 3])
def test_caches(backend: str, options: dict[str, Any], rows: int) -> None:
    """Appended to, padded at the left, by index where the backend can."""
    dtype, new = torch.bfloat16, 2
    lens, pads, index = [20, 4, 0], [5, 0, 0], [2, 0, 3] if backend != "torch_flash" else [0, 1, 2]
    stored = test_kvcache.caches(4, dtype=dtype)
    wanted = [cache.clone() for cache in stored]
    q = torch.randn(3, rows, 4, 32).to(dtype)
    added = [torch.randn(3, new, 2, 32).to(dtype) for _ in range(2)]
    with use_backend(backend):
        out, lse, scores = fa.flash_attn_with_kvcache(
            q, *stored, *added,
            cache_seqlens=test_kvcache.ints(*lens), cache_leftpad=test_kvcache.ints(*pads),
            cache_batch_idx=test_kvcache.ints(*index) if backend != "torch_flash" else None,
            **options, return_softmax_lse=True, importance_window=2,
        )  # fmt: skip
    for b in range(3):
        for cache, extra in zip(wanted, added, strict=True):
            cache[index[b], lens[b] : lens[b] + new] = extra[b]
        key, value = (cache[index[b], pads[b] : lens[b] + new] for cache in wanted)
        oracle.check((out[b], lse[b]), q[b], key, value, Shaping(**options), b)
        last = list(range(max(0, rows - 2), rows))
        expected = oracle.importance(q[b], key, Shaping(**options), last, b)
        oracle.check_scores(scores[b, pads[b] : lens[b] + new], expected, dtype)
    assert all(torch.equal(a, b) for a, b in zip(stored, wanted, strict=True))


@pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_3", "torch_flash"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 2)}], ids=label)
@pytest.mark.parametrize("importance", [None, 2])
def test_rotary(backend: str, options: dict[str, Any], importance: int | None) -> None:
    """Rotated by the kernel or by us, the same goes into the cache and comes out."""
    angle = torch.rand(32, 16) * 6.28
    cos, sin = angle.cos().half(), angle.sin().half()
    stored = test_kvcache.caches(2, dtype=torch.float16)
    q, k, v = (torch.randn(2, 3, heads, 32).half() for heads in (4, 2, 2))
    lens = test_kvcache.ints(7, 12)
    results = []
    for name in (backend, "tiled"):
        held = [cache.clone() for cache in stored]
        with use_backend(name):
            found = fa.flash_attn_with_kvcache(
                q, *held, k, v, cos, sin, lens, **options, importance_window=importance
            )
        results.append([*(found if importance else [found]), *held])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, b, atol=2e-3, rtol=2e-3
        )  # of fp16, rotated and weighed in another order


@pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_3", "torch_flash"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 0)}], ids=label)
@pytest.mark.parametrize("packed", [False, True])
def test_pages(backend: str, options: dict[str, Any], packed: bool) -> None:
    size, lens = 256, [300, 20]
    pages = [torch.randn(5, size, 2, 32).half() for _ in range(2)]
    table = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32)
    q, k, v = (torch.randn(2, 2, heads, 32).half() for heads in (4, 2, 2))
    results = []
    for name in (backend, "tiled"):
        held = [page.clone() for page in pages]
        with use_backend(name):
            if packed:
                at, keys = test_varlen.offsets([2, 2]), test_varlen.offsets(lens)
                found = fa.flash_attn_varlen_func(
                    q.flatten(0, 1),
                    *held,
                    at,
                    keys,
                    2,
                    300,
                    **options,
                    return_attn_probs=True,
                    block_table=table,
                )[:2]
            else:
                found = fa.flash_attn_with_kvcache(
                    q, *held, k, v, cache_seqlens=test_kvcache.ints(*lens), block_table=table, **options,
                    return_softmax_lse=True,
                )  # fmt: skip
        results.append([*found, *held])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_what_is_left_to_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2 appends, and rotates unless the rotated queries are needed or it would rotate them differently."""
    given = []

    def spy(*args: Any, **options: Any) -> Any:
        given.append((options.get("k") is not None, options.get("rotary_cos") is not None))
        return stubs.flash_attn_with_kvcache(*args, **options)

    monkeypatch.setattr(PACKAGES["flash_attn"], "flash_attn_with_kvcache", spy)
    cos = torch.rand(32, 8).half()
    q, k, v = (torch.randn(2, 3, heads, 32).half() for heads in (4, 2, 2))
    cases: list[tuple[dict[str, Any], tuple[bool, bool]]] = [
        ({}, (True, False)),
        ({"rotary_cos": cos, "rotary_sin": cos}, (True, True)),
        ({"rotary_cos": cos, "rotary_sin": cos, "causal": True}, (True, True)),
        ({"rotary_cos": cos, "rotary_sin": cos, "importance_window": 1}, (True, False)),
        # As wide as the cache: hides nothing, but flash-attn would count it as a window.
        ({"rotary_cos": cos, "rotary_sin": cos, "window_size": (31, 5)}, (True, False)),
    ]
    for options, expected in cases:
        stored = test_kvcache.caches(2, dtype=torch.float16)
        with use_backend("flash_attn_2"):
            fa.flash_attn_with_kvcache(q, *stored, k, v, cache_seqlens=5, **options)
        assert given.pop() == expected


def test_flex_scores() -> None:
    """The function of a logit that FlexAttention compiles, called for one logit after the other."""
    rows, keys = 4, 6
    query, key = torch.randn(2, rows, 4, 32), torch.randn(2, keys, 2, 32)
    for options in [*EVERY, {"causal": True, "alibi_slopes": torch.rand(2, 4)}]:
        shaping = Shaping(**options)
        left, right = shaping.window_size
        call = Call(
            query,
            key,
            key,
            rows,
            keys,
            1.0,
            left,
            0 if shaping.causal else right,
            shaping.softcap,
            shaping.alibi_slopes,
        )
        shaped = flex.score_mod(call)
        for b in range(2):
            plain = oracle.logits_of(query[b], key[b], Shaping(softmax_scale=1.0), b, torch.float64)
            wanted = oracle.logits_of(
                query[b], key[b], Shaping(**{**options, "softmax_scale": 1.0}), b, torch.float64
            )
            for place in torch.cartesian_prod(torch.arange(4), torch.arange(rows), torch.arange(keys)):
                found = shaped(plain[tuple(place)], torch.tensor(b), *place)
                torch.testing.assert_close(found, wanted[tuple(place)], check_dtype=False)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(backend: str, message: str, q: Tensor, k: Tensor, **options: Any) -> None:
        with use_backend(backend), pytest.raises(ValueError, match=f"\n  {backend}: {message}"):
            fa.flash_attn_func(q, k, k, **options)

    q, k = torch.randn(1, 4, 2, 64).half(), torch.randn(1, 6, 2, 64).half()
    for backend in BY_BACKEND:
        refused(backend, "takes float16 and bfloat16, not float32", q.float(), k.float())
    for backend in ("flash_attn_3", "flash_attn_4"):
        refused(backend, "has no ALiBi", q, k, alibi_slopes=torch.rand(2))
    refused("flash_attn_4", "takes head_dim 64, 96, 128, not 32", q[..., :32], k[..., :32])
    refused("torch_flash", "has no softcap", q, k, softcap=1.0)
    refused("torch_flash", "takes head_dim of a multiple of 8", q[..., :12], k[..., :12])
    refused("cudnn", "takes causal calls with as many queries as keys", q, k, causal=True)
    refused("cudnn", "takes at least two queries and keys", q[:, :1], k)
    refused("cudnn", "has no window, softcap or ALiBi", q, k, window_size=(1, 1))
    refused("flex", "takes head_dim of a power of 2 from 16, not 48", q[..., :48], k[..., :48])
    monkeypatch.setattr(torch_flash, "_arguments", lambda: frozenset(["query"]))
    refused("torch_flash", "has no window_size_left in torch", q, k, window_size=(1, 1))
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))
    for backend in BY_BACKEND:
        refused(backend, "is for compute capability .*, and this GPU has 7.5", q, k)
    monkeypatch.setattr(gpu, "capability", lambda device: (12, 0))
    refused("flash_attn_3", r"is for compute capability 9.0 to 9.9, and this GPU has 12.0", q, k)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    old = types.SimpleNamespace(flash_attn_func=lambda q, k, v, causal=False: None)
    monkeypatch.setattr(gpu, "package", lambda name, parent="": old)
    refused("flash_attn_2", "is older than 2.6", q, k)
    refused("flash_attn_4", "is too old: it does not return the log-sum-exp", q, k)
    monkeypatch.setattr(gpu, "package", lambda name, parent="": "is not installed")
    refused("flash_attn_2", "is not installed", q, k)


def test_the_argument_names_of_torch() -> None:
    """Of this torch's op: what torch_flash hands over is there."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert {
        "scale",
        "window_size_left",
        "window_size_right",
        "seqused_k",
        "alibi_slopes",
    } < torch_flash._arguments()
    cudnn_names = [
        a.name for a in torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema.arguments
    ]
    assert cudnn_names == [
        "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask",
        "scale",
    ]  # fmt: skip
