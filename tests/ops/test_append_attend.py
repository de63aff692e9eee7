"""append_attend_: new tokens where they belong and nowhere else, then what decode_attention says of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS, KVSegment
from lightvlm_ext.ops.append_attend import append_attend_checked
from tests.emulation.build import Control
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend, emulation_library
from tests.ops.decode_cases import INF, NAN, check, query_of
from tests.ops.paging import LAYOUTS, make_pages, to_bytes

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HEADS = 2


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Cache:
    """Rows of some lengths; what stands behind them, and in places that are no row's, is NaN.

    page_size: of pages in any order, none of them in two rows; None: a piece for each row.
    layout: of make_pages, which lays out rows as it does pages.
    """

    def __init__(
        self,
        lens: list[int],
        tokens: int,
        *,
        width: int = 64,
        dtype: torch.dtype = torch.float32,
        page_size: int | None = None,
        layout: str = "tokens",
        leftpad: list[int] | None = None,
    ) -> None:
        self.lens = ints(*lens)
        self.leftpad = None if leftpad is None else ints(*leftpad)
        rows, size = len(lens), tokens
        self.table: Tensor | None = None
        if page_size is not None:
            blocks = -(-tokens // page_size)
            rows, size = rows * blocks + 1, page_size
            self.table = torch.randperm(rows)[: len(lens) * blocks].view(len(lens), blocks).int()
        self.key, self.value = (
            make_pages(layout, rows, size, HEADS, width, dtype).fill_(NAN) for _ in range(2)
        )
        for row, length in enumerate(lens):
            for n in range(length):
                for cache in (self.key, self.value):
                    cache[self.place(row, n)] = torch.randn(HEADS, width).to(dtype)

    def place(self, row: int, token: int) -> tuple[int, int]:
        if self.table is None:
            return row, token
        size = self.key.shape[1]
        return int(self.table[row, token // size]), token % size

    def new(self, tokens: int) -> tuple[Tensor, Tensor]:
        shape = (len(self.lens), tokens, HEADS, self.key.shape[3])
        key, value = (torch.randn(shape).to(self.key.dtype) for _ in range(2))
        return key, value

    def written(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What keys and values should be afterwards, element for element in the order of the view."""
        wanted = self.key.clone(), self.value.clone()
        for row, first in enumerate(self.lens.tolist()):
            for token in range(new[0].shape[1]):
                for cache, values in zip(wanted, new, strict=True):
                    cache[self.place(row, first + token)] = values[row, token]
        return wanted

    def options(self) -> dict[str, Any]:
        return {"leftpad": self.leftpad, "block_table": self.table}


def step(
    backend: Backend,
    cache: Cache,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    *,
    wants_mass: bool = False,
    **options: Any,
) -> None:
    """One step is right: the cache to the bit, and the result as decode_attention's on that cache."""
    wanted = cache.written(new)
    segment = KVSegment(*wanted, cache.lens + new[0].shape[1], cache.leftpad, cache.table)
    mass = torch.rand(len(query), HEADS, segment.tokens) if wants_mass else None
    masses = None if mass is None else [mass.clone()]
    out, lse = backend.append_attend_(
        query, cache.key, cache.value, *new, cache.lens, mass=mass, **cache.options(), **options
    )
    assert torch.equal(to_bytes(cache.key), to_bytes(wanted[0]))
    assert torch.equal(to_bytes(cache.value), to_bytes(wanted[1]))
    same = backend.decode_attention(query, [segment], mass=masses, **options)
    assert torch.equal(out, same[0])
    assert torch.equal(lse, same[1])
    assert mass is None or masses is None or torch.equal(mass, masses[0])
    check(backend, query, [segment], HEADS, **options)


@every_backend
@each_dtype
@pytest.mark.parametrize("width", PACKED_HEAD_DIMS)
@pytest.mark.parametrize("page_size", [None, 48])
@pytest.mark.parametrize("wants_mass", [False, True], ids=["", "mass"])
def test_every_width(
    backend: Backend, dtype: torch.dtype, width: int, page_size: int | None, wants_mass: bool
) -> None:
    cache = Cache([47, 96, 0], 144, width=width, dtype=dtype, page_size=page_size)
    step(backend, cache, query_of(3, 6, width, dtype), cache.new(1), wants_mass=wants_mass)


