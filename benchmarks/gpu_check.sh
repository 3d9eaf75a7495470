#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch >= 2.10 and no network, in under 8 minutes:
#
#     [OUT=folder] [PYTHON=python3] benchmarks/gpu_check.sh
#
# Takes the compiled library that is there (built on any machine that has nvcc) and builds only if it does not load.
# The most important comes first, each step has its own limit, and one that fails or hangs leaves the others their time.
# summary.json in $OUT (else benchmarks/results) says how each step ended; the exit code is 1 if one failed.
set -u
cd "$(dirname "$0")/.." || exit 1
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out" || exit 1
out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
deadline=465 # seconds for all steps
failed=0
steps=()

note() { # name, outcome, seconds
    steps+=("$1=$2=$3")
    printf '== %s: %s (%s s)\n' "$1" "$2" "$3"
}

step() { # name, most seconds, command...
    local name="$1" limit="$2" began="$SECONDS" left=$((deadline - SECONDS)) outcome code
    shift 2
    if ((left < 10)); then
        failed=1
        note "$name" "not run: no time left" 0
        return 1
    fi
    printf '\n== %s\n' "$name"
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1
    code=$?
    case $code in
        0) outcome=passed ;;
        124 | 137) outcome="failed: out of time" ;;
        *) outcome="failed: exit code $code" ;;
    esac
    ((code == 0)) || failed=1
    note "$name" "$outcome" "$((SECONDS - began))"
    return "$code"
}

loads() {
    "$python" -c '
from dflash_scale import attention_plan
if attention_plan.MISSING or not attention_plan.COMPILED["cuda"]:
    raise SystemExit(attention_plan.MISSING or "_kernels.so holds no CUDA code")
print(attention_plan.LIBRARY, "loads")'
}

# Of the kernels that passed; without torch's cache of memory, in which overruns would hide.
sanitize() { # tool, kernels...
    local tool="$1" kernel
    shift
    for kernel in "$@"; do
        step "$tool-$kernel" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --report-api-errors no --kernel-regex kns=dflash --error-exitcode 9 \
            "$python" tests/gpu/check.py --backend "$kernel" --only "small cases" --only "no anchor"
    done
}

summarise() {
    "$python" - "$out/summary.json" "${steps[@]}" <<'PYTHON'
import json, sys, time
import torch
from tests.gpu.check import source_digest
steps = [dict(zip(("step", "outcome", "seconds"), text.split("="))) for text in sys.argv[2:]]
summary = {
    "date": time.strftime("%Y-%m-%d"),
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "torch": torch.__version__,
    "sources": {name: source_digest(name) for name in ("sm80", "sm90")},
    "steps": steps,
}
with open(sys.argv[1], "w") as file:
    file.write(json.dumps(summary, indent=1) + "\n")
PYTHON
}

main() {
    local kernel kernels good=() skip=()
    if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
        echo "gpu_check: $python has no torch that sees a GPU; name another with PYTHON=..."
        return 1
    fi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv 2>&1
    if ! loads; then
        step build 200 "$python" setup.py -q build_ext --inplace
        step library 30 "$python" -c 'from dflash_scale import attention_plan as p; assert p.COMPILED["cuda"], p.MISSING'
    fi
    if ! kernels="$("$python" -c 'from tests.gpu.check import usable; print(*usable("cuda"))')" || [[ -z $kernels ]]; then
        failed=1
        note usable "failed: no compiled kernel takes a plain case" 0
    fi
    # A process each: a kernel that faults takes its process's GPU context with it.
    for kernel in $kernels; do
        if step "$kernel" 75 "$python" tests/gpu/check.py --backend "$kernel" --out "$out/attention-check-$kernel.json"; then
            good+=("$kernel")
        else
            skip+=(--skip "$kernel") # it may hang there too
        fi
    done
    summarise
    step benchmark 190 "$python" benchmarks/bench_attention.py "${skip[@]}" --out "$out/attention.json"
    if command -v compute-sanitizer >/dev/null; then
        sanitize memcheck "${good[@]}"
        sanitize racecheck "${good[@]}"
    else
        note sanitizer "not run: compute-sanitizer is not installed" 0
    fi
    step loss-benchmark 80 "$python" benchmarks/bench_loss.py --kernel cuda --json "$out/loss.json"
    step flex 90 "$python" tests/gpu/check.py --backend flex --only "small cases" --only "no anchor" \
        --out "$out/attention-check-flex.json"
    if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
        step properties 60 "$python" -m pytest -q -p no:cacheprovider tests/gpu \
            -k "(definition and not flex) or compiled or auto"
        step loss 45 "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu_loss.py
        if "$python" -c 'import numpy; from dflash_scale import _ring' 2>/dev/null; then
            step rows 40 "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu_rows.py
        else
            note rows "not run: numpy is missing, or dflash_scale._ring is not built for this Python" 0
        fi
    else
        note properties "not run: pytest or hypothesis is not installed" 0
    fi
    summarise
    printf '\n'
    printf '%s\n' "${steps[@]}"
    return "$failed"
}

main 2>&1 | tee "$out/gpu-check.log"
exit "${PIPESTATUS[0]}"
