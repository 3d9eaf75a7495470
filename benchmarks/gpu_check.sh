#!/usr/bin/env bash
# What only a GPU can show, in two runs that end within six minutes each, on a machine with torch >= 2.10 and no network:
#
#     [OUT=folder] [PYTHON=python3] benchmarks/gpu_check.sh proof     are the kernels right, how fast, and if not, why
#     [OUT=folder] [PYTHON=python3] benchmarks/gpu_check.sh product   a whole run, and the peers beside it
#
# Takes the compiled libraries and build/gpu as benchmarks/gpu_pack.sh made them on any machine that has nvcc; without
# them it builds the kernels and leaves out what cannot be built. The most important comes first. Each step has its own
# limit, prints to a file of its own, and one that fails or hangs leaves the others their time; after each,
# $OUT/gpu-RUN.tgz is made anew with all files so far, so that a machine that is lost costs one step. The exit code is 1
# if a step failed. With CHECK_AGAIN=1 the product's run first checks the kernel as the proof does: for one that was mended.
set -u
cd "$(dirname "$0")/.." || exit 1
run="${1:-}"
python="${PYTHON:-python3}"
out="${OUT:-runs/gpu-check}"
pack=build/gpu
limit="${LIMIT:-345}" # seconds for all steps
[[ $run == proof || $run == product ]] || { echo "usage: benchmarks/gpu_check.sh proof|product" >&2; exit 2; }
mkdir -p "$out" || exit 1
out="$(cd "$out" && pwd)"
scratch="$(mktemp -d)"
work="$scratch/results" # what is kept
mkdir "$work"
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0

keep() {
    tar czf "$out/.archive" -C "$work" --exclude=checkpoints --exclude='*.safetensors' . 2>/dev/null &&
        mv "$out/.archive" "$out/gpu-$run.tgz"
}

step() { # name, most seconds, command...
    local name="$1" most="$2" began="$SECONDS" left=$((limit - SECONDS)) code
    shift 2
    if ((left < 8)); then
        failed=1
        printf '== %s: not run, %s s are left\n' "$name" "$left" | tee -a "$work/steps"
        return 1
    fi
    printf '\n== %s\n' "$name"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" >"$work/$name.txt" 2>&1
    code=$?
    ((code == 0)) || failed=1
    tail -n 14 "$work/$name.txt" | cut -c1-400
    ((code == 124 || code == 137)) && code="$code (out of time)"
    printf '== %s: exit %s, %s s\n' "$name" "$code" "$((SECONDS - began))" | tee -a "$work/steps"
    keep
    [[ $code == 0 ]]
}

# The kernels of this machine, the fastest first, by its compute capability; Hopper's where that cannot be asked.
kernels() {
    local found
    found="$(timeout 30 "$python" -c '
import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print("sm90 sm80" if (major, minor) == (9, 0) else "sm80")')" || found="sm90 sm80"
    echo "$found"
}

libraries() {
    step loads 60 "$python" -c '
import sys, torch
from dflash_scale.ops.library import COMPILED, MISSING
print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name(), MISSING, COMPILED)
sys.exit(not COMPILED["cuda"])' ||
        step build 150 "$python" setup.py -q build_ext --inplace --target kernels
}

# Why a kernel of Hopper is wrong or hangs: with waits that give up, and under memcheck.
diagnose() {
    cp -r dflash_scale tests "$scratch/" && cp "$pack/watchdog.so" "$scratch/dflash_scale/_kernels.so"
    step watchdog 40 env PYTHONPATH="$scratch" "$python" "$scratch/tests/gpu/ladder.py" --seconds 35
    step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        --kernel-regex kns=dflash --error-exitcode 9 "$python" tests/gpu/ladder.py --seconds 55 --rung 1
}

