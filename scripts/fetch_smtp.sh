#!/usr/bin/env bash
# Puts the mail server of the tests (aiosmtpd, and trustme for its certificate: 21 MB, both free) into a folder.
#
#   scripts/fetch_smtp.sh              target/test-smtp, where tests/alerts.rs looks for it
#   scripts/fetch_smtp.sh FOLDER       somewhere else: name it in NEUROND_TEST_SMTP
#
# Needs Python 3 with pip. Does nothing when it is there. Installed nowhere else.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;; esac
folder=${1:-target/test-smtp}
die() { echo "fetch_smtp: $*" >&2; exit 1; }

command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
if PYTHONPATH=$folder python3 -c 'import aiosmtpd, trustme' 2>/dev/null; then
    echo "mail server: $folder is there"
    exit
fi
python3 -m pip --version >/dev/null 2>&1 ||
    die "pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)"
# Beside the target, so that the last step is a rename.
mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "mail server: downloading aiosmtpd and trustme with pip"
python3 -m pip install --quiet --disable-pip-version-check \
    --target "$work/smtp" aiosmtpd==1.4.6 trustme==1.2.1 || die "pip could not fetch them: is the network there?"
PYTHONPATH=$work/smtp python3 -c 'import aiosmtpd, trustme' || die "what pip fetched cannot be used"
rm -rf "${folder:?}"
mv "$work/smtp" "$folder"
echo "mail server: $folder"
