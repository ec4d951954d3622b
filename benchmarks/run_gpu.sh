#!/usr/bin/env bash
# Everything there is to run on a machine with a GPU, in parts of under eight minutes each. Nothing is downloaded.
#
#     benchmarks/run_gpu.sh [build|tests|kl|divergences|linear|perturbation|ema|smart|sanitizer|report]...      (no name: all in this order)
#
#     build         the extension compiled in place; the environment and the card, as they are
#     tests         the suite, without what stands in for a card: Triton's interpreter, and PTX executed on the CPU
#     kl, divergences, linear, perturbation, ema, smart    the benchmarks beside eager, torch.compile and Liger, where that is installed
#     sanitizer     the kernels under compute-sanitizer: memory, races, synchronisation
#     report        what the compiled code predicts, to hold the figures against
#
# Each part leaves its output, and a benchmark its JSON and figures, in OUT (benchmarks/results/<card>), and packs all
# that is there into OUT.tar.gz. A part that fails, or takes longer, keeps none of the others from running.
#
#     PYTHON=python3.12   another interpreter than `python`
#     DEVICE=cpu          a rehearsal without a GPU: all but the sanitizer, on the CPU
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
device=${DEVICE:-cuda}
all=(build tests kl divergences linear perturbation ema smart sanitizer report)
limit=470 # seconds

(($#)) || set -- "${all[@]}"
for part; do
    if [[ ! " ${all[*]} " == *" $part "* ]]; then
        echo "run_gpu.sh: got '$part', expected one of: ${all[*]}" >&2
        exit 2
    fi
done
if [ "$device" = cpu ]; then
    card=cpu
elif ! card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())'); then
    echo "run_gpu.sh: $python has no torch that finds a GPU (DEVICE=cpu rehearses without one)" >&2
    exit 1
fi
out=${OUT:-benchmarks/results/$card}
mkdir -p "$out"
failed=()

run() { # NAME COMMAND...: what it prints goes to OUT/NAME.txt too
    local name=$1
    shift
    echo "== $name ($(date -u +%H:%M:%S))"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    ((status == 124)) && echo "$name: cut off after $limit s" | tee -a "$out/$name.txt"
    ((status == 0)) || failed+=("$name")
}

build() {
    # nothing is fetched: what pip would take to build with is installed already
    run build env PIP_NO_INDEX=1 "$python" -m pip install --no-build-isolation --no-deps -e .
    run environment "$python" -m smart_kernels.environment
    [ "$device" = cpu ] || run nvidia-smi nvidia-smi -q -d CLOCK,POWER,ECC
}
tests() {
    run tests "$python" -m pytest -q -p no:cacheprovider tests/test_on_a_gpu.py tests \
        --ignore-glob='tests/test_triton_*' --ignore-glob='tests/test_ptx_*' --ignore-glob='tests/test_gpu_*' \
        --ignore=tests/test_aot.py
}
bench() { run "bench_$1" "$python" "benchmarks/bench_$1.py" --device "$device" --out "$out" "${@:2}"; }
kl() { bench kl --quick; }
divergences() { bench divergences; }
linear() { bench linear --shapes 4096x2048x50257 8192x4096x128256 --dtypes bf16; }
perturbation() { bench perturbation; }
ema() { bench ema; }
smart() { bench smart; }
sanitizer() {
    local checker tool limit=$((limit / 3))
    if ! checker=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"); then
        echo "sanitizer: left out, as there is no compute-sanitizer" | tee "$out/sanitizer.txt"
        return
    fi
    for tool in memcheck racecheck synccheck; do
        # each tensor in memory of its own, so that a read beyond it is seen
        run "sanitizer_$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$checker" --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q -p no:cacheprovider tests/test_on_a_gpu.py -k 'not replayed'
    done
}
report() {
    local target=sm_90 # what the card is nearest to
    [ "$device" = cpu ] || target=$("$python" -c 'import torch; p = torch.cuda.get_device_properties(0)
hip = torch.version.hip and p.gcnArchName.split(":")[0]
print(hip or f"sm_{max(c for c in (80, 90, 100) if c <= max(80, 10 * p.major))}")')
    run gpu_report "$python" benchmarks/gpu_report.py --targets "$target" --out "$out"
}

for part; do
    if [ "$part" = sanitizer ] && [ "$device" = cpu ]; then
        echo "sanitizer: left out, as it needs a GPU"
        continue
    fi
    "$part"
done
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
echo "written: $out.tar.gz"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
