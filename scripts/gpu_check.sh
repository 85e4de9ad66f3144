#!/usr/bin/env bash
# What only a GPU can tell. The machine that has one needs Python 3, and neither Rust nor a compiler, nor weights: those are made up on the GPU.
#
#   scripts/gpu_check.sh pack         compiles with the feature cuda and puts stripped binaries into .gpu/ (scripts/fetch_cuda.sh first)
#   scripts/gpu_check.sh              all parts, on the machine with the GPU: under ten minutes (BUDGET=600 seconds)
#   scripts/gpu_check.sh card speed   only these
#
#   card      the card, its memory bandwidth and the rate of its products in bf16 and fp8: the ceilings
#   kernels   every kernel against its reference, on the card
#   decoder   decoders of random weights against the CPU's plain arithmetic, and the answers of tiny models against those of transformers
#   embed     what encoders compute with, against the CPU's; with the folder $EMBED_MODEL (models/all-MiniLM-L6-v2) its speed as well
#   serve     the demo model ($DEMO_MODEL), or a small synthetic one, through HTTP: answers, repeats, metrics
#   speed     8B in bf16, fp8 and 4 bits, the same with a draft model, and 70B in fp8, if it fits: time to ready, decode and prompts by
#             concurrency and length, shared prefixes, CPU use, memory; each as a share of the ceilings
#   ranks     on a machine of several GPUs, and only if it is named: sums of ranks, decoders divided over them, 70B in fp8 on two
#
# Everything is written to $OUT, or target/gpu: what each part said, REPORT.md, and all figures in FIGURES.md and figures.json. A part that
# fails does not stop the others. cuBLASLt is looked for where CUDA's installer and Python packages put it; set LD_LIBRARY_PATH if it is
# elsewhere. With NEUROND_EMULATED_GPUS=1 (2 for `ranks`; NEUROND_EMULATED_CHIP=hopper or ada) and binaries in .gpu/ that emulate, all of it is
# rehearsed without a GPU, with little of everything.
set -uo pipefail
cd "$(dirname "$0")/.."

