#!/usr/bin/env bash
# Gives a wheel the tag of the oldest systems that it runs on: tools/repair_wheel.sh WHEEL FOLDER
set -euo pipefail
# Libraries that torch has loaded by then, of whatever version it is, are not packed
auditwheel repair --exclude 'libc10*.so' --exclude 'libtorch*.so' --wheel-dir "$2" "$1"
