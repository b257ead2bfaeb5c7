#!/usr/bin/env bash
# The whole suite, as CI runs it: scripts/test.sh [--no-setup] [pytest arguments]
#
# Sets up .venv, makes the demo model and the training text, checks the code, then runs the fast tests on two workers and
# after them those in tests/integration, one at a time in two lanes side by side: real training, and real servers (marker
# `server`), which mostly wait. With pytest arguments, only one pytest with these.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --no-setup ]; then
    shift
else
    scripts/setup.sh --dev && .venv/bin/python scripts/fetch_demo_model.py && .venv/bin/python scripts/make_docs_corpus.py || exit $?
fi
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi

# The API server of the Kubernetes tests takes minutes to build, once; it is made beside the first tests, and kept.
if command -v apt-get >/dev/null; then nice scripts/kube_lab.sh build >/dev/null 2>&1 & fi

export OMP_NUM_THREADS=1 LLMKIT_KUBE_BUILD_S=600
code=0
step() { # name, command...: runs on after a failure, so that one run shows everything that is wrong
    local name=$1 started=$SECONDS
    shift
    printf '== %s\n' "$name"
    "$@" || { code=$?; printf '== %s FAILED (exit code %s)\n' "$name" "$code"; }
    printf '== %s took %s s\n' "$name" $((SECONDS - started))
}
step "checks" scripts/check.sh
step "fast tests" .venv/bin/python -m pytest -q -rs -n 2 -m "not integration"
both_lanes() {
    local server=0 training=0 log
    log=$(mktemp)
    .venv/bin/python -m pytest -q -rs -m "integration and server" --durations=10 >"$log" 2>&1 &
    .venv/bin/python -m pytest -q -rs -m "integration and not server" --durations=10 || training=$?
    wait $! || server=$?
    printf '== integration tests with servers\n'
    cat "$log"
    rm -f "$log"
    [ $training -eq 0 ] && [ $server -eq 0 ]
}
step "integration tests" both_lanes
if [ $code -eq 0 ]; then echo "all passed"; else echo "FAILED, see above"; fi
exit $code