@every_backend
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("page_size", [None, 16])
def test_so_many_new_tokens(backend: Backend, tokens: int, page_size: int | None) -> None:
    """Also up to the last place there is."""
    lens = [0, 1, 15, 16, 31, 64 - tokens]
    cache = Cache(lens, 64, page_size=page_size, leftpad=[0, 0, 7, 16, 3, 0])
    step(backend, cache, query_of(6, 6, 64), cache.new(tokens), scale=0.3, wants_mass=True)


@every_backend
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("width", [64, 80])
def test_strides(
    backend: Backend, dtype: torch.dtype, layout: str, page_size: int | None, width: int
) -> None:
    """Of the cache, and of new tokens that are parts of one projection; the query's heads are strided, too."""
    cache = Cache([40, 33], 64, width=width, dtype=dtype, page_size=page_size, layout=layout)
    joined = torch.randn(2, 1, 6 + 2 * HEADS, width).to(dtype)
    new = joined[:, :, 6 : 6 + HEADS], joined[:, :, 6 + HEADS :]
    assert not new[0].is_contiguous()
    step(backend, cache, joined[:, :, :6], new)
    shifted = torch.randn(2, 3, HEADS, width + 1).to(dtype)[..., 1:]  # no access wider than a number
    cache.lens += 1
    step(backend, cache, joined[:, :, :6], (shifted, shifted.flip(1)))


@every_backend
def test_left_padding_may_reach_into_the_new_tokens(backend: Backend) -> None:
    cache = Cache([8, 20], 64, page_size=16, leftpad=[11, 24])
    step(backend, cache, query_of(2, 4, 64), cache.new(4))  # the second row sees none


