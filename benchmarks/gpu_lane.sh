#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, memory checkers, benchmarks, profiles.
#   bash benchmarks/gpu_lane.sh [--seconds N] [--dry-run] OUTPUT_FOLDER [PART ...]
# Needs torch with CUDA, nvcc, cmake and ninja; installs nothing and leaves the device's settings alone. Each part has a
# limit of its own, and all share N seconds (default 570, or LIGHTVLM_LANE_SECONDS); parts come in the order of their
# worth, and what no longer fits is noted as "not run". One that fails stops none of the others.
#   parts: tests ops sanitizer attention profile decoder decode sparse   (build and doctor come first if anything needs them)
# A second call with the parts that were not run goes on from the same build. --dry-run runs nothing and lists the parts.
# Output, at most eight files: summary.json, log.txt (with what ptxas says of each kernel), ops.json, attention.json,
# decoder.json, decode.json, sparse.json, profiles.json.
# Exit status: 0 if every part that ran did well, 1 if not, 2 on a usage error.
set -uo pipefail

usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

seconds=${LIGHTVLM_LANE_SECONDS:-570} dry='' out=''
declare -a wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --seconds)
            [ $# -ge 2 ] || usage
            seconds=$2
            shift 2
            ;;
        --dry-run) dry=yes && shift ;;
        -*) usage ;;
        *) if [ -z "$out" ]; then out=$1; else wanted+=("$1"); fi && shift ;;
    esac
done
[[ $out && $seconds =~ ^[0-9]+$ ]] || usage
known=(tests ops sanitizer attention profile decoder decode sparse)
for part in "${wanted[@]}"; do
    [[ " ${known[*]} " == *" $part "* ]] || { echo "gpu_lane.sh: no part $part; there are ${known[*]}" >&2; exit 2; }
