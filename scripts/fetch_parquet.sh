#!/usr/bin/env bash
# Puts pyarrow, which reads the Parquet files of the tests (150 MB, Apache-2.0), into a folder.
#
#   scripts/fetch_parquet.sh           target/test-parquet, where the tests look for it
#   scripts/fetch_parquet.sh FOLDER    somewhere else: name it in NEUROND_TEST_PARQUET
#
# Needs Python 3 with pip. Does nothing when it is there. Installed nowhere else.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;; esac
folder=${1:-target/test-parquet}
die() { echo "fetch_parquet: $*" >&2; exit 1; }

command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
if PYTHONPATH=$folder python3 -c 'import pyarrow.parquet' 2>/dev/null; then
    echo "reader of Parquet: $folder is there"
    exit
fi
python3 -m pip --version >/dev/null 2>&1 ||
    die "pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)"
# Beside the target, so that the last step is a rename.
mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "reader of Parquet: downloading pyarrow with pip"
python3 -m pip install --quiet --disable-pip-version-check --only-binary :all: \
    --target "$work/parquet" pyarrow==24.0.0 || die "pip could not fetch it: is the network there?"
PYTHONPATH=$work/parquet python3 -c 'import pyarrow.parquet' || die "what pip fetched cannot be used"
rm -rf "${folder:?}"
mv "$work/parquet" "$folder"
echo "reader of Parquet: $folder"