@every_backend
@pytest.mark.parametrize("page_size", [None, 32])
def test_without_new_tokens(backend: Backend, page_size: int | None) -> None:
    cache = Cache([40, 64], 64, page_size=page_size)
    query = query_of(2, 6, 64)
    before = to_bytes(cache.key)
    found = backend.append_attend_(query, cache.key, cache.value, None, None, cache.lens, **cache.options())
    wanted = backend.decode_attention(
        query, [KVSegment(cache.key, cache.value, cache.lens, block_table=cache.table)]
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(to_bytes(cache.key), before)


@every_backend
@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_without_lens_new_tokens_are_the_last(backend: Backend, page_size: int | None, tokens: int) -> None:
    cache = Cache([64 - tokens, 64 - tokens], 64, page_size=page_size)
    query, new = query_of(2, 6, 64), cache.new(tokens)
    wanted = cache.written(new)
    found = backend.append_attend_(query, cache.key, cache.value, *new, None, **cache.options())
    assert torch.equal(to_bytes(cache.key), to_bytes(wanted[0]))
    assert torch.equal(to_bytes(cache.value), to_bytes(wanted[1]))
    same = backend.decode_attention(query, [KVSegment(*wanted, block_table=cache.table)])
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


@every_backend
def test_no_rows(backend: Backend) -> None:
    cache = Cache([], 64)
    out, lse = backend.append_attend_(query_of(0, 4, 64), cache.key, cache.value, *cache.new(1), cache.lens)
    assert out.shape == (0, 1, 4, 64)
    assert lse.shape == (0, 4, 1)


@native_backend
def test_tokens_that_are_where_they_belong_already(backend: Backend) -> None:
    """A caller may have written them, and hand in views of the cache."""
    cache = Cache([40, 40], 64)
    new = cache.new(1)
    cache.key, cache.value = cache.written(new)
    query = query_of(2, 4, 64)
    wanted = cache.key.clone(), cache.value.clone()
    backend.append_attend_(
        query, cache.key, cache.value, cache.key[:, 40:41], cache.value[:, 40:41], cache.lens
    )
    assert torch.equal(to_bytes(cache.key), to_bytes(wanted[0]))
    assert torch.equal(to_bytes(cache.value), to_bytes(wanted[1]))


@every_backend
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_cache_whose_rows_share_memory_is_not_written(backend: Backend, name: str) -> None:
    cache = Cache([5, 5], 32)
    stored = {"key": cache.key, "value": cache.value}
    stored[name] = stored[name][:1].expand(2, -1, -1, -1)
    query = query_of(2, 4, 64)
    with pytest.raises(ValueError, match=f"^{name}: shares memory with itself"):
        backend.append_attend_(query, *stored.values(), *cache.new(1), cache.lens)
    backend.append_attend_(query, *stored.values(), None, None, cache.lens)  # reading it is fine


def test_lazy_clones_are_written_and_read_in_one_place() -> None:
    cache, query = Cache([5, 5], 32), query_of(2, 4, 64)
    key, value = torch._lazy_clone(cache.key), torch._lazy_clone(cache.value)
    before, new = to_bytes(cache.key), cache.new(1)
    found = CPU.append_attend_(query, key, value, *new, cache.lens)
    wanted = CPU.decode_attention(query, [KVSegment(*cache.written(new), cache.lens + 1)])
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(to_bytes(cache.key), before)


@native_backend
def test_nan_and_infinity_are_written_as_they_are(backend: Backend) -> None:
    cache = Cache([3, 5], 32)
    key, value = cache.new(1)
    key[0, 0, 0, :3] = torch.tensor([NAN, INF, -INF])
    wanted = cache.written((key, value))
    out, _ = backend.append_attend_(query_of(2, 4, 64), cache.key, cache.value, key, value, cache.lens)
    assert torch.equal(to_bytes(cache.key), to_bytes(wanted[0]))
    assert out[0, 0, :2].isnan().all()
    assert out[0, 0, 2:].isfinite().all()
    assert out[1].isfinite().all()


@native_backend
@given(data=st.data())
def test_any_sizes(backend: Backend, data: st.DataObject) -> None:
    draw: Callable[..., Any] = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    page_size = draw(st.sampled_from([None, 16, 80]))
    room = draw(st.integers(1, 90)) if page_size is None else page_size * draw(st.integers(1, 3))
    tokens = draw(st.integers(0, min(room, 20)))
    lens = draw(st.lists(st.integers(0, room - tokens), min_size=1, max_size=3))
    leftpad = draw(st.none() | st.tuples(*[st.integers(0, n + tokens) for n in lens]))
    width, dtype = draw(st.sampled_from([32, 80])), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cache = Cache(
        lens,
        room,
        width=width,
        dtype=dtype,
        page_size=page_size,
        layout=draw(st.sampled_from(LAYOUTS)),
        leftpad=None if leftpad is None else list(leftpad),
    )
    step(
        backend, cache, query_of(len(lens), HEADS * draw(st.integers(1, 9)), width, dtype), cache.new(tokens)
    )


BAD_PLACES = {
    "no room": ([40, 63], [0, 0]),
    "a negative length": ([40, -1], [0, 0]),
    "a length that new tokens make valid": ([40, -2], [0, 0]),
    "padding past the end": ([40, 30], [0, 33]),
    "negative padding": ([40, 30], [0, -1]),
}


@every_backend
@pytest.mark.parametrize("name", BAD_PLACES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_bad_places(backend: Backend, name: str, page_size: int | None) -> None:
    """The CPU raises before anything is written; a device goes on with the row that is right, and writes no place that
    there is not."""
    cache = Cache([40, 30], 64, page_size=page_size)
    right = cache.lens.clone()
    new, query = cache.new(2), query_of(2, 4, 64)
    wanted = cache.written(new)
    before = to_bytes(cache.key)
    cache.lens, cache.leftpad = (ints(*values) for values in BAD_PLACES[name])
    arguments = (query, cache.key, cache.value, *new, cache.lens)
    if not backend.is_device:
        with pytest.raises(ValueError, match=r"lens.*row 1"):
            backend.append_attend_(*arguments, **cache.options())
        assert torch.equal(to_bytes(cache.key), before)
        return
    lightvlm_ext.device_errors()
    out, lse = backend.append_attend_(*arguments, **cache.options())
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert len(lightvlm_ext.device_errors()) == 1
    first = KVSegment(*wanted, right + 2, block_table=cache.table)
    assert torch.equal(out[0], backend.decode_attention(query, [first])[0][0])
    for n in range(64):
        place = cache.place(0, n)
        assert torch.equal(to_bytes(cache.key[place]), to_bytes(wanted[0][place]))


@every_backend
@pytest.mark.parametrize("hidden", [False, True])
def test_bad_pages(backend: Backend, hidden: bool) -> None:
    """hidden: left padding keeps everybody from reading the page, but not from writing it."""
    cache = Cache([40, 31], 64, page_size=16, leftpad=[0, 32 if hidden else 0])
    assert cache.table is not None
    cache.table[1, 1] = len(cache.key)
    new = cache.new(1)
    before = to_bytes(cache.key)
    arguments = (query_of(2, 4, 64), cache.key, cache.value, *new, cache.lens)
    if not backend.is_device:
        with pytest.raises(ValueError, match=r"block_table.*row 1"):
            backend.append_attend_(*arguments, **cache.options())
        assert torch.equal(to_bytes(cache.key), before)
        return
    lightvlm_ext.device_errors()
    out, _ = backend.append_attend_(*arguments, **cache.options())
    assert (out[1] == 0).all()
    assert "page" in lightvlm_ext.device_errors()[0]


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query: got list"),
    ({"query": torch.zeros(2, 2, 4, 64)}, ValueError, r"query: has shape .* must be \(B, 1, Hq, D\)"),
    ({"query": torch.zeros(2, 1, 4, 48)}, ValueError, "query: has head width 48"),
    ({"query": torch.zeros(2, 1, 3, 64)}, ValueError, "query: has 3 heads, must be .* the key heads, 2"),
    ({"key": None}, TypeError, "^key: got NoneType"),
    ({"key": torch.zeros(2, 64, 2, 64).half()}, TypeError, "^key: has dtype float16"),
    ({"key": torch.zeros(3, 64, 2, 64)}, ValueError, r"^key: has shape .* \(2, N, Hkv, 64\)"),
    ({"value": torch.zeros(2, 63, 2, 64)}, ValueError, "^value: has shape"),
    ({"new_key": None}, ValueError, "new_key: is None"),
    ({"new_value": None}, ValueError, "new_value: is None"),
    ({"new_key": 1}, TypeError, "new_key: got int"),
    ({"new_key": torch.zeros(2, 1, 2, 64).half()}, TypeError, "new_key: has dtype float16"),
    ({"new_key": torch.zeros(1, 1, 2, 64)}, ValueError, r"new_key: has shape .* must be \(2, 1, 2, 64\)"),
    ({"new_key": torch.zeros(2, 2, 64)}, ValueError, r"new_key: has shape .* must be \(2, T, 2, 64\)"),
    ({"new_value": torch.zeros(2, 3, 2, 64)}, ValueError, r"new_value: has shape .* must be \(2, 1, 2, 64\)"),
    ({"new_value": torch.zeros(2, 1, 1, 64)}, ValueError, "new_value: has shape"),
    (
        {"new_value": torch.zeros(2, 1, 2, 128)[..., ::2]},
        ValueError,
        "new_value: last dimension has stride 2",
    ),
    ({"new_key": torch.zeros(2, 1, 2, 64, device="meta")}, ValueError, "new_key: is on meta"),
    (
        {"lens": None, "new_key": torch.zeros(2, 65, 2, 64), "new_value": torch.zeros(2, 65, 2, 64)},
        ValueError,
        "new_key: has 65 tokens, without lens at most 64",
    ),
    ({"mass": torch.zeros(2, 2, 63)}, ValueError, r"^mass: has shape .* must be \(2, 2, 64\)"),
    ({"mass": torch.zeros(2, 2, 64).half()}, TypeError, "^mass: has dtype float16"),
    ({"mass": torch.zeros(1, 2, 64).expand(2, 2, 64)}, ValueError, "^mass: shares memory"),
    ({"lens": torch.zeros(2)}, TypeError, "lens: has dtype float32"),
    ({"lens": ints(1)}, ValueError, r"lens: has shape \(1,\)"),
    ({"leftpad": ints(1)}, ValueError, r"leftpad: has shape \(1,\)"),
    ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table: has dtype float32"),
    ({"block_table": torch.zeros(1, 2).int()}, ValueError, "block_table: has shape"),
    ({"key": torch.zeros(2, 8, 2, 64), "block_table": ints(0, 1).view(2, 1)}, ValueError, "page_size 8"),
    ({"scale": NAN}, ValueError, "scale: got nan"),
]


@every_backend
@pytest.mark.parametrize(("changed", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    cache = torch.zeros(2, 64, 2, 64)
    arguments = {
        "query": torch.zeros(2, 1, 4, 64),
        "key": cache,
        "value": cache.clone(),
        "new_key": torch.ones(2, 1, 2, 64),
        "new_value": torch.ones(2, 1, 2, 64),
        "lens": ints(1, 2),
        **changed,
    }
    with pytest.raises(error, match=message):
        backend.append_attend_(**arguments)
    assert (cache == 0).all()


BAD_RAW: list[tuple[dict[str, Any], str]] = [
    ({"new_value": None}, "both must be given, or none"),
    (
        {"lens": None, "new_key": torch.zeros(2, 65, 2, 64), "new_value": torch.zeros(2, 65, 2, 64)},
        "new_key: has 65 tokens, without lens at most 64",
    ),
    ({"mass": torch.zeros(2, 2, 63)}, r"mass: has shape \(2, 2, 63\), must be \(2, 2, 64\)"),
    ({"new_key": torch.zeros(2, 1, 1, 64)}, r"new_key: has shape \(2, 1, 1, 64\)"),
    ({"new_value": torch.zeros(2, 2, 2, 64)}, "new_value: has shape"),
    ({"new_value": torch.zeros(2, 1, 2, 128)[..., ::2]}, "new_value: the last dimension must be contiguous"),
    (
        {"query": torch.zeros(2, 1, 3, 64), "out": torch.zeros(2, 1, 3, 64), "lse": torch.zeros(2, 3, 1)},
        "3 heads",
    ),
    ({"out": torch.zeros(2, 1, 4, 32)}, "out: has shape"),
    ({"key": torch.zeros(1, 64, 2, 64).expand(2, -1, -1, -1)}, "^key: shares memory with itself"),
    ({"value": torch.zeros(1, 64, 2, 64).expand(2, -1, -1, -1)}, "^value: shares memory with itself"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_RAW)
def test_the_op_itself_checks_what_memory_depends_on(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "query": torch.zeros(2, 1, 4, 64),
        "key": torch.zeros(2, 64, 2, 64),
        "value": torch.zeros(2, 64, 2, 64),
        "new_key": torch.zeros(2, 1, 2, 64),
        "new_value": torch.zeros(2, 1, 2, 64),
        "lens": ints(1, 2),
        "leftpad": None,
        "block_table": None,
        "scale": 1.0,
        "out": torch.zeros(2, 1, 4, 64),
        "lse": torch.zeros(2, 4, 1),
        "mass": None,
        "workspace": None,
        "ticket": None,
        "error": None,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        CPU.raw("append_attend")(*arguments.values())


@native_backend
@pytest.mark.parametrize("page_size", [None, 16])
def test_the_way_in_without_checks(backend: Backend, page_size: int | None) -> None:
    cache = Cache([40, 17], 64, page_size=page_size, leftpad=[3, 0])
    new, query = cache.new(1), query_of(2, 6, 64)
    wanted = REFERENCE.append_attend_(
        query, cache.key.clone(), cache.value.clone(), *new, cache.lens, **cache.options()
    )
    found = backend._wrap(append_attend_checked)(
        query, cache.key, cache.value, *new, cache.lens, cache.leftpad, cache.table, 64**-0.5
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_launches() -> None:
    control = Control(emulation_library())
    cache, query = Cache([40, 17], 64), query_of(2, 6, 64)

    def launches(new: tuple[Tensor | None, Tensor | None], **options: Tensor) -> list[int]:
        names = ("append", "decode_attention", "decode_mass")
        before = [control.launch_count(name) for name in names]
        EMULATED.append_attend_(query, cache.key, cache.value, *new, cache.lens, **options)
        return [control.launch_count(name) - n for name, n in zip(names, before, strict=True)]

    assert launches(cache.new(1)) == [1, 1, 0]
    assert launches(cache.new(1), mass=torch.zeros(2, 2, 64)) == [1, 1, 1]
    assert launches(cache.new(0)) == [0, 1, 0]
    assert launches((None, None)) == [0, 1, 0]


@pytest.mark.parametrize("page_size", [None, 16])
def test_opcheck(page_size: int | None) -> None:
    cache, query = Cache([40, 17], 64, page_size=page_size, leftpad=[3, 0]), query_of(2, 6, 64)
    for tensor in (cache.key, cache.value):
        tensor.nan_to_num_()
    ops.append_attend_(query, cache.key, cache.value, *cache.new(1), cache.lens, **cache.options())
    arguments = (query, cache.key, cache.value, *cache.new(1), cache.lens, cache.leftpad, cache.table, 0.1)
    outputs = (torch.empty_like(query), torch.empty(2, 6, 1), torch.zeros(2, 2, 64), None, None, None)
    torch.library.opcheck(torch.ops.lightvlm.append_attend.default, (*arguments, *outputs))
