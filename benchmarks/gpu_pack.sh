#!/usr/bin/env bash
# Makes what benchmarks/gpu_check.sh takes along to a machine with a GPU, on a machine with nvcc and the network:
#
#     benchmarks/gpu_pack.sh PYTHON
#
# PYTHON is an interpreter of the other machine's version, with torch, setuptools, wheel, ninja and pybind11. What goes
# along is the checkout with dflash_scale/_kernels.so, dflash_scale/_ring.*.so and build/gpu:
#   probe          Hopper's pieces one by one, without torch
#   watchdog.so    the kernels, giving up waits that do not end
#   wheels         what the product needs and a machine for kernels lacks
#   demo           the demo's verifier and its answers
set -euo pipefail
cd "$(dirname "$0")/.."
other="${1:?usage: benchmarks/gpu_pack.sh PYTHON}"
mine="${MINE:-.venv/bin/python}"
pack=build/gpu
mkdir -p "$pack"

"$mine" setup.py -q build_ext --inplace --target kernels
"$mine" setup.py -q build_ext --target watchdog
cp build/watchdog/_kernels.so "$pack/watchdog.so"
nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a tests/gpu/probe.cu -o "$pack/probe"
"$other" setup.py -q build_ext --inplace --target ring

rm -rf "$pack/wheels"
"$other" -m pip wheel -q --no-deps --no-build-isolation -w "$pack/wheels" \
    deepspeed hjson datasets dill multiprocess pyzmq pydantic pydantic-core annotated-types typing-inspection py-cpuinfo \
    aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl

verifier="$pack/demo/verifier" answers="$pack/demo/answers"
if [[ ! -f $answers/held-in.jsonl ]]; then
    "$mine" -c '
import sys
from pathlib import Path

from launch.demo.answers import AnswerSpec, make_answers
from launch.demo.verifier import make_verifier

verifier, answers = map(Path, sys.argv[1:])
make_verifier(verifier, steps=240)
make_answers(verifier, answers / "held-in.jsonl", answers / "held-out.jsonl", AnswerSpec(prompts=480, heldout=24))
' "$verifier" "$answers"
fi
du -sh dflash_scale/*.so "$pack"/*
