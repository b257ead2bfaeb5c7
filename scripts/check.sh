#!/usr/bin/env bash
# Everything that can be said about the code without running it: scripts/check.sh [--fix]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1

failed=()
check() { # name, command...
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        printf 'check: %-14s ok\n' "$name"
    else
        printf 'check: %-14s FAILED: %s\n%s\n' "$name" "$*" "$output"
        failed+=("$name")
    fi
}

shell_syntax() {
    local file
    for file in scripts/*.sh .ci/run; do bash -n "$file" || return 1; done
}

if [ "${1:-}" = --fix ]; then
    ruff check -q --fix .
    ruff format -q .
    python scripts/make_docs.py
fi
check "ruff" ruff check .
check "format" ruff format --check .
check "types" mypy
check "layers" lint-imports
check "shell" shell_syntax
check "docs" python scripts/make_docs.py --check

if [ ${#failed[@]} -gt 0 ]; then
    printf 'check: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
