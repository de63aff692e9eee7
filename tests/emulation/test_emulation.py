"""The emulator runs right kernels right, and notices what is wrong with wrong ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulation import self_test
from tests.emulation.self_test import INVALID_CONFIGURATION, INVALID_VALUE, LAUNCH_FAILURE, SelfTest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = range(8)  # 0 is the natural order


@pytest.fixture(scope="module", params=["plain", "ucontext"])
def t(request: pytest.FixtureRequest) -> SelfTest:
    return SelfTest(self_test.compile_self_test(request.param))


def set_seed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("LIGHTVLM_EMULATION_SEED", str(seed))


def rms_norm(t: SelfTest, x: torch.Tensor, threads: int) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    rows, width = x.shape
    error = t.call("run_rms_norm", DTYPES.index(x.dtype), pointer(x), pointer(y), rows, width, threads)
    assert error == 0, t.last_error()
    return y


def pointer(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy() if x.numel() else np.zeros(1, np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "threads"), [(1, 1, 32), (3, 31, 64), (5, 257, 256), (2, 4097, 1024)]
)
def test_right_kernel_is_right(t: SelfTest, dtype: torch.dtype, rows: int, width: int, threads: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wide = x.float()
    same_precision = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(dtype)
    allowed = 2 * (same_precision.double() - exact).abs().max() + 1e-6
    before = t.launch_count("rms_norm")
    y = rms_norm(t, x, threads)
    assert t.launch_count("rms_norm") == before + 1
    assert (y.double() - exact).abs().max() <= allowed


def test_empty_grid_does_not_launch(t: SelfTest) -> None:
    t.reset_launch_counts()
    rms_norm(t, torch.zeros(0, 8), 32)
    assert t.launch_count("rms_norm") == 0


def test_right_kernel_does_not_depend_on_the_seed(t: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in SEEDS:
        set_seed(monkeypatch, seed)
        results.append(rms_norm(t, x, 256))
    assert all(torch.equal(result, results[0]) for result in results)


def test_launches_from_several_threads(t: SelfTest) -> None:
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    expected = rms_norm(t, x, 128)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda threads: rms_norm(t, x, threads), [128] * 12))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_collectives(t: SelfTest, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(monkeypatch, seed)
    out = np.zeros((22, 32), np.int32)
    assert t.call("run_collectives", out) == 0, t.last_error()
    lanes = np.arange(32)
    value = 3 * lanes + 1

    def bits(which: np.ndarray) -> int:
        return int(np.int32(np.uint32((1 << lanes[which].astype(np.uint64)).sum())))

    same_class = np.array([bits(lanes % 5 == lane % 5) for lane in lanes])
    shifted = value - 50
    half_sums = np.where(lanes < 16, value[:16].sum(), value + value[lanes ^ 1])
    expected = [
        value[5],
        value[(lanes & ~7) + ((lanes + 3) & 7)],
        value[np.where(lanes % 16 >= 3, lanes - 3, lanes)],
        value[np.where(lanes % 16 <= 12, lanes + 3, lanes)],
        value[lanes ^ 9],
        value[np.where((lanes ^ 12) <= (lanes | 7), lanes ^ 12, lanes)],
        value[lanes ^ 1],
        value[31],
        bits(lanes % 3 == 0),
        1,
        0,
        1,
        0,
        same_class,
        shifted.sum(),
        shifted.min(),
        shifted.max(),
        -1 - (-1 - shifted[shifted < 0]).min(),  # the largest as unsigned is the negative nearest to 0
        np.bitwise_and.reduce(value | 64),
        np.bitwise_or.reduce(value),
        np.bitwise_xor.reduce(value),
        half_sums,
    ]
    for row, wanted in enumerate(expected):
        np.testing.assert_array_equal(out[row], np.broadcast_to(wanted, 32), err_msg=f"row {row}")


@pytest.mark.parametrize("threads", [32, 33, 256, 1024])
def test_block_votes(t: SelfTest, threads: int) -> None:
    out = np.zeros(threads, np.int32)
    assert t.call("run_block_votes", out, threads) == 0, t.last_error()
    counted = (np.arange(threads) % 3 == 0).sum()
    assert (out == counted * 16 + 8 + 0 + 2 + 0).all()


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_every_thread_runs_once(t: SelfTest, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(monkeypatch, seed)
    for grid, block in [((1, 1, 1), (1, 1, 1)), ((5, 3, 2), (7, 5, 3)), ((12, 1, 4), (1, 2, 64))]:
        out = np.zeros(np.prod(grid) * np.prod(block), np.int32)
        arguments = np.array(grid, np.int64), np.array(block, np.int32)
        assert t.call("run_indices", out, *arguments) == 0, t.last_error()
        np.testing.assert_array_equal(out, np.arange(out.size))


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ((0, 1, 1), (32, 1, 1), 0),
        ((1, 1, 0), (32, 1, 1), 0),
        ((1 << 31, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1 << 32, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((-1, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 65536, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 65536), (32, 1, 1), INVALID_CONFIGURATION),
        ((0, 65536, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 33, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), INVALID_CONFIGURATION),
    ],
)
def test_launch_limits(t: SelfTest, grid: tuple[int, ...], block: tuple[int, ...], error: int) -> None:
    out = np.full(4, 7, np.int32)
    assert t.call("run_indices", out, np.array(grid, np.int64), np.array(block, np.int32)) == error
    assert (out == 7).all()


ATOMIC_TOTALS = np.dtype(
    [
        *(("added", "i4"), ("added_unsigned", "u4"), ("added_wide", "u8")),
        *(("smallest", "i4"), ("largest", "i4"), ("smallest_wide", "u8"), ("largest_wide", "u8")),
        *(("smallest_signed", "i8"), ("largest_signed", "i8"), ("ored", "u4"), ("ored_signed", "i4")),
        *(("anded", "u4"), ("swapped", "u4"), ("exchanged", "u4")),
    ],
    align=True,
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_atomics(t: SelfTest, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(monkeypatch, seed)
    totals = np.zeros(1, ATOMIC_TOTALS)
    totals["smallest_wide"] = 2**64 - 1
    totals["anded"] = 0xFFFFFFFF
    assert t.call("run_atomics", totals, 3, 96) == 0, t.last_error()
    values = np.arange(3 * 96) - 40
    expected = {
        "added": values.sum(),
        "added_unsigned": values.sum() % 2**32,
        "added_wide": len(values) << 40,
        "smallest": values.min(),
        "largest": values.max(),
        "smallest_wide": int(values.min() + 50) << 33,
        "largest_wide": int(values.max() + 50) << 33,
        "smallest_signed": int(values.min()) << 33,
        "largest_signed": int(values.max()) << 33,
        "ored": 2**32 - 1,
        "ored_signed": 2**16 - 1,
        "anded": 0xFFFFFF00,
        "swapped": 2 * len(values),
        "exchanged": 77,
    }
    assert {name: int(totals[name][0]) for name in expected} == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_spin_loops_that_end(t: SelfTest, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(monkeypatch, seed)
    blocks = 6
    flags, ticket, out = (np.zeros(size, np.int32) for size in (2 * blocks, 1, blocks))
    assert t.call("run_spin", flags, ticket, out, blocks) == 0, t.last_error()
    np.testing.assert_array_equal(out, np.arange(blocks) + 1)


def test_async_copies_arrive_when_waited_for(t: SelfTest) -> None:
    tiles, valid = 5, 3 * 64 + 17
    source = np.arange(tiles * 64 * 4, dtype=np.float32).reshape(tiles, 64, 4) + 1
    out = np.zeros_like(source)
    assert t.call("run_async_copy", 1, source, out, tiles, valid) == 0, t.last_error()
    expected = np.where(np.arange(tiles * 64).reshape(tiles, 64, 1) < valid, source, 0)[:, ::-1]
    np.testing.assert_array_equal(out, expected)
    assert t.call("run_async_copy", 0, source, out, tiles, valid) == 0, t.last_error()
    assert np.isnan(out[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_is_a_matrix_product(t: SelfTest, dtype: torch.dtype) -> None:
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    d = np.random.default_rng(0).integers(-8, 9, (16, 8)).astype(np.float32)
    expected = d + (a.float() @ b.float()).numpy()
    assert t.call("run_mma", int(dtype == torch.float16), pointer(a), pointer(b), d) == 0, t.last_error()
    np.testing.assert_array_equal(d, expected)


def test_pairs_are_transposed_subtracted_and_converted(t: SelfTest) -> None:
    matrix = torch.randint(-900, 900, (8, 8)).half()
    outputs = [np.zeros((8, 8), np.float16) for _ in range(2)] + [np.zeros((8, 8), np.uint16)]
    transposed, difference, converted = outputs
    subtracted = np.array([512, -3], np.float32)
    assert t.call("run_pairs", pointer(matrix), transposed, subtracted, difference, converted) == 0
    np.testing.assert_array_equal(transposed, matrix.T.numpy())
    np.testing.assert_array_equal(difference, (matrix - torch.tensor([512.0, -3.0]).half().repeat(4)).numpy())
    np.testing.assert_array_equal(converted, matrix.bfloat16().view(torch.uint16).numpy())


def test_ldmatrix(t: SelfTest) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((4, 32), np.uint32)
    assert t.call("run_ldmatrix", matrices, out, 0) == 0, t.last_error()
    # A lane holds two neighbours of a row: all 32 of them are the matrix, row by row.
    np.testing.assert_array_equal(out.view(np.uint16).reshape(4, 8, 8), matrices[:, ::-1])
    assert t.call("run_ldmatrix", matrices, out, 4) == LAUNCH_FAILURE
    assert "ldmatrix_x4: address is not aligned" in t.last_error()


def test_exp2(t: SelfTest) -> None:
    x = np.array([0, 1, -3, 0.5, -125.5, -127, 127.5, 128, -np.inf, np.inf, np.nan], np.float32)
    y = np.zeros_like(x)
    assert t.call("run_exp2", x, y, x.size) == 0, t.last_error()
    expected = np.exp2(x.astype(np.float64))
    expected[5], expected[7] = 0, np.inf
    np.testing.assert_allclose(y, expected, rtol=2**-22)


@pytest.mark.parametrize("valid", [0, 5, 32])
def test_narrow_copies(t: SelfTest, valid: int) -> None:
    data = np.arange(64, dtype=np.uint32).reshape(32, 2) + 1
    out, narrow = np.zeros((32, 2), np.uint32), np.zeros(32, np.uint32)
    assert t.call("run_narrow_copy", data, out, narrow, valid) == 0, t.last_error()
    data[valid:] = 0
    np.testing.assert_array_equal(out, data[::-1])
    np.testing.assert_array_equal(narrow, data[::-1, 1])


# ---- Order dependence ---------------------------------------------------------------------------


def test_seeds_change_the_order(t: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = set()
    for seed in SEEDS:
        set_seed(monkeypatch, seed)
        again = []
        for _ in range(2):
            order = np.zeros(4 * 64, np.int32)
            assert t.call("run_order", np.zeros(1, np.int32), order, 4, 64) == 0
            np.testing.assert_array_equal(np.sort(order), np.arange(order.size))
            again.append(order.tobytes())
        assert again[0] == again[1]
        orders.add(again[0])
        if seed == 0:
            np.testing.assert_array_equal(order, np.arange(order.size))
        else:
            warps = order.reshape(8, 32)
            assert (np.diff(warps[:, 0]) < 0).any(), "blocks or warps never changed places"
            assert (np.diff(warps, axis=1) < 0).any(), "lanes never changed places"
    assert len(orders) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS[1:])
def test_missing_barriers_show(t: SelfTest, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(monkeypatch, seed)
    out = np.zeros(256, np.float32)
    assert t.call("run_missing_barrier", out) == 0
    assert np.isnan(out).any()
    rounds = 10
    assert t.call("run_missing_second_barrier", out, rounds) == 0
    assert (out != sum(range(rounds))).any()


def test_order_of_float_atomics_shows(t: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = set()
    for seed in SEEDS:
        set_seed(monkeypatch, seed)
        total = np.zeros(1, np.float32)
        assert t.call("run_float_sum", total) == 0
        sums.add(float(total[0]))
    assert len(sums) > 1


def test_bad_seed_is_refused(t: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTVLM_EMULATION_SEED", "one")
    assert t.call("run_float_sum", np.zeros(1, np.float32)) == LAUNCH_FAILURE
    assert t.last_error() == "LIGHTVLM_EMULATION_SEED: got 'one', wants a number"


# ---- Faults -------------------------------------------------------------------------------------

FAULTS = [
    (0, "divergent barrier: ", " arrived at __syncthreads ("),
    (1, "divergent barrier: 63 of 64 threads wait at __syncthreads (", "thread (37,0,0) exited"),
    (2, "missing lane: __shfl_xor_sync (", "of whom thread (0,0,0) waits at __syncthreads ("),
    (3, "missing lane: __shfl_xor_sync (", "waits for lanes 0x00000020, of whom thread (5,0,0) exited"),
    (4, "missing lane: __ballot_sync (", "of whom thread (33,0,0) waits at __syncthreads ("),
    (5, "__any_sync (", "is not in its own mask 0x0000ffff"),
    (6, "divergent warp ", "with mask 0xffffffff"),
    (7, "divergent warp ", "with mask 0xffffffff"),
    (8, "shuffle width 12", "power of two"),
    (9, "__trap", "__trap"),
    (10, "no thread reached a barrier or its end", "spin loop"),
    (11, "__ldg: address is not aligned", "4 bytes"),
]


@pytest.mark.parametrize(("fault", "start", "part"), FAULTS)
def test_faults_are_named(
    t: SelfTest, fault: int, start: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTVLM_EMULATION_TIMEOUT", "0.1")
    t.reset_launch_counts()
    for seed in SEEDS[:4]:
        set_seed(monkeypatch, seed)
        assert t.call("run_fault", fault, np.zeros(80, np.int32)) == LAUNCH_FAILURE
        where, what = t.last_error().split("): ", 1)
        assert where.startswith("kernel 'fault', block (")
        assert what.startswith(start)
        assert part in what
    assert t.launch_count("fault") == 0
    # The next launch starts afresh.
    x = torch.ones(2, 64)
    assert torch.allclose(rms_norm(t, x, 64), x)


def test_mask_beyond_the_block_is_named(t: SelfTest) -> None:
    assert t.call("run_partial_warp", np.zeros(40, np.int32)) == LAUNCH_FAILURE
    assert "missing lane: __ballot_sync (" in t.last_error()
    assert "warp 1 has no lanes 0xffffff00" in t.last_error()


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (1, "wrote past the end of its 4 bytes of shared memory, at +4"),
        (8, "wrote past the end of its 4 bytes of shared memory, at +32"),
        (2000, "wrote past the end of its 4 bytes of shared memory, at +8000"),
        (-1, "wrote before the start of its shared memory, at -"),
        (-2000, "wrote before the start of its shared memory, at -"),
    ],
)
def test_shared_overrun_is_named(t: SelfTest, offset: int, message: str) -> None:
    assert t.call("run_shared_write", 0, c_int64(4)) == 0
    assert t.call("run_shared_write", offset, c_int64(4)) == LAUNCH_FAILURE
    assert t.last_error().startswith(f"kernel 'shared_write', block (1,0,0): {message}")


def test_shared_memory_is_sized_by_the_launch(t: SelfTest) -> None:
    assert t.call("run_shared_write", 0, c_int64(3)) == LAUNCH_FAILURE
    assert "shared_memory<T>() needs 4 bytes, the launch gave 3" in t.last_error()
    limit = 227 * 1024
    assert t.call("run_shared_write", limit // 4 - 1, c_int64(limit)) == 0
    assert t.call("run_shared_write", limit // 4, c_int64(limit)) == LAUNCH_FAILURE
    assert t.call("run_shared_write", 0, c_int64(limit + 1)) == INVALID_VALUE


def test_shared_memory_starts_poisoned_in_every_block(t: SelfTest) -> None:
    out = np.zeros(5 * 256, np.float32)
    assert t.call("run_shared_read", out, 5) == 0
    assert np.isnan(out).all()


# ---- AddressSanitizer, nvcc ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "place"),
    [
        ("'run_global_write', np.zeros(1000, np.int32), c_int64(1000)", "global_write_kernel"),
        ("'run_global_write', np.zeros(1000, np.int32), c_int64(-1)", "global_write_kernel"),
        ("'run_global_read', np.zeros(1000, np.int32), c_int64(1000), np.zeros(9)", "global_read_kernel"),
        ("'run_shared_write', 1, c_int64(4)", "shared_write_kernel"),
        ("'run_shared_write', -1, c_int64(4)", "shared_write_kernel"),
    ],
)
def test_asan_reports_the_access(call: str, place: str) -> None:
    done = self_test.run_under_asan(f"t.call({call})")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert place in done.stderr


def test_asan_is_silent_on_right_kernels_and_after_failures() -> None:
    done = self_test.run_under_asan(
        "for fault in (1, 3, 9):\n"
        "    assert t.call('run_fault', fault, np.zeros(80, np.int32)) == 719, fault\n"
        "    x = np.ones((3, 100), np.float32); y = np.zeros_like(x)\n"
        "    assert t.call('run_rms_norm', 0, x, y, 3, 100, 1024) == 0, t.last_error()\n"
        "    assert np.allclose(x, y)\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    list(pool.map(lambda _: t.call('run_rms_norm', 0, x, y, 3, 100, 256), range(20)))\n"
        "assert t.call('run_global_write', np.zeros(1000, np.int32), c_int64(999)) == 0\n"
        "assert t.call('run_shared_write', 2, c_int64(12)) == 0"
    )
    assert done.returncode == 0, done.stderr
    assert "AddressSanitizer" not in done.stderr


def test_sanitizers_report_a_misaligned_vector() -> None:
    call = "t.call('run_vector_read', data.view(np.int32), {}, np.zeros(4, np.int32))"
    data = "data = np.zeros(100, np.complex128)\n"  # numpy aligns its storage to 16 bytes
    assert self_test.run_under_asan(f"{data}assert {call.format(4)} == 0").returncode == 0
    done = self_test.run_under_asan(data + call.format(1))
    assert done.returncode != 0
    assert "misaligned address" in done.stderr


def test_asan_guards_the_storage_of_tensors() -> None:
    done = self_test.run_under_asan(
        "import torch\nt.call('run_global_write', torch.zeros(1000).numpy(), c_int64(1000))"
    )
    assert done.returncode != 0
    assert "global_write_kernel" in done.stderr


def test_torch_runs_under_asan() -> None:
    done = self_test.run_under_asan(
        "import torch\n"
        "assert torch.allclose(torch.ones(64, 64) @ torch.eye(64), torch.ones(64, 64))\n"
        "try:\n    torch.ones(2) @ torch.ones(3)\n"  # a C++ exception through torch
        "except RuntimeError as error:\n    print('raised')"
    )
    assert done.returncode == 0, done.stderr
    assert "raised" in done.stdout


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_same_source_compiles_for_gpus(architecture: str, tmp_path: Path) -> None:
    if not self_test.compile_with_nvcc(architecture, tmp_path):
        assert self_test.compile_self_test().exists()
