#!/usr/bin/env bash
# What the hardware counters say of each op's kernels: bytes, throughput, registers, occupancy, bank conflicts.
#   bash benchmarks/profile_ncu.sh OUTPUT.json [options of lightvlm bench ops]
# Default: every op at 8192 tokens, batch 1, sizes of the 7b model. Where ncu is missing or the counters are forbidden
# (ERR_NVGPUCTRPERM), or takes more than LIGHTVLM_PROFILE_SECONDS (75), the output has times by events and the computed
# roofline instead, and says so in "source" and "reason".
set -uo pipefail
out=${1:?usage: profile_ncu.sh OUTPUT.json [options of lightvlm bench ops]}
shift
[[ $out = /* ]] || out=$PWD/$out
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
metrics=$("$python" -c 'from lightvlm.bench.profile import METRICS; print(",".join(METRICS))') || exit 1

reason=''
if command -v ncu >/dev/null; then
    # The clocks stay as they are; kernels are measured between cudaProfilerStart and Stop alone.
    timeout --kill-after=5 "${LIGHTVLM_PROFILE_SECONDS:-75}" \
        ncu --target-processes all --clock-control none --profile-from-start off --nvtx --csv --page raw \
        --metrics "$metrics" --log-file "$work/kernels.csv" \
        "$python" -m lightvlm.bench.profile once "$work/calls.json" "$@" >"$work/log" 2>&1
    [ $? -ne 124 ] || reason='ncu took too long'
else
    reason='ncu is not installed'
fi
"$python" -m lightvlm.bench.profile report ncu "$work" --reason "$reason" "$@" >"$work/report.json" || exit 1
mv "$work/report.json" "$out"