done
[ ${#wanted[@]} -gt 0 ] || wanted=("${known[@]}")

out=$(mkdir -p "$out" && cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
prefix=build/gpu-lane
notes=$(mktemp -d) # one file a part: a line of JSON; logs beside them
trap 'rm -rf "$notes"' EXIT

left() { echo $((seconds - SECONDS)); }

note() { # note NAME STATUS SECONDS [REASON]
    local order
    order=$(find "$notes" -name '*.part' | wc -l)
    printf '{"part": "%s", "status": %s, "seconds": %s, "reason": "%s"}\n' "$1" "$2" "$3" "${4:-}" \
        >"$notes/$(printf %03d "$order")-$1.part"
    echo "$1: ${4:-exit $2}, $3 s"
}

# part NAME LEAST MOST COMMAND...: run it for at most MOST seconds, or what is left; not at all if that is less than LEAST.
part() {
    local name=$1 least=$2 limit=$3 start=$SECONDS status reason=''
    shift 3
    if [ "$(left)" -lt "$least" ]; then
        note "$name" null 0 "not run: $(left) s were left, it needs $least"
        return 1
    fi
    [ "$(left)" -ge "$limit" ] || limit=$(left)
    if [ "$dry" ]; then
        note "$name" null 0 "dry run: ${*//\"/}"
        return 0
    fi
    timeout --kill-after=5 "$limit" "$@" >"$notes/$name.log" 2>&1
    status=$?
    [ $status -ne 124 ] && [ $status -ne 137 ] || reason="over its limit of $limit s"
    note "$name" $status $((SECONDS - start)) "$reason"
    [ $status -eq 0 ] || tail -n 12 "$notes/$name.log" | cut -c -300
    return $status
}

asked() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

gpu_state() {
    nvidia-smi --query-gpu=name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu \
        --format=csv,noheader 2>/dev/null | head -n 1
}

run_build() {
    part configure 20 120 cmake -S . -B "$prefix" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
        -DLIGHTVLM_CUDA=on -DLIGHTVLM_EMULATION=OFF &&
        part build 30 420 cmake --build "$prefix" &&
        part install 5 60 cmake --install "$prefix" --prefix . || return 1
    part doctor 10 60 "$python" -m lightvlm doctor --json || true # what is wrong there shows in the parts too
}

# Each op's tests in a process of their own, side by side: a kernel that takes its context down takes no other test along.
run_tests() {
    local file name
    for file in tests/ops/test_gpu.py tests/ops/test_small_cases.py tests/python/test_decode_gpu.py \
        tests/python/test_methods_gpu.py tests/python/attention/test_attention_gpu.py tests/ops/test_*.py; do
        name=tests-$(basename "$file" .py | sed s/^test_//)
        # Those over the tiers, and those for a GPU alone; those named first, once.
        if [ -e "$notes/$name.begun" ] || ! grep -qE 'backend: Backend|mark\.gpu' "$file"; then continue; fi
        touch "$notes/$name.begun"
        while [ "$(jobs -rp | wc -l)" -ge "${LIGHTVLM_LANE_JOBS:-6}" ]; do wait -n; done
        # Not the raw calls: their tests compare with the emulated kernels, which would have to be built.
        part "$name" 15 "${LIGHTVLM_LANE_TEST_SECONDS:-180}" env LIGHTVLM_EXAMPLES=20 \
            "$python" -m pytest -q -m gpu -k 'not raw_op_calls' -p no:cacheprovider "$file" &
    done
    wait
}

# Every op once, at one more than its tiles. Without torch's caching allocator each tensor is an allocation of its own, so
# that an access beyond it is seen.
run_sanitizer() {
    local tool
    if ! command -v compute-sanitizer >/dev/null && [ ! "$dry" ]; then
        note sanitizer null 0 "not run: compute-sanitizer is not installed"
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        part "sanitizer-$tool" 30 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 99 --print-limit 20 "$python" -m pytest -q -m gpu -p no:cacheprovider \
            tests/ops/test_small_cases.py -k "sanitizer and (bfloat16 or float32)" &
    done
    wait
}

# Half of what is left if other parts come after it. The benchmark itself ends a little before its limit, with a result.
run_ops() {
    local most later
    most=$(left)
    for later in sanitizer attention profile decoder decode sparse; do
        if asked $later; then most=$((most / 2)) && break; fi
    done
    part ops 40 "$most" bash -c \
        "'$python' -m lightvlm bench ops --device cuda --seconds $((most > 60 ? most - 25 : 35)) --json >'$out/ops.json'"
}

run_attention() {
    part attention 30 90 bash -c "'$python' -m lightvlm bench attention --device cuda --model 7b \
        --seconds 60 --json >'$out/attention.json'"
}

run_profile() {
    part nsys 30 90 bash benchmarks/profile_nsys.sh "$notes/nsys.json"
    part ncu 30 120 bash benchmarks/profile_ncu.sh "$notes/ncu.json"
    "$python" - "$notes" "$out/profiles.json" <<'EOF'
import json, pathlib, sys

folder, target = map(pathlib.Path, sys.argv[1:])
found = {tool: folder / f"{tool}.json" for tool in ("nsys", "ncu")}
profiles = {tool: json.loads(path.read_text()) for tool, path in found.items() if path.exists() and path.stat().st_size}
if profiles:
    target.write_text(json.dumps(profiles))
EOF
}

run_decoder() {
    part decoder 40 150 bash -c "'$python' -m lightvlm bench decoder --device cuda \
        --method all --keep 0.35 0.15 0.03 --json >'$out/decoder.json'"
}

# As for the ops: a little before the limit it ends, and what is left is skipped.
run_decode() {
    local most
    most=$(($(left) < 330 ? $(left) : 330))
    part decode 60 "$most" bash -c "'$python' -m lightvlm bench decode --device cuda --loop --geometry qwen2.5-vl-7b \
        --tokens 8192 32768 --batch 1 8 32 --seconds $((most > 90 ? most - 45 : 45)) --json >'$out/decode.json'"
}

run_sparse() {
    local most
    most=$(($(left) < 240 ? $(left) : 240))
    part sparse 60 "$most" bash -c "'$python' -m lightvlm bench sparse --device cuda --geometry qwen2.5-vl-7b \
        --seconds $((most > 90 ? most - 45 : 45)) --json >'$out/sparse.json'"
}

arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || arch=''
if [ -z "$arch" ] && [ ! "$dry" ]; then
    echo "gpu_lane.sh: torch has no CUDA device here" >&2
    exit 1
fi
[ "$arch" = 9.0 ] && arch=9.0a
export TORCH_CUDA_ARCH_LIST=$arch LIGHTVLM_CUDA=on PYTHONPATH=$PWD:$PWD/python PYTHONUNBUFFERED=1
unset LIGHTVLM_LIBRARY LIGHTVLM_EMULATION_LIBRARY

before=$(gpu_state)
if run_build; then
    for name in "${known[@]}"; do
        asked "$name" && "run_$name"
    done
else
    for name in "${wanted[@]}"; do note "$name" null 0 "not run: the build did not succeed"; done
fi
after=$(gpu_state)

nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$prefix/CMakeCache.txt" 2>/dev/null)
{
    for log in "$notes"/*.log; do
        [ ! -e "$log" ] || { echo "==> $(basename "$log" .log)"; tail -c 200000 "$log"; echo; }
    done
    echo "==> ptxas"
    find "$prefix" -name '*.ptxas' -exec cat {} + 2>/dev/null | head -c 4000000
} >"$out/log.txt"
"$python" - "$notes" "$before" "$after" "$("${nvcc:-nvcc}" --version 2>/dev/null | sed -n 's/.*release //p')" \
    "$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)" "$arch" >"$out/summary.json" <<'PYTHON'
import json, pathlib, sys

folder, before, after, nvcc, commit, arch = sys.argv[1:]
parts = [json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).glob("*.part"))]
try:
    import torch

    torch_version = torch.__version__
except ImportError:
    torch_version = None
fields = ("name", "driver", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power", "temperature")


def state(line):
    return dict(zip(fields, (value.strip() for value in line.split(",")))) if line else None


summary = {"commit": commit, "torch": torch_version, "nvcc": nvcc or None, "arch": arch or None}
summary |= {"gpu": {"before": state(before), "after": state(after)}, "parts": parts}
summary["failed"] = [part["part"] for part in parts if part["status"]]
summary["not_run"] = [part["part"] for part in parts if part["status"] is None]
print(json.dumps(summary, indent=1))
sys.exit(bool(summary["failed"]))
PYTHON
