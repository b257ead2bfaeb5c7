#!/usr/bin/env bash
# A real Kubernetes API server with etcd on this machine, for tests: no kubelet, no controllers, no operator.
#
#   scripts/kube_lab.sh packages    install etcd and kubectl
#   scripts/kube_lab.sh build       kube-apiserver from Debian's source package (once; about 6 minutes of processor time)
#   scripts/kube_lab.sh up DIR      start both; DIR/kubeconfig has the contexts admin, alice (may do nothing) and expired
#   scripts/kube_lab.sh api DIR     start the API server again, on the same data (after a test has killed it)
#   scripts/kube_lab.sh down DIR    stop both
#
# The binary is kept in $LLMKIT_KUBE_CACHE, ~/.cache/llmkit/kube by default.
set -euo pipefail
cache=${LLMKIT_KUBE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llmkit/kube}
api=$cache/kube-apiserver

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi; }

packages() { # name...: installs what is missing
    local missing=() name
    for name in "$@"; do dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name"); done
    [ ${#missing[@]} -eq 0 ] && return 0
    as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "${missing[@]}" >/dev/null
}

runtime_packages() { # kubectl may come from elsewhere, and newer
    packages etcd-server openssl
    command -v kubectl >/dev/null || packages kubernetes-client
}

build() {
    mkdir -p "$cache"
    exec 8>"$cache/.build.lock"
    flock 8 # a second build waits for the first, and finds its binary
    runtime_packages
    [ -x "$api" ] && return 0
    packages golang-go golang-github-modern-go-reflect2-dev golang-github-json-iterator-go-dev jq rsync make dpkg-dev openssl
    local work
    work=$(mktemp -d)
    source_package "$work" >"$cache/build.log" 2>&1 || { tail -n 5 "$cache/build.log" >&2; return 1; }
    compile "$work/kubernetes" >>"$cache/build.log" 2>&1 || { tail -n 5 "$cache/build.log" >&2; return 1; }
    mv "$work/kubernetes/_output/bin/kube-apiserver" "$api"
    rm -rf "$work"
}

source_package() { # folder: Debian's source of Kubernetes, by package lists of its own
    mkdir -p "$1/lists/partial" "$1/parts"
    sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources >"$1/parts/source.sources"
    local options=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$1/parts" -o "Dir::State::lists=$1/lists")
    cd "$1"
    as_root apt-get "${options[@]}" update -qq
    as_root apt-get "${options[@]}" source --download-only kubernetes
    dpkg-source -x --no-check kubernetes_*.dsc kubernetes
}

compile() { # folder
    cd "$1"
    local name
    # Two vendored packages do not compile with Debian's Go; its own newer ones do.
    for name in modern-go/reflect2 json-iterator/go; do
        find "vendor/github.com/$name" -maxdepth 1 \( -name '*.go' -o -name '*.s' \) -delete
        find "/usr/share/gocode/src/github.com/$name" -maxdepth 1 \( -name '*.go' -o -name '*.s' \) ! -name '*_test.go' \
            -exec cp {} "vendor/github.com/$name/" \;
    done
    mkdir -p .go/src/k8s.io
    ln -sfn ../../.. .go/src/k8s.io/kubernetes
    GOPATH=$PWD/.go GOFLAGS='' GOPROXY=off GO111MODULE=off CGO_ENABLED=0 KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 \
        KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive \
        make WHAT=cmd/kube-apiserver GOLDFLAGS='-s -w'
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

wait_for() { # seconds, pid, command...: until the command succeeds or the process is gone
    local end=$((SECONDS + $1)) pid=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $end ] || ! kill -0 "$pid" 2>/dev/null; then return 1; fi
        sleep 0.1
    done
}

up() { # folder
    [ -x "$api" ] || { echo "kube-apiserver is not built: scripts/kube_lab.sh build" >&2; exit 1; }
    mkdir -p "$1/etcd" "$1/certificates"
    cd "$1"
    free_port >etcd.port
    free_port >api.port
    local etcd_url peer
    etcd_url=http://127.0.0.1:$(cat etcd.port)
    peer=http://127.0.0.1:$(free_port)
    setsid etcd --name lab --data-dir etcd --unsafe-no-fsync --listen-client-urls "$etcd_url" \
        --advertise-client-urls "$etcd_url" --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
        --initial-cluster "lab=$peer" >etcd.log 2>&1 </dev/null &
    echo $! >etcd.pid
    wait_for 30 "$(cat etcd.pid)" curl -sf "$etcd_url/health" || { tail -n 5 etcd.log >&2; exit 1; }
    openssl genrsa -out certificates/accounts.key 2048 2>/dev/null
    openssl rsa -in certificates/accounts.key -pubout -out certificates/accounts.pub 2>/dev/null
    printf '%s\n' 'lab-admin,admin,admin,"system:masters"' 'lab-alice,alice,alice,""' >tokens.csv
    start_api .
    cat >kubeconfig <<K
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://127.0.0.1:$(cat api.port)", certificate-authority: $PWD/certificates/apiserver.crt}}]
users: [{name: admin, user: {token: lab-admin}}, {name: alice, user: {token: lab-alice}}, {name: expired, user: {token: gone}}]
contexts:
  - {name: admin, context: {cluster: lab, user: admin, namespace: default}}
  - {name: alice, context: {cluster: lab, user: alice, namespace: default}}
  - {name: expired, context: {cluster: lab, user: expired, namespace: default}}
current-context: admin
K
}

start_api() { # folder
    cd "$1"
    setsid "$api" --etcd-servers="http://127.0.0.1:$(cat etcd.port)" --bind-address=127.0.0.1 \
        --advertise-address=127.0.0.1 --secure-port="$(cat api.port)" --cert-dir=certificates \
        --service-account-issuer=https://lab.local --service-account-signing-key-file=certificates/accounts.key \
        --service-account-key-file=certificates/accounts.pub --service-cluster-ip-range=10.0.0.0/24 \
        --authorization-mode=RBAC --token-auth-file=tokens.csv --disable-admission-plugins=ServiceAccount \
        --kubelet-preferred-address-types=InternalIP --endpoint-reconciler-type=none >>api.log 2>&1 </dev/null &
    echo $! >api.pid
    wait_for 90 "$(cat api.pid)" curl -skf -H 'Authorization: Bearer lab-admin' "https://127.0.0.1:$(cat api.port)/readyz" \
        || { tail -n 5 api.log >&2; exit 1; }
}

down() { # folder
    local name
    for name in api etcd; do
        [ -f "$1/$name.pid" ] && kill "$(cat "$1/$name.pid")" 2>/dev/null || true
    done
}

case ${1:-} in
build) build ;;
packages) runtime_packages ;;
up) up "${2:?up DIR}" ;;
api) start_api "${2:?api DIR}" ;;
down) down "${2:?down DIR}" ;;
*) sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
