#!/usr/bin/env bash
# What only a GPU can tell. The machine that has one needs neither Rust nor a compiler.
#
#   scripts/gpu_check.sh pack      compiles with the feature cuda and puts stripped binaries into .gpu/ (scripts/fetch_cuda.sh first)
#   scripts/gpu_check.sh           runs them, on the machine with the GPU; what they say goes to $OUT, or to target/gpu
#
# cuBLASLt is looked for where CUDA's installer and Python packages put it; set LD_LIBRARY_PATH if it is elsewhere.
set -uo pipefail
cd "$(dirname "$0")/.."

pack() {
    mkdir -p .gpu
    local tests
    tests=$(cargo test --release --locked --features cuda,emulate --lib --no-run --message-format=json |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("profile", {}).get("test"):
        print(message["executable"])')
    [[ -n $tests ]] || { echo "gpu_check: the tests did not compile" >&2; exit 1; }
    cargo build --release --locked --features cuda || exit 1
    cp "$tests" .gpu/tests
    cp target/release/neurond .gpu/neurond
    strip .gpu/tests .gpu/neurond
    du -h .gpu/*
}

case ${1:-} in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
pack) pack; exit ;;
"") ;;
*) echo "gpu_check: unknown argument $1; see --help" >&2; exit 2 ;;
esac

[[ -x .gpu/tests ]] || { echo "gpu_check: there is no .gpu/tests: run scripts/gpu_check.sh pack where Rust is" >&2; exit 1; }
out=${OUT:-target/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$out/card.txt"
library=$(find / -name 'libcublasLt.so.13' -not -path '/proc/*' -print -quit 2>/dev/null)
export LD_LIBRARY_PATH=${library:+$(dirname "$library"):}${LD_LIBRARY_PATH:-}
echo "cuBLASLt: ${library:-not found}" | tee -a "$out/card.txt"

status=0
check() { # NAME COMMAND...
    local name=$1
    shift
    if timeout 300 "$@" >"$out/$name.txt" 2>&1; then echo "$name: ok"; else echo "$name: FAILED, see $out/$name.txt"; status=1; fi
    tail -n 25 "$out/$name.txt"
}
check decoder .gpu/tests a_real_card --nocapture --test-threads 1
exit $status
