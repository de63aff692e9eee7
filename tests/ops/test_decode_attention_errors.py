"""decode_attention: what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import ops
from tests.ops.backends import BACKENDS, CPU, EMULATED, REFERENCE, Backend
from tests.ops.decode_cases import NAN, Segment, dense, packed, query_of, wide
from tests.ops.decode_pages import in_pages
from tests.ops.packing import lens_of

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)

Q, K, P = query_of(2, 4, 64), dense(2, 6, 2, 64), packed(4, 2, 70, 2, 64, block=64)
MASS = [torch.zeros(2, 2, 6), torch.zeros(2, 2, 70)]
PAGED = in_pages(32, 2, 64, torch.float32, lens=[40, 9], blocks=2)
SPARSE = K.key.transpose(2, 3).contiguous().transpose(2, 3)


TABLE = torch.zeros(2, 2, dtype=torch.int32)


def change(segment: Segment, **changed: Any) -> list[Segment]:
    return [dataclasses.replace(segment, **changed)]


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query: got list"),
    ({"query": Q.int()}, TypeError, "query: has dtype int32, must be float32 or float16 or bfloat16"),
    ({"query": Q[0]}, ValueError, r"query: has shape \(1, 4, 64\), must be \(B, 1, Hq, D\)"),
    ({"query": Q.expand(-1, 2, -1, -1)}, ValueError, r"must be \(B, 1, Hq, D\)"),
    (
        {"query": Q[..., :48], "segments": []},
        ValueError,
        "query: has head width 48, must be one of 32, 64, 80, 96, 128, 192, 256",
    ),
    (
        {"query": Q[:, :, :3]},
        ValueError,
        "query: has 3 heads, must be a positive multiple of the key heads, 2",
    ),
    ({"query": Q.repeat(1, 1, 1, 2)[..., ::2]}, ValueError, "query: last dimension has stride 2"),
    ({"segments": K}, TypeError, "segments: got KVSegment"),
    ({"segments": [Q]}, TypeError, r"segments\[0\]: got Tensor, must be a KVSegment or PackedKV"),
    ({"segments": [K] * 13}, ValueError, "segments: got 13, must be at most 12"),
    ({"segments": change(K, key=1)}, TypeError, r"segments\[0\].key: got int"),
    ({"segments": change(K, key=K.key.half())}, TypeError, r"segments\[0\].key: has dtype float16"),
    ({"segments": change(K, value=K.value.half())}, TypeError, r"segments\[0\].value: has dtype float16"),
    (
        {"segments": change(K, key=K.key[:1])},
        ValueError,
        r"segments\[0\].key: has shape .* \(2, N, Hkv, 64\)",
    ),
    ({"segments": change(K, value=K.value[:, :3])}, ValueError, r"segments\[0\].value: has shape"),
    ({"segments": change(K, key=SPARSE)}, ValueError, r"segments\[0\].key: last dimension has stride"),
    ({"segments": change(K, key=K.key.to("meta"))}, ValueError, r"segments\[0\].key: is on meta"),
    ({"segments": change(K, lens=lens_of(1))}, ValueError, r"segments\[0\].lens: has shape \(1,\)"),
    ({"segments": change(K, leftpad=torch.zeros(2))}, TypeError, r"segments\[0\].leftpad: has dtype float32"),
    ({"segments": change(PAGED, block_table=[0])}, TypeError, r"segments\[0\].block_table: got list"),
    (
        {"segments": change(PAGED, block_table=TABLE.long())},
        TypeError,
        r"segments\[0\].block_table: has dtype int64, must be int32",
    ),
    (
        {"segments": change(PAGED, block_table=TABLE[:1])},
        ValueError,
        r"segments\[0\].block_table: has shape \(1, 2\), must be \(2, max_blocks\)",
    ),
    (
        {"segments": change(PAGED, block_table=TABLE.T.contiguous().T)},
        ValueError,
        r"segments\[0\].block_table: last dimension has stride 2",
    ),
    (
        {"segments": change(PAGED, block_table=TABLE.to("meta"))},
        ValueError,
        r"segments\[0\].block_table: is on meta",
    ),
    *(
        (
            {"segments": change(PAGED, key=wrong, value=wrong)},
            ValueError,
            rf"segments\[0\].key: has page_size {size}, must be a multiple of 16 from 16 to 256",
        )
        for size in (0, 8, 24, 272)
        for wrong in [torch.zeros(4, size, 2, 64)]
    ),
    (
        {"segments": change(PAGED, key=PAGED.key[..., :32])},
        ValueError,
        r"segments\[0\].key: has shape .* must be \(P, page_size, Hkv, 64\)",
    ),
    ({"segments": change(PAGED, value=PAGED.value[1:])}, ValueError, r"segments\[0\].value: has shape"),
    (
        {"segments": [K, *change(PAGED, key=PAGED.key[:, :, :1])]},
        ValueError,
        r"segments\[1\].key: has 1 heads",
    ),
    (
        {"segments": [PAGED], "mass": [torch.zeros(2, 2, 32)]},
        ValueError,
        r"mass\[0\]: has shape \(2, 2, 32\), must be \(2, 2, 64\)",
    ),
    ({"segments": [K, dense(2, 6, 1, 64)]}, ValueError, r"segments\[1\].key: has 1 heads, must have 2"),
    ({"segments": change(P, bits=3)}, ValueError, r"segments\[0\].bits: got 3, must be 8, 4 or 2"),
    ({"segments": change(P, bits=2)}, ValueError, r"segments\[0\].key_codes: has shape"),
    ({"segments": change(P, block=32)}, ValueError, r"segments\[0\].block: got 32, must be a multiple of 64"),
    ({"segments": [K, packed(4, 1, 9, 2, 64)]}, ValueError, r"segments\[1\]: has 1 batch rows"),
    ({"segments": [packed(4, 2, 9, 2, 96)]}, ValueError, r"segments\[0\]: has 2 batch rows of head width 96"),
    ({"mass": MASS[0]}, TypeError, "mass: got Tensor"),
    ({"mass": MASS[:1]}, ValueError, "mass: has 1 entries, must have one for each of 2 segments"),
    ({"mass": [None, MASS[0]]}, ValueError, r"mass\[1\]: has shape \(2, 2, 6\), must be \(2, 2, 70\)"),
    ({"mass": [MASS[0].half(), None]}, TypeError, r"mass\[0\]: has dtype float16, must be float32"),
    ({"mass": [torch.zeros(1, 1, 6).expand(2, 2, 6), None]}, ValueError, r"mass\[0\]: shares memory"),
    ({"segments": [K, K], "mass": [MASS[0], MASS[0]]}, ValueError, r"mass\[1\]: shares memory"),
    ({"scale": NAN}, ValueError, "scale: got nan"),
    ({"scale": "1"}, TypeError, "scale: got str"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.decode_attention(**{"query": Q, "segments": [K, P], **arguments})
    assert all((buffer == 0).all() for buffer in MASS)


BAD_BOUNDS = [([6, 7], [0, 0]), ([6, -1], [0, 0]), ([6, 6], [0, -1]), ([6, 3], [0, 4])]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("lens", "leftpad"), BAD_BOUNDS)
def test_bad_lens_raise_on_the_cpu(backend: Backend, lens: list[int], leftpad: list[int]) -> None:
    (segment,) = change(K, lens=lens_of(*lens), leftpad=lens_of(*leftpad))
    mass = [torch.zeros(2, 2, 70), torch.zeros(2, 2, 6)]
    with pytest.raises(ValueError, match=r"lens, leftpad.*row 1"):
        backend.decode_attention(Q, [P, segment], mass=mass)
    assert all((buffer == 0).all() for buffer in mass)
    with pytest.raises(ValueError, match=r"lens.*row 0"):
        backend.decode_attention(Q, change(P, lens=lens_of(71, 3)))


@pytest.mark.parametrize(("lens", "leftpad"), BAD_BOUNDS)
def test_bad_lens_set_the_device_word_emulated(lens: list[int], leftpad: list[int]) -> None:
    lightvlm_ext.device_errors()
    (segment,) = change(K, lens=lens_of(*lens), leftpad=lens_of(*leftpad))
    (good,) = change(K, lens=lens_of(6, 0))
    mass, expected_mass = ([torch.zeros(2, 2, 6), torch.zeros(2, 2, 70)] for _ in range(2))
    found = EMULATED.decode_attention(Q, [segment, P], mass=mass)
    expected = EMULATED.decode_attention(Q, [good, P], mass=expected_mass)
    for a, b in zip([*found, *mass], [*expected, *expected_mass], strict=True):
        assert torch.equal(a, b)
    (message,) = lightvlm_ext.device_errors()
    assert "decode_attention: lens, leftpad" in message


def test_reference_takes_float64() -> None:
    mass = [torch.zeros(2, 2, 6, dtype=torch.float64), None]
    out, lse = REFERENCE.decode_attention(Q.double(), [wide(K), P], mass=mass)
    assert out.dtype == lse.dtype == torch.float64
    with pytest.raises(TypeError, match="query: has dtype float64"):
        ops.decode_attention(Q.double(), [wide(K), P])
