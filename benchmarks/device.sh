#!/usr/bin/env bash
# All that is asked of a GPU, in one command of at most eight minutes: the tests that need one, then decoding at batch 1
# and 8 beside eager transformers and torch.compile. The last line of its output, and the file that it is given, are JSON.
#
#   benchmarks/device.sh wheels DIRECTORY    where there is a network: what a machine with PyTorch and transformers lacks
#   benchmarks/device.sh run DIRECTORY FILE  on the machine with the GPU, which needs no network
#
# PYTHON is the interpreter (python3), PYTHON_VERSION that of the other machine (3.12). DEVICE=cpu tries the way without a
# GPU, with a model of a few layers: its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

fetch_wheels() {
    "$python" -m pip wheel -q --no-deps -w "$1" .
    "$python" -m pip download -q --no-deps --only-binary=:all: -d "$1" --python-version "${PYTHON_VERSION:-3.12}" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 msgspec optimum gguf
}

measure() {
    local work device=${DEVICE:-cuda} size=1b
    work=$(mktemp -d)
    trap "rm -rf '$work'" EXIT
    [ "$device" = cuda ] || size=tiny
    if [ -n "$(ls "$1"/*.whl 2>/dev/null)" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$1"/*.whl
        export PYTHONPATH=$work/site
    fi
    export HF_HUB_OFFLINE=1 PRECAST_HOME=$work/home
    # A test that fails is a result, too.
    timeout 240 "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$work/tests.xml" tests/runtime || true
    "$python" benchmarks/contenders/random_llama.py "$work/model" "$size"
    "$python" benchmarks/cuda.py "$work/model" --device "$device" --batch 1,8 --tests "$work/tests.xml" | tail -n 1 >"$work/result"
    cat "$work/result" | tee "$2"
}

case "${1:-}" in
    wheels) fetch_wheels "${2:?a directory for the wheels}" ;;
    run) measure "${2:?the directory of the wheels}" "${3:?a file for the JSON}" ;;
    *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
