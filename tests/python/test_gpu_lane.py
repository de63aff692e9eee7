"""benchmarks/*.sh with programs that only pretend: parts, limits, what fails, what is left out, what is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMI = "NVIDIA H200, 580.1, P0, 1980 MHz, 3201 MHz, 1980 MHz, 90.1 W, 31"
# Answers what the scripts ask of Python; FAIL is a word of a command line that fails, HANG of one that never ends.
PYTHON = """#!/bin/bash
[[ -z ${FAIL-} || "$*" != *$FAIL* ]] || { echo "no luck with $*"; exit 3; }
[[ -z ${HANG-} || "$*" != *$HANG* ]] || exec sleep 600
case "$*" in
    *get_device_capability*) echo 9.0 ;;
    '- '*) exec REAL "$@" ;;
    *'bench ops'*) echo '{"kind": "ops"}' ;;
    *'bench decoder'*) echo '{"kind": "decoder"}' ;;
    *'bench decode '*) echo '{"kind": "decode"}' ;;
    *'bench attention'*) echo '{"kind": "attention"}' ;;
    *'bench sparse'*) echo '{"kind": "sparse"}' ;;
    *'profile report'*) echo "{\\"tool\\": \\"$4\\"}" ;;
    *) echo "called: $*" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs that stands for a machine with a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "python3": PYTHON.replace("REAL", sys.executable),
        "cmake": '#!/bin/bash\n[[ -z ${FAIL-} || "$*" != *$FAIL* ]] || exit 3\necho "called: cmake $*"\n',
        "nvidia-smi": f"#!/bin/bash\necho '{SMI}'\n",
        "compute-sanitizer": '#!/bin/bash\n[[ -z ${FAIL-} || "$*" != *$FAIL* ]] || exit 99\necho "called: $*"\n',
        "nvcc": "#!/bin/bash\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n",
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
    return folder


