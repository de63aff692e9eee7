#!/usr/bin/env bash
# Builds the release wheel: every arch that the kernels are written for, PTX for newer ones, the host module; then checks it.
#   scripts/build_release.sh [OUTPUT_FOLDER]      default dist/; MAX_JOBS bounds the compilers side by side
# Needs nvcc and a Python with torch (CPU will do), setuptools, cmake, ninja and pybind11: .venv after scripts/install.sh, or $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
# PTX 9.0 is what the driver compiles for devices that no entry serves: 10.3, 11.0, whatever comes.
arches="80-real;86-real;89-real;90a-real;90-virtual;100a-real;120-real"

start=$SECONDS
export LIGHTVLM_CUDA=on MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export CMAKE_ARGS="${CMAKE_ARGS:-} '-DCMAKE_CUDA_ARCHITECTURES=$arches'"
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
# A build folder of its own, so that everyday builds do not inherit its arches; files of an older build stay out of the wheel.
printf '[build]\nbuild_base = %s\n' "$PWD/build/release" >"$staging/build.cfg"
rm -rf build/release/lib.*
DIST_EXTRA_CONFIG="$staging/build.cfg" "$python" -m pip --disable-pip-version-check wheel -q \
    --no-build-isolation --no-deps -w "$staging" .
wheel=$(echo "$staging"/*.whl)
echo "built in $((SECONDS - start)) s with MAX_JOBS=$MAX_JOBS"
"$python" scripts/check_release.py "$wheel" --arches "$arches"
cp "$wheel" "$out/"
echo "$out/$(basename "$wheel")"
