#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build with nvcc, GPU tests, compute-sanitizer on small cases, benchmarks.
#   bash benchmarks/gpu_lane.sh OUTPUT_FOLDER
# Needs torch with CUDA, nvcc, cmake and ninja; installs nothing. Every part runs even if one before it failed; the exit status
# is the number of failed parts, and summary.json in the output folder says which.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_lane.sh OUTPUT_FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0
declare -a rows=()

part() { # part NAME SECONDS COMMAND...: run it with a limit, keep its log, note how it ended
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || { failed=$((failed + 1)); tail -n 15 "$out/$name.log"; }
    echo "$name: exit $status, $((SECONDS - start)) s"
    rows+=("{\"part\": \"$name\", \"exit\": $status, \"seconds\": $((SECONDS - start))}")
}

arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || { echo "no CUDA device"; exit 1; }
[ "$arch" = 9.0 ] && arch=9.0a
export TORCH_CUDA_ARCH_LIST=$arch LIGHTVLM_CUDA=on PYTHONPATH=$PWD:$PWD/python PYTHONUNBUFFERED=1
prefix=build/gpu-lane

part configure 120 cmake -S . -B "$prefix" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DLIGHTVLM_CUDA=on
part build 400 cmake --build "$prefix"
part install 60 cmake --install "$prefix" --prefix .
part doctor 60 "$python" -m lightvlm doctor --json
part tests 200 "$python" -m pytest -q -m gpu tests
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        part "sanitizer-$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu tests/ops -k sanitizer
    done
fi
for kind in ops decoder; do
    part "bench-$kind" 150 bash -c "'$python' -m lightvlm bench $kind --device cuda --json >'$out/$kind.json'"
done

printf '{"commit": "%s", "gpu": "%s", "driver": "%s", "parts": [%s]}\n' "$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null)" "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)" \
    "$(IFS=,; echo "${rows[*]}")" >"$out/summary.json"
exit $failed
