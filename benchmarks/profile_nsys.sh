#!/usr/bin/env bash
# Which kernels each op launches and how long they take, by NVTX range.
#   bash benchmarks/profile_nsys.sh OUTPUT.json [options of lightvlm bench ops]
# Default: every op at 8192 tokens, batch 1, sizes of the 7b model. Where nsys is missing, makes no report, or takes more
# than LIGHTVLM_PROFILE_SECONDS (45), the output has times by events and the computed roofline instead, and says so in
# "source" and "reason".
set -uo pipefail
out=${1:?usage: profile_nsys.sh OUTPUT.json [options of lightvlm bench ops]}
shift
[[ $out = /* ]] || out=$PWD/$out
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

reason=''
if command -v nsys >/dev/null; then
    {
        timeout --kill-after=5 "${LIGHTVLM_PROFILE_SECONDS:-45}" nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --output="$work/profile" \
            "$python" -m lightvlm.bench.profile once "$work/calls.json" "$@" &&
            nsys stats --report nvtx_kern_sum --format csv --output - "$work/profile.nsys-rep" >"$work/kernels.csv"
    } >"$work/log" 2>&1
else
    reason='nsys is not installed'
fi
"$python" -m lightvlm.bench.profile report nsys "$work" --reason "$reason" "$@" >"$work/report.json" || exit 1
mv "$work/report.json" "$out"
