#!/usr/bin/env bash
# Everything that must hold before a change goes in, in order, with the time each stage took.
#
#   scripts/test.sh                all of it: about 25 minutes on two cores the first time, a few after that
#   scripts/test.sh fmt clippy     only these stages
#
# Needs Rust, a C++ compiler, Python 3 with pip, and git; the demo model, the official SDKs, NVIDIA's compiler and servers that tests
# talk to are fetched (target/, .venv/, .cuda/).
set -euo pipefail
cd "$(dirname "$0")/.."

all=(fmt model cuda servers clippy test doc release sdk)
case ${1:-} in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; echo "Stages: ${all[*]}"; exit ;; esac
stages=("${@:-${all[@]}}")
[[ $# -gt 0 ]] || stages=("${all[@]}")
for stage in "${stages[@]}"; do
    [[ " ${all[*]} " == *" $stage "* ]] || { echo "test: there is no stage $stage: ${all[*]}" >&2; exit 2; }
done

target=${CARGO_TARGET_DIR:-target}
export NEUROND_TEST_MODELS=${NEUROND_TEST_MODELS:-$PWD/target/test-models}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

stage_fmt() { cargo fmt --check; }
stage_model() {
    scripts/fetch_model.sh demo "$NEUROND_TEST_MODELS"
    scripts/fetch_model.sh embedding "$NEUROND_TEST_MODELS"
}
stage_cuda() { scripts/fetch_cuda.sh; }
# Programs that tests talk to: a mail server, a collector of traces, one that speaks S3 and checks signatures, the store of a fleet,
# and a reader of Parquet.
stage_servers() {
    scripts/fetch_smtp.sh
    scripts/fetch_otlp.sh
    scripts/s3_server.sh
    scripts/fetch_redis.sh
    scripts/fetch_parquet.sh
}
stage_clippy() { NEUROND_CUDA_CHIPS='' cargo clippy --locked --all-targets --features cuda,emulate -- -D warnings; }
# Compiles the kernels for every GPU, and fails where one spills. The generated documents, the floors, the goldens and GPU
# kernels run by a host are tests like any other. The daemon that they start could use a GPU, and there is none.
stage_test() {
    [[ ! -x $(scripts/s3_server.sh --path) ]] || NEUROND_TEST_S3=$(scripts/s3_server.sh --path)
    [[ -z ${NEUROND_TEST_S3:-} ]] || export NEUROND_TEST_S3
    cargo test --locked --features cuda,emulate --no-run
    # Emulated GPUs take turns and leave a core idle, so the other tests run beside the library's own.
    cargo test --locked --features cuda,emulate --lib --bins >"$target/tests-lib.log" 2>&1 &
    local lib=$! status=0
    cargo test --locked --features cuda,emulate --test '*' --examples || status=$?
    wait $lib || status=$?
    grep -E '^test result|^test .*FAILED|^failures|panicked' "$target/tests-lib.log" || true
    [[ $status -eq 0 ]] || tail -n 60 "$target/tests-lib.log"
    return $status
}
stage_doc() { RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps; }

# What users run: the optimised build, a real model against its goldens.
stage_release() {
    stage_model
    cargo test --release --locked --test model -- --nocapture
    cargo build --release --locked
    # The load that releases are arranged by must run; the two builds around it take too long for here.
    python3 scripts/release_load.py --neurond "$target/release/neurond"
}

# The README's first command, and the official SDKs against the daemon that it starts, on a free port.
stage_sdk() {
    install_sdk
    export NEUROND_STATE=$target/quickstart
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    scripts/quickstart.sh --stop
    scripts/quickstart.sh --detach --port "$port"
    # This is a shell of its own: whatever ends it, ends the daemon.
    trap 'scripts/quickstart.sh --stop' EXIT
    python3 scripts/sdk_test.py "http://127.0.0.1:$port/v1" ||
        { tail -n 30 "$NEUROND_STATE/neurond.log"; return 1; }
    # OpenAI's, Anthropic's and Google's SDKs and botocore through a gateway, in front of an upstream that answers as those do, which the
    # tests have built; Cloudflare's SDK manages it.
    cargo build --locked --features cuda,emulate --example fake_upstream
    python3 scripts/gateway_sdk_test.py --neurond "$target/release/neurond" --fake "$target/debug/examples/fake_upstream"
}

# The SDKs live in a folder of their own, fetched once: no virtual environment, which some systems package separately.
install_sdk() {
    export PYTHONPATH=$PWD/.venv/sdk
    python3 -c 'import openai, cloudflare' 2>/dev/null && return
    echo "installing the packages openai and cloudflare into .venv/sdk"
    rm -rf .venv/sdk
    python3 -m pip install --quiet --disable-pip-version-check --target .venv/sdk openai cloudflare
}

report=()
begin=$SECONDS
for stage in "${stages[@]}"; do
    printf '\n\033[1m== %s\033[0m\n' "$stage"
    since=$SECONDS
    # In a shell of its own with errors fatal, which they would not be in a condition.
    status=0
    (set -e; "stage_$stage") &
    wait $! || status=$?
    report+=("$(printf '%-8s %4d s' "$stage" $((SECONDS - since)))")
    if [[ $status -ne 0 ]]; then
        printf '\n'
        printf '%s\n' "${report[@]}"
        printf 'FAILED in stage %s: run `scripts/test.sh %s` again after a change\n' "$stage" "$stage"
        exit 1
    fi
done
printf '\n'
printf '%s\n' "${report[@]}"
printf 'all %d stages passed in %d s\n' "${#stages[@]}" $((SECONDS - begin))
