#!/usr/bin/env bash
# Runs the CPU kernels' tests on a build whose every access is watched, and ends with an error at the first report:
#
#     tools/sanitize.sh address [PYTEST ARGUMENTS]    memory out of bounds or freed, undefined arithmetic
#     tools/sanitize.sh thread [PYTEST ARGUMENTS]     data races
#
# Needs GCC and a Python (PYTHON=... for another than `python`) with the package's tests installed. Without arguments it
# runs some tests with this machine's instruction set, and some hundred cases of the fuzzer with each.
set -euo pipefail
kind=$1
shift
python=$(command -v "${PYTHON:-python}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests=("$PWD"/tests/test_{divergence,perturbation,ema,blocks}.py)
runtime() { "${CXX:-c++}" -print-file-name="lib$1"; }

case $kind in
address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    # Python and torch keep memory to their end. torch's libraries each bring their own copy of some C++ templates.
    export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
    preload="$(runtime asan.so) $(runtime stdc++.so.6)"
    default=("${tests[@]}" -k "written or table or masked_positions or two_to_the_31 or expanded or results_that_live")
    # reads beyond the end of a shadow
    fault="import torch; from smart_kernels.ops._chunks import make_table; x, y = torch.zeros(8), torch.ones(8)
table = make_table([x], [y]); table[3] += 100; torch.ops.smart_kernels.ema_update_chunks(table, 1, 0.5, None, None)"
    ;;
thread)
    flags="-fsanitize=thread"
    # Python and torch are not instrumented: with one thread of OpenMP, all that run at the same time are started here
    export TSAN_OPTIONS="halt_on_error=1:suppressions=$work/suppressions" OMP_NUM_THREADS=1
    # glibc gives a thread's memory back when another takes over its stack, behind a lock that is not seen
    echo "race:_dl_deallocate_tls" >"$work/suppressions"
    "${CXX:-c++}" -O1 -g1 $flags -std=c++20 -fPIC -shared tools/parallel_for.cpp -o "$work/parallel_for.so"
    preload="$(runtime tsan.so) $(runtime stdc++.so.6) $work/parallel_for.so"
    default=("${tests[@]}" -k "threads or same_time")
    # two threads change a tensor at the same time
    fault="import threading, torch, smart_kernels; x, y = torch.zeros(64, 4096), torch.ones(64, 4096)
step = lambda: [smart_kernels.perturbation_step_(x, y, 1.0, 1.0) for _ in range(50)]
others = [threading.Thread(target=step) for _ in range(2)]; [t.start() for t in others]; [t.join() for t in others]"
    ;;
*)
    echo "$0: got $kind, expected address or thread" >&2
    exit 2
    ;;
esac

# Behind the -O3 of setup.py, which would take five minutes with all these checks
cat >"$work/c++" <<WRAPPER
#!/bin/sh
exec "${CXX:-c++}" "\$@" $flags -O0 -g1 -fno-omit-frame-pointer
WRAPPER
chmod +x "$work/c++"
CXX=$work/c++ CC=$work/c++ SMART_KERNELS_BUILD=cpu "$python" setup.py -q build --build-base "$work" >"$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }

root=$PWD
cd "$work" # not beside the sources, which Python would find first
run() {
    echo "$kind, ${SMART_KERNELS_ISA:-best instruction set}: $*"
    LD_PRELOAD=$preload PYTHONPATH=$(echo "$work"/lib.*) setarch -R "$python" "$@"
}
loaded='import smart_kernels as s; assert s.COMPILED["_C"] is None and s.__file__.startswith("'$work'"), s'
run -c "$loaded"
if run -c "$fault" >"$work/log" 2>&1 || ! grep -q "SUMMARY: .*Sanitizer" "$work/log"; then
    cat "$work/log"
    echo "$0: a fault on purpose was not reported" >&2
    exit 1
fi
run -m pytest -q -p no:cacheprovider --capture=sys "${@:-${default[@]}}"
for isa in baseline avx2 avx512; do
    SMART_KERNELS_ISA=$isa run "$root/tests/fuzz.py" --cases 400 --seed "$RANDOM"
done