proof() {
    local kernel kernels good=() pytest=("$python" -m pytest -q -p no:cacheprovider)
    read -ra kernels <<<"$(kernels)"
    [[ ${kernels[0]} == sm90 ]] && step probe 30 "$pack/probe"
    libraries
    kernel="${kernels[0]}"
    if step "ladder-$kernel" 40 "$python" tests/gpu/ladder.py --backend "$kernel" --seconds 35 --dump "$work/wrong.pt"; then
        step "check-$kernel" 75 "$python" tests/gpu/check.py --backend "$kernel" --seconds 70 \
            --out "$work/attention-check-$kernel.json" && good+=("$kernel")
    elif [[ $kernel == sm90 ]]; then
        diagnose
    fi
    step speed 45 "$python" benchmarks/bench_kernels.py --out "$work/kernels.json"
    if ((${#good[@]})) && command -v ncu >/dev/null; then
        # The forward is launched once to make the output, three times to warm up, and then timed.
        step ncu 60 ncu --set full --clock-control none -k 'regex:forward|backward_d' --launch-skip 4 --launch-count 3 \
            --export "$work/ncu" --force-overwrite "$python" benchmarks/bench_kernels.py --case "1 document" \
            --kernel "${good[0]}" --repeats 1 && step ncu-text 20 ncu --import "$work/ncu.ncu-rep" --page details
    fi
    step loss 45 "${pytest[@]}" tests/gpu/test_gpu_loss.py
    step pointwise 40 "${pytest[@]}" tests/gpu/test_gpu_pointwise.py
    step rows 40 "${pytest[@]}" tests/gpu/test_gpu_rows.py
    for kernel in "${kernels[@]:1}"; do
        step "check-$kernel" 75 "$python" tests/gpu/check.py --backend "$kernel" --seconds 70 \
            --out "$work/attention-check-$kernel.json" && good+=("$kernel")
    done
    step train 60 "$python" benchmarks/bench_train.py --attention "${good[0]:-auto}" --loss cuda --pointwise cuda \
        --case "1 document" --case "3 documents" --case "12 documents, recomputed" --out "$work/train.json"
}

product() {
    local kernel kernels tool site="$scratch/site"
    read -ra kernels <<<"$(kernels)"
    kernel="${kernels[0]}"
    step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$pack"/wheels/*.whl
    [[ -n ${CHECK_AGAIN:-} ]] && step "check-$kernel" 75 "$python" tests/gpu/check.py --backend "$kernel" --seconds 70 \
        --out "$work/attention-check-$kernel.json"
    step product 100 env PYTHONPATH="$PWD:$site" "$python" tests/gpu/product.py "$pack/demo/verifier" \
        "$pack/demo/answers" "$work/product" --set drafter.head_dim=64 --set train.precision=bf16 \
        --set "drafter.attention_backend=$kernel" --set loss.kernel=cuda --set drafter.pointwise=cuda
    step train-peers 120 "$python" benchmarks/bench_train.py --attention "$kernel" --loss cuda --pointwise cuda --peers \
        --case "1 document" --out "$work/train-peers.json"
    step flex 90 "$python" benchmarks/bench_attention.py --case "1 document" --out "$work/attention.json"
    step train-more 60 "$python" benchmarks/bench_train.py --attention "$kernel" --loss cuda --pointwise cuda \
        --case "1 document, kl" --case "1 document, 1024 anchors" --out "$work/train-more.json"
    step loss-speed 80 "$python" benchmarks/bench_loss.py --kernel cuda --rounds 4 --json "$work/loss.json"
    # Without torch's cache of memory, in which overruns would hide.
    for tool in memcheck racecheck; do
        step "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-regex kns=dflash \
            --error-exitcode 9 "$python" tests/gpu/ladder.py --backend "$kernel" --seconds 44 --rung 1 --rung 3 --rung 7 --rung 9
    done
}

main() {
    timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv | tee "$work/gpu.txt"
    timeout 20 "$python" -m pip list >"$work/packages.txt" 2>/dev/null
    "$run"
    printf '\n'
    cat "$work/steps"
    return "$failed"
}

main 2>&1 | tee "$out/gpu-$run.log"
code="${PIPESTATUS[0]}"
cp "$out/gpu-$run.log" "$work/log.txt" && keep
exit "$code"
