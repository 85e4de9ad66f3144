#!/usr/bin/env bash
# Installs the gateways that neurond is measured beside: sglang-router, ferrogw, LiteLLM and Portkey, each with packages of its own.
#
# A second run installs what is missing. A gateway that cannot be installed here is left out with a word, and so it is by
# gateway_bench.py. Needs Python 3 with pip, Node.js 20 with npm for Portkey, and 2 GB of disk, most of it for LiteLLM.
#
#   scripts/gateway_peers.sh              into target/peers/gateways
#   scripts/gateway_peers.sh DIR          into DIR
#   scripts/gateway_bench.py --peers-dir DIR
set -euo pipefail
SELF=$(realpath "${BASH_SOURCE[0]}")

SGLANG_ROUTER=0.3.2
FERROGW=1.5.10
LITELLM=1.108.7
PORTKEY=1.15.2

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$SELF"; exit ;; esac
dir=$(realpath -m "${1:-$(dirname "$SELF")/../target/peers/gateways}")
mkdir -p "$dir"

# NAME VERSION INSTALLER: the installed version is kept in a file, which is written last.
peer() {
    local name=$1 version=$2 mark=$dir/$1.version
    if [[ ! -e $mark || $(<"$mark") != "$version" ]]; then
        echo "installing $name $version" >&2
        rm -rf "${dir:?}/$name" "$mark"
        if ! "$3" "$dir/$name" "$name" "$version" >"$dir/$name.log" 2>&1; then
            echo "$name is left out, it could not be installed: $dir/$name.log" >&2
            tail -n 3 "$dir/$name.log" >&2
            return
        fi
        echo "$version" >"$mark"
    fi
    printf '%-14s %-9s %s\n' "$name" "$version" "$dir/$name"
}

from_pip() { python3 -m venv "$1" && "$1/bin/pip" install --disable-pip-version-check "$2==$3"; }
litellm() { from_pip "$1" 'litellm[proxy]' "$3"; }
# Its packages' own scripts are of no use to who runs it.
portkey() { mkdir -p "$1" && npm install --prefix "$1" --ignore-scripts --no-fund --no-audit "@portkey-ai/gateway@$3"; }

peer sglang-router "$SGLANG_ROUTER" from_pip
peer ferrogw "$FERROGW" from_pip
peer litellm "$LITELLM" litellm
peer portkey "$PORTKEY" portkey
printf '%-14s %-9s %s\n' node "$(node --version 2>/dev/null || echo none)" "$(command -v node || true)"
echo
echo "scripts/gateway_bench.py --peers-dir $dir"
