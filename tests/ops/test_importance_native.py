"""importance below its wrapper: raw calls, workspace, opcheck, fake tensors, levels of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightvlm_ext import _library, ops
from lightvlm_ext._importance_args import check_importance
from lightvlm_ext.ops.importance import _workspace
from tests.emulation.build import Control
from tests.ops.backends import EMULATED, EMULATED_NAMESPACE, emulation_library, load_emulation

Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 2, 8)


def raw_arguments(query: torch.Tensor, key: torch.Tensor, /, **changed: Any) -> list[Any]:
    """Arguments of the compiled op, in order."""
    batch, tokens = key.shape[:2]
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "lse": None,
        "scale": 0.5,
        "causal": True,
        "row_pos": None,
        "lens": None,
        "leftpad": None,
        "rows": "mean",
        "heads": "mean",
        "axis": "key",
        "score": torch.empty(batch, tokens),
        "visible": torch.empty(batch, tokens, dtype=torch.int32),
        "workspace": None,
        "error": None,
    }
    return list({**arguments, **changed}.values())


BAD_CALLS: list[dict[str, Any]] = [
    {"query": Q.double()},
    {"query": Q[0]},
    {"key": K.half()},
    {"key": K[:1]},
    {"key": K[:, :, :1].repeat(1, 1, 3, 1)},
    {"key": K.transpose(2, 3).contiguous().transpose(2, 3)},
    {"lse": torch.zeros(2, 4, 2)},
    {"lse": torch.zeros(2, 4, 3).double()},
    {"lse": torch.zeros(2, 4, 3), "axis": "query", "score": torch.empty(2, 3)},
    {"row_pos": torch.zeros(2, 4, dtype=torch.int32)},
    {"row_pos": torch.zeros(2, 3, dtype=torch.int64)},
    {"lens": torch.zeros(1, dtype=torch.int32)},
    {"leftpad": torch.zeros(2)},
    {"rows": "all"},
    {"heads": "all"},
    {"axis": "all"},
    {"score": torch.empty(2, 5)},
    {"score": torch.empty(2, 6).double()},
    {"score": torch.empty(6, 2).T},
    {"visible": torch.empty(2, 6)},
]


@pytest.mark.parametrize("changed", BAD_CALLS, ids=lambda changed: "-".join(changed))
def test_raw_calls_are_checked(changed: dict[str, Any]) -> None:
    load_emulation()
    _library.load()
    for namespace in ("lightvlm", EMULATED_NAMESPACE):
        with pytest.raises((ValueError, RuntimeError)):
            getattr(torch.ops, namespace).importance.default(*raw_arguments(Q, K, **changed))


def least_words(query: torch.Tensor, key: torch.Tensor, **changed: Any) -> int:
    """Words without which the emulated op refuses to run, from its message."""
    op = getattr(torch.ops, EMULATED_NAMESPACE).importance.default
    with pytest.raises((ValueError, RuntimeError), match="workspace: must be given") as caught:
        op(*raw_arguments(query, key, **changed))
    return int(str(caught.value).split("at least ")[1].split()[0])


def test_workspace_of_the_least_size_emulated() -> None:
    """Probe tiles then take turns, and the result is the same."""
    load_emulation()
    query, key = torch.randn(2, 70, 4, 8), torch.randn(2, 600, 2, 8)
    words = least_words(query, key)
    op = getattr(torch.ops, EMULATED_NAMESPACE).importance.default
    too_small = torch.empty(words - 1, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=f"workspace: has {words - 1} elements"):
        op(*raw_arguments(query, key, workspace=too_small))
    control = Control(emulation_library())
    scores, turns = [], []
    for size in (words, 10 * words):
        score = torch.empty(2, 600)
        before = control.launch_count("importance_lse")
        op(*raw_arguments(query, key, score=score, workspace=torch.full((size,), -1, dtype=torch.int32)))
        turns.append(control.launch_count("importance_lse") - before)
        scores.append(score)
    assert turns == [2, 1]  # 2 x 70 probes are 2 parts of 128
    assert torch.equal(*scores)


@pytest.mark.parametrize("axis", ["key", "query"])
@pytest.mark.parametrize("own", [True, False])
def test_workspace_is_large_enough_and_no_matrix(axis: str, own: bool) -> None:
    for batch, window, tokens, query_heads, key_heads in (
        (1, 1, 1, 1, 1),
        (1, 8192, 8192, 28, 4),
        (2, 64, 131072, 28, 4),
        (8, 16, 4096, 32, 32),
        (1, 0, 7, 2, 1),
        (3, 5, 0, 2, 1),
    ):
        if axis == "query" and not own:
            continue
        query = torch.empty(batch, window, query_heads, 64, device="meta")
        key = torch.empty(batch, tokens, key_heads, 64, device="meta")
        lse = None if own else torch.empty(batch, query_heads, window, device="meta")
        options = dict.fromkeys(("scale", "row_pos", "lens", "leftpad"))
        args = check_importance(
            query, key, lse=lse, causal=True, rows="sum", heads="sum", axis=axis, **options
        )
        workspace = _workspace(args)
        assert workspace is not None
        linear = batch * query_heads * (window + tokens)
        # Partial sums of one probe tile of 64 for every 512 targets, or 16 MiB.
        targets = tokens if axis == "key" else window
        parts = max(4 << 20, 2 * batch * query_heads * 64 * (targets // 512 + 1))
        assert workspace.numel() <= 5 * linear + parts + 3 * batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", ["mean", "none"])
def test_the_wrapper_gives_at_least_the_least_workspace(dtype: torch.dtype, heads: str) -> None:
    load_emulation()
    for batch, window, tokens, group in (
        (1, 1, 1, 1),
        (2, 3, 513, 2),
        (1, 70, 64, 4),
        (1, 5, 1025, 6),
        (3, 0, 7, 2),
        (1, 2, 40000, 1),
        (2, 300, 20, 1),
        (270, 1, 3, 1),
    ):
        query = torch.empty(batch, window, 2 * group, 8, dtype=dtype)
        key = torch.empty(batch, tokens, 2, 8, dtype=dtype)
        for lse in (None, torch.empty(batch, 2 * group, window)):
            for row_pos in (None, torch.empty(batch, window, dtype=torch.int32)):
                given = {"lse": lse, "row_pos": row_pos, "heads": heads}
                options = dict.fromkeys(("scale", "lens", "leftpad"))
                args = check_importance(query, key, causal=True, rows="sum", axis="key", **given, **options)
                with _library.use_namespace(EMULATED_NAMESPACE):
                    workspace = _workspace(args)
                assert workspace is not None
                score = torch.empty((batch, 2, tokens) if heads == "none" else (batch, tokens))
                least = least_words(query, key, score=score, **given)
                assert workspace.numel() >= least
                if lse is not None:
                    assert workspace.numel() == least


LAUNCHES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["lse", "merge", "fold", "heads"]),
    ({"lse": True}, ["fold", "heads"]),
    ({"lse": True, "row_pos": True}, ["plan", "fold", "heads"]),
    ({"half": True}, ["lse", "fold", "heads"]),
    ({"half": True, "heads": "none"}, ["lse", "fold"]),
    ({"half": True, "lse": True}, ["fold", "heads"]),
    ({"half": True, "lse": True, "heads": "none", "row_pos": True}, ["fold"]),
    ({"half": True, "lse": True, "batch": 300}, ["fold"]),
    ({"half": True, "window": 140, "row_pos": True}, ["lse", "merge", "fold", "heads"]),
    ({"half": True, "axis": "query", "row_pos": True}, ["plan", "lse", "merge", "fold", "heads"]),
]


@pytest.mark.parametrize(("case", "expected"), LAUNCHES)
def test_launches_emulated(case: dict[str, Any], expected: list[str]) -> None:
    """Which kernels run, and that each runs once."""
    load_emulation()
    control = Control(emulation_library())
    batch, window = case.get("batch", 2), case.get("window", 3)
    dtype = torch.float16 if case.get("half") else torch.float32
    query, key = torch.randn(batch, window, 4, 8).to(dtype), torch.randn(batch, 6, 2, 8).to(dtype)
    options = {name: case[name] for name in ("heads", "axis") if name in case}
    if case.get("lse"):
        options["lse"] = torch.zeros(batch, 4, window)
    if case.get("row_pos"):
        options["row_pos"] = torch.zeros(batch, window, dtype=torch.int32)
    names = ["plan", "lse", "merge", "fold", "heads"]
    before = [control.launch_count(f"importance_{name}") for name in names]
    EMULATED.importance(query, key, **options)
    after = [control.launch_count(f"importance_{name}") for name in names]
    ran = {name: b - a for name, a, b in zip(names, before, after, strict=True)}
    assert ran == {name: int(name in expected) for name in names}


@pytest.mark.parametrize("heads", ["mean", "none"])
def test_opcheck(heads: str) -> None:
    ops.importance(Q, K)
    score = torch.empty(2, 2, 6) if heads == "none" else torch.empty(2, 6)
    arguments = raw_arguments(
        Q,
        K,
        heads=heads,
        score=score,
        lse=torch.zeros(2, 4, 3) if heads == "none" else None,
        lens=torch.tensor([6, 4], dtype=torch.int32),
        row_pos=torch.zeros(2, 3, dtype=torch.int32),
    )
    torch.library.opcheck(torch.ops.lightvlm.importance.default, tuple(arguments))


def test_fake_tensors() -> None:
    half = (Q.half(), K.half())
    with FakeTensorMode() as mode:
        query, key = (mode.from_tensor(x) for x in half)
        score, visible = ops.importance(query, key, return_visible=True)
        each = ops.importance(query, key, heads="none")
        per_row = ops.importance(query, key, axis="query")
    assert score.shape == visible.shape == (2, 6)
    assert each.shape == (2, 2, 6)
    assert per_row.shape == (2, 3)
    assert score.dtype == each.dtype == per_row.dtype == torch.float32
    assert visible.dtype == torch.int32


PROGRAM = """
import sys, torch
from lightvlm_ext import ops
torch.manual_seed(0)
scores = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for window, heads in ((1, 4), (7, 4), (40, 2)):
        query, key = torch.randn(2, window, heads, 70).to(dtype), torch.randn(2, 101, 2, 70).to(dtype)
        scores.append(ops.importance(query, key))
        scores.append(ops.importance(query, key, lse=torch.full((2, heads, window), 5.0)))
        scores.append(ops.importance(query, key, axis="query"))
torch.save(scores, sys.argv[1])
"""


def test_every_level_of_the_cpu(tmp_path: Path) -> None:
    """Levels differ in who fuses a multiply and an add, and in how pairs of bfloat16 are summed."""
    scores = {}
    for level in ("avx512_bf16", "avx512", "avx2", "portable"):
        out = tmp_path / f"{level}.pt"
        environment = {**os.environ, "LIGHTVLM_CPU_LEVEL": level}
        root = str(Path(__file__).resolve().parents[2])
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(out)], check=True, env={**environment, "PYTHONPATH": root}
        )
        scores[level] = torch.load(out)
    for best, *others in zip(*scores.values(), strict=True):
        for other in others:
            torch.testing.assert_close(other, best, rtol=1e-5, atol=1e-7)