pack() {
    mkdir -p .gpu
    cargo test --release --locked --features cuda,emulate --lib --test kernels --no-run --message-format=json |
        python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("profile", {}).get("test"):
        shutil.copy(message["executable"], ".gpu/" + {"neurond": "tests"}.get(message["target"]["name"], message["target"]["name"]))' ||
        { echo "gpu_check: the tests did not compile" >&2; exit 1; }
    cargo build --release --locked --features cuda || exit 1
    cp target/release/neurond .gpu/neurond
    strip .gpu/kernels .gpu/neurond .gpu/tests
    # One file, less than half as large: it has to travel.
    tar -C .gpu -czf .gpu/packed.tgz kernels neurond tests && (cd .gpu && rm kernels neurond tests)
    du -h .gpu/*
}

all=(card kernels decoder embed serve speed)
case ${1:-} in
-h | --help) sed -n '2,24s/^# \{0,1\}//p' "$0"; exit ;;
pack) pack; exit ;;
esac
parts=("${@:-${all[@]}}")
[[ $# -gt 0 ]] || parts=("${all[@]}")
for part in "${parts[@]}"; do
    [[ " ${all[*]} ranks " == *" $part "* ]] || { echo "gpu_check: there is no part $part: ${all[*]} ranks" >&2; exit 2; }
done
[[ ! -f .gpu/packed.tgz ]] || tar -C .gpu -xzf .gpu/packed.tgz || exit 1
[[ -x .gpu/neurond ]] || { echo "gpu_check: there is no .gpu/neurond: run scripts/gpu_check.sh pack where Rust is" >&2; exit 1; }

out=${OUT:-target/gpu}
mkdir -p "$out"
library=$(find / -name 'libcublasLt.so.13' -not -path '/proc/*' -print -quit 2>/dev/null)
nccl=$(find / -name 'libnccl.so.2' -not -path '/proc/*' -print -quit 2>/dev/null)
export LD_LIBRARY_PATH=${library:+$(dirname "$library"):}${nccl:+$(dirname "$nccl"):}${LD_LIBRARY_PATH:-}
report=$out/REPORT.md
rm -f "$out"/figures*.json "$out/facts.txt"
deadline=$((SECONDS + ${BUDGET:-600}))
rehearsal=${NEUROND_EMULATED_GPUS:+REHEARSAL=1}
echo "# GPU check of $(date -u +%F), $(.gpu/neurond --version)" >"$report"
status=0

# Runs a command, keeps what it says, and puts the end of it into the report.
note() { # NAME COMMAND...
    local name=$1
    shift
    local begun=$SECONDS word=ok limit=${LIMIT:-240}
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
    ((limit > 0)) || { echo "$name: left out, the time is over"; return; }
    (trap stop EXIT; "$@") >"$out/$name.txt" 2>&1 &
    local job=$!
    (sleep "$limit"; pkill -P "$job"; kill "$job") 2>/dev/null &
    local guard=$!
    wait "$job" || { word=FAILED; status=1; }
    pkill -P "$guard" 2>/dev/null; kill "$guard" 2>/dev/null; wait "$guard" 2>/dev/null
    echo "$name: $word, $((SECONDS - begun)) s"
    { printf '\n## %s: %s\n\n```\n' "$name" "$word"; tail -n 40 "$out/$name.txt"; printf '```\n'; } >>"$report"
}

# Each part is a shell of its own: whatever ends it, ends its daemon.
daemon=
stop() { [[ -z $daemon ]] || { kill "$daemon" 2>/dev/null; wait "$daemon" 2>/dev/null; daemon=; }; }

# Starts the daemon with a model block and waits until it is ready; says how long that took.
start() { # NAME, further lines of the [[model]] block, its id
    local name=$1 begun=${EPOCHREALTIME/./} took
    printf '[server]\nlisten = "127.0.0.1:18080"\n[auth]\nanonymous = "local"\n[[model]]\nid = "%s"\nentry = { context = 32768 }\n%b\n' \
        "${3:-@cf/meta/llama-3.1-8b-instruct}" "$2" >"$out/$name.toml"
    .gpu/neurond serve --config "$out/$name.toml" >"$out/$name.log" 2>&1 &
    daemon=$!
    for _ in $(seq 1200); do
        if curl -sf http://127.0.0.1:18080/health/ready >/dev/null; then
            took=$(((${EPOCHREALTIME/./} - begun) / 1000))
            echo "ready after $took ms"
            fact "$name" ready_ms "$took"
            fact "$name" gpu_mib_idle "$(on_card memory.used)"
            grep -E 'GPUs serve|attention kernels' "$out/$name.log"
            return 0
        fi
        kill -0 "$daemon" 2>/dev/null || break
        sleep 0.1
    done
    tail -n 5 "$out/$name.log"
    return 1
}

# One figure, for FIGURES.md.
fact() { [[ -z $3 ]] || echo "$1 $2 $3" >>"$out/facts.txt"; }

on_card() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | head -n 1; }

ticks() { awk '{ print $14 + $15 }' "/proc/$daemon/stat"; }

# A load; its figures go to figures-NAME-WHAT.json as well.
bench() { # NAME WHAT ...
    local file=$out/figures-$1-$2.json
    shift 2
    .gpu/neurond bench --url http://127.0.0.1:18080 --seed "$RANDOM" --json "$file" "$@" >/dev/null &&
        python3 scripts/gpu_figures.py --show "$file"
}

part_card() {
    [[ -n $rehearsal ]] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
    echo "cuBLASLt: ${library:-not found}"
    .gpu/neurond gpus --measure ${rehearsal:+--scale 0.003} --json >"$out/figures-card.json" && cat "$out/figures-card.json" && [[ $(<"$out/figures-card.json") != "[]" ]]
}

# What these tests run is the card's, unless there is none.
kernels() { env ${rehearsal:-NEUROND_TEST_GPU=1} .gpu/kernels "$@" --test-threads 1; }

part_kernels() { kernels; }

part_decoder() { .gpu/tests a_real_card --skip a_real_card_encodes --nocapture --test-threads 1; }

part_embed() {
    kernels encoder:: || return 1
    .gpu/tests a_real_card_encodes --nocapture --test-threads 1 || return 1
    local model=${EMBED_MODEL:-models/all-MiniLM-L6-v2}
    [[ -f $model/model.safetensors ]] || { echo "speed: left out, there is no $model/model.safetensors"; return; }
    start embed "path = \"$(realpath "$model")\"\ngpus = [0]" @cf/sentence-transformers/all-minilm-l6-v2 || return 1
    for length in 24 128 250; do
        echo "== texts of $length tokens"
        bench embed "$length" --endpoint embeddings --batch 64 --concurrency 1,8,32 --input-tokens "$length" -n 256 || return 1
    done
    curl -sf http://127.0.0.1:18080/metrics | grep -E '^neurond_step_(seconds|rows)_(sum|count)'
    stop
}

part_ranks() {
    [[ ${NEUROND_EMULATED_GPUS:-$(nvidia-smi --list-gpus | wc -l)} -gt 1 ]] || { echo "there is one GPU"; return 1; }
    .gpu/neurond gpus || return 1
    .gpu/tests ranks_sum_and_gather --nocapture --test-threads 1 &&
        .gpu/tests real_cards_compute_the_same_together --nocapture --test-threads 1
}

part_serve() {
    local model=${DEMO_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf} id=@cf/huggingfacetb/smollm2-135m-instruct
    local path=synthetic:llama-3.2-1b
    [[ ! -f $model ]] || path=$(realpath "$model")
    [[ -z $rehearsal ]] || path=synthetic:tiny
    start serve "path = \"$path\"\ngpus = [0]" "$id" || return 1
    local ask='{"model": "@cf/huggingfacetb/smollm2-135m-instruct", "prompt": "Once", "max_tokens": 24, "temperature": 0, "ignore_eos": true}'
    local first second
    first=$(curl -sf http://127.0.0.1:18080/v1/completions -d "$ask") || return 1
    second=$(curl -sf http://127.0.0.1:18080/v1/completions -d "$ask") || return 1
    echo "$first"
    local plain='s/.*"choices"//; s/"usage".*//'
    [[ $(sed "$plain" <<<"$first") == "$(sed "$plain" <<<"$second")" ]] ||
        { echo "the same question has another answer: $second"; return 1; }
    curl -sf http://127.0.0.1:18080/metrics | grep -E '^neurond_(gpu|steps|kv)'
    stop
}

