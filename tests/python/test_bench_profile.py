"""What becomes of a profiler's output, and of none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightvlm.bench import profile

CALL = {"method": "select", "case": "1 x 8", "range": "select | 1 x 8", "bytes": 8, "flops": 0,
        "floor_microseconds": 2.0, "floor_by": "bytes"}  # fmt: skip
OTHER = {**CALL, "case": "none", "range": "select | none"}


def quoted(*fields: str) -> str:
    return ",".join(f'"{one}"' for one in fields)


KERNEL, RANGE = "void lightvlm::select_kernel<float>(Params)", "<default domain>:select | 1 x 8"
NAMES = ["ID", "Kernel Name", "Block Size", "Grid Size", "thread Domain:Push/Pop_Range:PL_Type"]
FIGURES = ["dram__bytes_read.sum", "gpu__time_duration.sum", "launch__registers_per_thread"]
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
NCU = "\n".join(
    [
        "==PROF== Connected to process 7",
        '==PROF== Profiling "select_kernel" - 0: 0%....100% - 3 passes',
        quoted(*NAMES, *FIGURES, SM),
        quoted("", "", "", "", "", "Kbyte", "usecond", "register/thread", "%"),
        quoted("0", KERNEL, "(512, 1, 1)", "(2, 1, 1)", RANGE, "1,234.5", "3.5", "40", "12.25"),
        quoted("1", KERNEL, "(512, 1, 1)", "(2, 1, 1)", RANGE, "0.5", "0.5", "40", "n/a"),
        quoted("2", "void at::native::fill", "(1, 1, 1)", "(1, 1, 1)", "", "64", "1", "8", "0"),
    ]
)
NSYS = """Generating SQLite file p.sqlite from p.nsys-rep
NVTX Range,Style,PID,TID,NVTX Inst,Kern Inst,Total Time (ns),Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Kernel Name
:select | 1 x 8,PushPop,7,7,1,2,4000,2000.0,2000.0,1500,2500,10.0,"void lightvlm::select_kernel<float, 4>(Params)"
:something else,PushPop,7,7,1,1,9000,9000.0,9000.0,9000,9000,0.0,other
"""


def report(tool: str, folder: Path, *options: str) -> int:
    small = ["--device", "cpu", "--op", "select", "--tokens", "8", "--rounds", "2", "--model", "0.5b"]
    return profile.main(["report", tool, str(folder), *small, *options])


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("tool", "text"), [("ncu", NCU), ("nsys", NSYS)])
def test_kernels_are_read_and_set_beside_the_floor(
    tool: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "calls.json").write_text(json.dumps([CALL, OTHER]))
    (tmp_path / "kernels.csv").write_text(text)
    assert report(tool, tmp_path) == 0
    result = found(capsys)
    assert (result["source"], result["reason"]) == (tool, None)
    first, second = result["calls"]
    assert first["kernel_microseconds"] == pytest.approx(4.0)
    assert first["share_of_floor"] == pytest.approx(0.5)
    assert (second["kernel_microseconds"], second["kernels"]) == (None, 0)
    assert result["kernels"][0]["kernel"].startswith("void lightvlm::select_kernel<float")


def test_ncu_figures_have_their_units() -> None:
    first, second, third = profile.read_ncu(NCU, [CALL])
    assert first["dram_bytes_read"] == pytest.approx(1_234_500)
    assert first["nanoseconds"] == pytest.approx(3500)
    assert (first["registers"], first["sm_percent"]) == (40, 12.25)
    assert first["grid"] == "(2, 1, 1)"
    assert second["sm_percent"] is None
    assert (first["range"], third["range"]) == ("select | 1 x 8", None)
    assert "tensor_percent" not in first


@pytest.mark.parametrize(
    ("tool", "text"), [("ncu", ""), ("nsys", "SKIPPED: no kernels\n"), ("ncu", '"ID"\n""\n')]
)
def test_without_kernels_there_are_events_and_a_reason(
    tool: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels.csv").write_text(text)
    (tmp_path / "log").write_text("starting\n\nit broke\n")
    assert report(tool, tmp_path) == 0
    result = found(capsys)
    assert (result["kind"], result["tool"], result["source"]) == ("profile", tool, "events and roofline")
    assert result["reason"] == f"{tool} reported no kernel: it broke"
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert report(tool, tmp_path, "--reason", "it is not installed") == 0
    assert found(capsys)["reason"] == "it is not installed"


def test_forbidden_counters_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ncu lists the kernels even so, with nothing to say about them."""
    (tmp_path / "calls.json").write_text("[{")
    (tmp_path / "kernels.csv").write_text(
        "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n" + NCU
    )
    assert report("ncu", tmp_path) == 0
    result = found(capsys)
    assert "ERR_NVGPUCTRPERM" in result["reason"]
    assert result["source"] == "events and roofline"


def test_once_says_what_it_called(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    options = ["--device", "cpu", "--op", "gather_tokens", "--tokens", "8", "--model", "0.5b"]
    assert profile.main(["once", str(path), *options]) == 0
    (call,) = json.loads(path.read_text())
    assert call["method"] == "gather_tokens"
    assert call["range"] == f"gather_tokens | {call['case']}"
    assert call["floor_microseconds"] > 0
