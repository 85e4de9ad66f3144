#!/usr/bin/env bash
# Puts an S3 server for the tests of log shipping into target/s3-server/: s3s-fs, which checks signatures and keeps objects as files.
#
#   scripts/s3_server.sh            builds it: a minute or two and 100 MB to fetch; does nothing when it is there
#   scripts/s3_server.sh --path     prints where it is, for NEUROND_TEST_S3
#
# Needs Rust. Its licence is Apache-2.0; it is run by tests only and no part of neurond.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.14.1
folder=target/s3-server
program=$folder/bin/s3s-fs

case ${1:-} in
-h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;;
--path) echo "$PWD/$program"; exit ;;
"") ;;
*) echo "s3_server: unknown argument $1; see --help" >&2; exit 2 ;;
esac

if "$program" --version 2>/dev/null | grep -qxF "s3s-fs $version"; then
    echo "the S3 server is in $folder" >&2
    exit
fi
echo "building s3s-fs $version into $folder" >&2
# Without the daemon's flags and folder: they are for another program.
env -u RUSTFLAGS -u CARGO_TARGET_DIR cargo install --quiet --locked --debug --version "$version" --features binary \
    --root "$folder" --target-dir "$folder/build" s3s-fs
rm -rf "$folder/build"
"$program" --version >&2
