#!/usr/bin/env bash
# Every measurement of docs/PERFORMANCE.md in one run, one after the other, about 50 minutes on two fast idle cores.
#
#   scripts/performance.sh [FOLDER]     figures go to FOLDER, target/performance if left out
#   ROUNDS=1 scripts/performance.sh     one round of each comparison instead of three, for a slow machine
#
# Build first: cargo build --release, scripts/peer_llama.sh. Needs the demo model in models/ as Q4_0 and Q8_0
# (scripts/fetch_model.sh demo, scripts/requantise.py), the embedding model (scripts/fetch_model.sh embedding), and in
# $PYTHON torch and sentence-transformers; what is missing is left out and said.
set -uo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;; esac
out=${1:-target/performance}
python=${PYTHON:-python3}
models=${MODELS:-models}
name=$models/SmolLM2-135M-Instruct
mkdir -p "$out"
# A build that ends meanwhile must not change what is measured.
cp target/release/neurond "$out/neurond" || exit 2
ours=(--neurond "$out/neurond")
rounds=(--rounds "${ROUNDS:-3}")

measure() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name: $*"
    if ! "$@" >"$out/$name.txt" 2>&1; then echo "   failed, see $out/$name.txt"; fi
    sed -n '/^|/p' "$out/$name.txt"
}

measure peak cargo bench --bench peak
for bits in Q4_0 Q8_0; do
    [[ -f $name.$bits.gguf ]] || { echo "== $bits left out: no $name.$bits.gguf"; continue; }
    measure "peer_$bits" scripts/peer_bench.py "${ours[@]}" "${rounds[@]}" --model "$name.$bits.gguf" --json "$out/peer_$bits.json"
done
measure prefix scripts/prefix_bench.py "${ours[@]}" "${rounds[@]}" --model "$name.Q4_0.gguf"
measure itl scripts/itl_bench.py "${ours[@]}" "${rounds[@]}" --model "$name.Q4_0.gguf"
measure spec scripts/spec_bench.py "${ours[@]}" "${rounds[@]}" --model "$name.Q4_0.gguf"
measure embed "$python" scripts/embed_bench.py "${rounds[@]}" --model "$models/all-MiniLM-L6-v2" --binary "$out/neurond" --check
tail -n 6 "$out/embed.txt"
echo "== simulate"
{ time "$out/neurond" simulate --devices 64; } >"$out/simulate.txt" 2>&1
grep -E "^(real|user)" "$out/simulate.txt"
