#!/bin/sh
# Fetches the public JSON-Schema-Test-Suite, as the source package of Python's `jsonschema` carries it, and draws documents
# under each of its schemas (src/model/grammar/tests.rs):
#
#     scripts/json_schema_suite.sh            fetch into target/json-schema-suite, then test
#
# Needs pip. What is fetched stays under target/ and is used by tests only.
set -eu
cd "$(dirname "$0")/.."
into=target/json-schema-suite
if [ ! -d "$into/tests" ]; then
    mkdir -p "$into"
    python3 -m pip download --quiet --no-deps --no-binary :all: --dest "$into" jsonschema==4.26.0
    tar -xzf "$into"/jsonschema-*.tar.gz -C "$into" --strip-components 2 --wildcards '*/json/tests'
fi
NEUROND_TEST_JSON_SCHEMAS="$PWD/$into/tests" exec cargo test --lib grammar::tests::documents -- --nocapture
