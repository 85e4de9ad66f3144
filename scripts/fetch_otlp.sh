#!/usr/bin/env bash
# Puts what the tests of traces talk to into a folder: rotel, a collector that speaks OTLP, and the official classes of the protocol,
# which read what is sent to it (34 MB, both Apache-2.0).
#
#   scripts/fetch_otlp.sh              target/test-otlp, where tests/it looks for it
#   scripts/fetch_otlp.sh FOLDER       somewhere else: name it in NEUROND_TEST_OTLP
#
# Needs Python 3 with pip. Does nothing when it is there. Installed nowhere else.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;; esac
folder=${1:-target/test-otlp}
die() { echo "fetch_otlp: $*" >&2; exit 1; }
# The collector is a program within its package, which is unpacked without the right to run.
works() {
    "$1/rotel/rotel-agent" version >/dev/null 2>&1 &&
        PYTHONPATH=$1 python3 -c 'import google.protobuf.json_format, opentelemetry.proto.collector.trace.v1.trace_service_pb2' 2>/dev/null
}

command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
if works "$folder"; then
    echo "collector: $folder is there"
    exit
fi
python3 -m pip --version >/dev/null 2>&1 ||
    die "pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)"
# Beside the target, so that the last step is a rename.
mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "collector: downloading rotel and opentelemetry-proto with pip"
python3 -m pip install --quiet --disable-pip-version-check \
    --target "$work/otlp" rotel==0.0.1a15 opentelemetry-proto==1.45.2 || die "pip could not fetch them: is the network there?"
chmod +x "$work/otlp/rotel/rotel-agent"
works "$work/otlp" || die "what pip fetched cannot be used"
rm -rf "${folder:?}"
mv "$work/otlp" "$folder"
echo "collector: $folder"
