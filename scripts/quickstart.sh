#!/usr/bin/env bash
# From a fresh clone to a running daemon: builds it, fetches the demo model, starts it on this machine, says what to try.
#
#   scripts/quickstart.sh                   in the foreground; Ctrl-C stops it
#   scripts/quickstart.sh --detach          in the background; log and pid file in state/
#   scripts/quickstart.sh --stop            stops that one
#   scripts/quickstart.sh --port 9000       on another port than 8080
#
# Needs Rust, a C compiler, Python 3 with pip, and git. Can be run again at any time: what is done is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

port=8080
detach=
stop=
state=${NEUROND_STATE:-state}
pid_file=$state/neurond.pid
log=$state/neurond.log

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

while [[ $# -gt 0 ]]; do
    case $1 in
        --detach) detach=1 ;;
        --stop) stop=1 ;;
        --port) port=${2:-}; shift ;;
        --port=*) port=${1#*=} ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
        *) die "there is no $1: --help lists what there is" ;;
    esac
    shift
done
[[ $port =~ ^[0-9]+$ && $port -ge 1 && $port -le 65535 ]] || die "--port needs a number from 1 to 65535"
url=http://127.0.0.1:$port
neurond=${CARGO_TARGET_DIR:-target}/release/neurond

# The pid of the daemon that --detach started, if it still runs. A pid that was given to another program does not count.
running() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) && [[ -n $pid ]] || return 1
    [[ $(cat "/proc/$pid/comm" 2>/dev/null || ps -o comm= -p "$pid" 2>/dev/null) == *neurond* ]] || return 1
    echo "$pid"
}

# GET with Python, since curl may not be there. Prints the body; fails unless the status is 200.
get() {
    python3 - "$1" 2>/dev/null <<'PY'
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(sys.argv[1], timeout=2) as answer:
    sys.stdout.write(answer.read().decode())
PY
}

stop_pid() { # PID: asks it to drain, waits for it
    kill -TERM "$1" 2>/dev/null || return 0
    for _ in $(seq 450); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}

if [[ -n $stop ]]; then
    if pid=$(running); then
        say "stopping neurond (pid $pid): open answers are finished first"
        stop_pid "$pid" || die "it is still running after 45 s: see $log"
        say "stopped"
    else
        say "nothing to stop"
    fi
    rm -f "$pid_file"
    exit
fi

what_to_try() {
    local model
    model=$(get "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
    cat <<TXT

neurond is ready at $url

  # as OpenAI's clients ask, streaming
  curl -N $url/v1/chat/completions -H 'content-type: application/json' -d '{
    "model": "$model", "stream": true,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

  # as Cloudflare Workers AI's clients ask
  curl $url/client/v4/accounts/local/ai/run/$model -d '{"prompt": "Name three moons of Jupiter."}'

  # in the terminal, and how fast it is
  $neurond chat --url $url
  $neurond bench --url $url --concurrency 1,4

  # what it counts
  curl $url/metrics
TXT
}

if pid=$(running); then
    get "$url/health/ready" >/dev/null || die "neurond runs already (pid $pid), but not on port $port: --stop it first"
    say "neurond runs already (pid $pid)"
    what_to_try
    exit
fi

say "looking for the tools"
command -v cargo >/dev/null || die "cargo is missing: install Rust (rustup), 1.89 or newer"
command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    die "a C compiler is missing: install gcc or clang"
command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
if get "$url/health/live" >/dev/null; then
    die "something answers on port $port already: stop it, or take another port with --port"
fi

say "building (some minutes the first time)"
cargo build --release --locked

say "fetching the demo model"
scripts/fetch_model.sh demo models

say "starting neurond on $url"
mkdir -p "$state"
serve=("$neurond" serve --config configs/dev.toml --listen "127.0.0.1:$port")
if [[ -n $detach ]]; then
    nohup "${serve[@]}" >>"$log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$pid_file"
else
    # In a process group of its own: Ctrl-C then reaches this script alone, which asks the daemon once.
    set -m
    "${serve[@]}" </dev/null &
    pid=$!
    set +m
    trap 'say "stopping"; stop_pid "$pid" || kill -KILL "$pid"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
fi

for _ in $(seq 600); do
    get "$url/health/ready" >/dev/null && break
    if ! kill -0 "$pid" 2>/dev/null; then
        if [[ -n $detach ]]; then tail -n 20 "$log" >&2; rm -f "$pid_file"; fi
        trap - EXIT
        die "neurond did not start: its last words are above"
    fi
    sleep 0.1
done
get "$url/health/ready" >/dev/null || die "neurond runs, but is not ready after a minute"
what_to_try

if [[ -n $detach ]]; then
    printf '\n  # in the background: log in %s\n  scripts/quickstart.sh --stop\n' "$log"
    exit
fi
printf '\nCtrl-C stops it.\n\n'
status=0
wait "$pid" || status=$?
trap - EXIT
exit "$status"
