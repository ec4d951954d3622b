#!/usr/bin/env bash
# Everything there is to run on a machine with a GPU: tests, then all benchmarks on the device, then the predictions.
#
#     benchmarks/run_gpu.sh [FOLDER]      (PYTHON=... for another interpreter than `python`)
#
# Tables, JSON and figures are written to FOLDER (benchmarks/results/gpu) and packed into FOLDER.tar.gz. A part that
# fails is named at the end and keeps none of the others from running.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
out=${1:-benchmarks/results/gpu}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "run_gpu.sh: $python has no torch that finds a GPU" >&2
    exit 1
fi
"$python" -c 'import liger_kernel' 2>/dev/null || echo "Without Liger as a peer: pip install --no-deps liger-kernel"

mkdir -p "$out"
failed=()
part() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
}

part environment "$python" -m smart_kernels.environment
part nvidia-smi nvidia-smi -q -d CLOCK,POWER,ECC
part tests "$python" -m pytest -q
for bench in kl perturbation ema smart; do
    part "bench_$bench" "$python" "benchmarks/bench_$bench.py" --device cuda --full --out "$out"
done
part gpu_report "$python" benchmarks/gpu_report.py --out "$out"

tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
echo "written: $out.tar.gz"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