# One model: how fast it is ready, decodes at each number of streams, and reads prompts of each length.
speed() { # NAME SHAPE WEIGHTS [further lines of the block, if it is not on the first GPU alone [what follows the shape]]
    local name=$1 shape=$2 weights=$3 more=${4:-gpus = [0]} suffix=${5:-}
    local streams="1 8 32 64 128 256" lengths="512 4096 16384" tokens=128 context=1436 long=1000 prefix=2000 most=256
    [[ -z $rehearsal ]] || { shape=tiny streams="1 2" lengths=64 tokens=4 context=60 long=8 prefix=64 most=2; }
    start "$name" "path = \"synthetic:$shape$suffix\"\ngpu_weights = \"$weights\"\n$more" || return 1
    local before begun=$SECONDS count middle=$((most < 64 ? most : 64))
    before=$(ticks)
    for count in $streams; do
        bench "$name" "decode-$count" --concurrency "$count" --input-tokens "$tokens" --output-tokens "$tokens" -n $((count < 4 ? 4 : 2 * count)) || return 1
    done
    fact "$name" cpu_percent_of_a_core $((($(ticks) - before) / (SECONDS - begun + 1)))
    # A draft model changes nothing for prompts.
    if [[ -z $suffix ]]; then
        for length in $lengths; do
            bench "$name" "prompt-$length" --concurrency 1 --input-tokens "$length" --output-tokens 1 -n 4 --warmup 1 || return 1
        done
        bench "$name" shared-prefix --concurrency 1 --input-tokens $((prefix + prefix / 20)) --shared-prefix "$prefix" --output-tokens 1 -n 8 || return 1
        bench "$name" context --concurrency "$middle" --input-tokens "$context" --output-tokens "$tokens" -n "$middle" || return 1
        bench "$name" long --concurrency "$most" --input-tokens "$long" --output-tokens "$long" -n "$most" || return 1
    fi
    fact "$name" gpu_mib_peak "$(on_card memory.used)"
    fact "$name" host_mib_peak "$(awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$daemon/status")"
    fact "$name" sm_mhz "$(on_card clocks.sm)"
    curl -sf http://127.0.0.1:18080/metrics | grep -E '^neurond_(spec|draft|gpu_graph|gpu_step)'
    stop
}

for part in "${parts[@]}"; do
    if [[ $part != speed ]]; then
        note "$part" "part_$part"
        [[ $part != ranks ]] || note ranks-70b-fp8 speed ranks-70b-fp8 llama-3.3-70b fp8 'tensor_parallel = 2\ngpus = [0, 1]'
        continue
    fi
    note speed-8b-bf16 speed 8b-bf16 llama-3.1-8b bf16
    note speed-8b-fp8 speed 8b-fp8 llama-3.1-8b fp8
    memory=$(on_card memory.total)
    if ((${memory:-0} > 76000)); then note speed-70b-fp8 speed 70b-fp8 llama-3.3-70b fp8; else echo "speed-70b-fp8: left out, the card has ${memory:-no known} MiB and it takes 76,000"; fi
    # Four of five guesses of a smaller model come true.
    draft=llama-3.2-1b
    [[ -z $rehearsal ]] || draft=tiny
    note speed-8b-draft speed 8b-draft llama-3.1-8b fp8 "gpus = [0]\ndraft = \"synthetic:$draft\"" ,accept=0.8
    note speed-8b-q4 speed 8b-q4 llama-3.1-8b q4
done
python3 scripts/gpu_figures.py "$out" && cat "$out/FIGURES.md" >>"$report"
echo "report: $report"
exit $status