def lane(
    machine: Path, *words: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Runs the lane on that machine; how it ended, and its summary."""
    out = machine.parent / "out"
    env = {
        **os.environ,
        "PATH": f"{machine}:{os.environ['PATH']}",
        "PYTHON": str(machine / "python3"),
        **environment,
    }
    command = [
        "bash",
        str(BENCHMARKS / "gpu_lane.sh"),
        *words[:-1],
        *([str(out), *words[-1].split()] if words else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    summary = out / "summary.json"
    return done, json.loads(summary.read_text()) if summary.exists() else {}


def by_part(summary: dict[str, Any]) -> dict[str, Any]:
    return {part["part"]: part for part in summary["parts"]}


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_all_parts_run_and_all_is_written(machine: Path) -> None:
    done, summary = lane(machine, "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary["failed"] == summary["not_run"] == []
    parts = by_part(summary)
    assert list(parts)[:4] == ["configure", "build", "install", "doctor"]
    assert {
        "tests-gpu",
        "tests-select",
        "ops",
        "sanitizer-racecheck",
        "attention",
        "nsys",
        "ncu",
        "decoder",
        "decode",
        "sparse",
    } <= parts.keys()
    assert all(part["status"] == 0 for part in parts.values())
    assert summary["arch"] == "9.0a"
    assert summary["nvcc"].startswith("13.0")
    assert summary["gpu"]["before"]["driver"] == "580.1"
    assert summary["gpu"]["after"]["clocks.sm"] == "1980 MHz"
    out = machine.parent / "out"
    assert json.loads((out / "ops.json").read_text()) == {"kind": "ops"}
    assert json.loads((out / "decode.json").read_text()) == {"kind": "decode"}
    assert json.loads((out / "sparse.json").read_text()) == {"kind": "sparse"}
    assert json.loads((out / "attention.json").read_text()) == {"kind": "attention"}
    profiles = json.loads((out / "profiles.json").read_text())
    assert profiles == {"nsys": {"tool": "nsys"}, "ncu": {"tool": "ncu"}}
    assert "==> build" in (out / "log.txt").read_text()
    files = list(out.iterdir())
    assert len(files) <= 8
    assert sum(path.stat().st_size for path in files) < 16 << 20


def test_one_failure_stops_nothing_else(machine: Path) -> None:
    done, summary = lane(machine, "tests sanitizer ops", FAIL="racecheck")
    assert done.returncode == 1
    assert summary["failed"] == ["sanitizer-racecheck"]
    assert by_part(summary)["sanitizer-racecheck"]["status"] == 99
    assert by_part(summary)["ops"]["status"] == by_part(summary)["sanitizer-memcheck"]["status"] == 0
    done, summary = lane(machine, "tests", FAIL="test_select.py")
    assert (done.returncode, summary["failed"]) == (1, ["tests-select"])
    assert "no luck" in done.stdout
    assert by_part(summary)["tests-importance"]["status"] == 0


def test_without_a_build_nothing_runs(machine: Path) -> None:
    done, summary = lane(machine, "tests ops", FAIL="--build")
    assert done.returncode == 1
    assert summary["failed"] == ["build"]
    assert summary["not_run"] == ["tests", "ops"]


def test_parts_can_be_chosen(machine: Path) -> None:
    _, summary = lane(machine, "profile")
    assert list(by_part(summary)) == ["configure", "build", "install", "doctor", "nsys", "ncu"]


def test_what_does_not_fit_is_not_run(machine: Path) -> None:
    done, summary = lane(machine, "--seconds", "0", "ops decoder")
    assert done.returncode == 0
    assert summary["not_run"] == ["configure", "ops", "decoder"]
    assert by_part(summary)["configure"]["reason"].startswith("not run: ")
    assert "called" not in done.stdout


def test_a_part_that_hangs_is_ended(machine: Path) -> None:
    done, summary = lane(machine, "tests", HANG="test_select.py", LIGHTVLM_LANE_TEST_SECONDS="15")
    assert done.returncode == 1
    assert summary["failed"] == ["tests-select"]
    assert by_part(summary)["tests-select"]["reason"].startswith("over its limit")
    assert by_part(summary)["tests-importance"]["status"] == 0


def test_a_dry_run_runs_nothing(machine: Path) -> None:
    done, summary = lane(machine, "--dry-run", "", FAIL="cmake")
    assert done.returncode == 0
    assert all(part["reason"].startswith("dry run") for part in summary["parts"])


@pytest.mark.parametrize("words", [("--frobnicate", ""), ("--seconds", "soon", ""), ("frobnicate",), ()])
def test_usage_errors(machine: Path, words: tuple[str, ...]) -> None:
    done, summary = lane(machine, *words)
    assert done.returncode == 2
    assert done.stderr
    assert not summary


def test_without_a_gpu_it_says_so(machine: Path) -> None:
    done, summary = lane(machine, "tests", FAIL="get_device_capability")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not summary


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_profiles_without_the_profiler(machine: Path, tool: str) -> None:
    """The script says why; what it makes of that is test_bench_profile.py's."""
    env = {**os.environ, "PATH": f"{machine}:/usr/bin:/bin", "PYTHON": str(machine / "python3")}
    out = machine.parent / f"{tool}.json"
    script = str(BENCHMARKS / f"profile_{tool}.sh")
    done = subprocess.run(["bash", script, str(out), "--op", "select"], env=env, check=False)
    assert done.returncode == 0
    assert json.loads(out.read_text()) == {"tool": tool}
    assert subprocess.run(["bash", script], env=env, capture_output=True, check=False).returncode != 0
    failing = subprocess.run(["bash", script, str(out)], env={**env, "FAIL": "profile report"}, check=False)
    assert failing.returncode == 1


def test_profile_with_the_profiler(machine: Path) -> None:
    """A program that pretends to be ncu: it runs what it is given, and writes one kernel to its log file."""
    (machine / "ncu").write_text(
        '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do [ "$1" != --log-file ] || log=$2; shift; done\n"$@" || exit 1\n'
        'printf \'"ID","Kernel Name","launch__registers_per_thread"\\n"","",""\\n"0","k","40"\\n\' >"$log"\n'
    )
    (machine / "ncu").chmod(0o755)
    out = machine.parent / "ncu.json"
    command = ["bash", str(BENCHMARKS / "profile_ncu.sh"), str(out)]
    options = ["--device", "cpu", "--op", "select", "--tokens", "8", "--model", "0.5b"]
    env = {**os.environ, "PATH": f"{machine}:/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["source"], result["reason"]) == ("ncu", None)
    assert [(kernel["kernel"], kernel["registers"]) for kernel in result["kernels"]] == [("k", 40)]
    assert {call["method"] for call in result["calls"]} == {"select"}
