#!/usr/bin/env bash
# A real Slurm on this one machine, for tests: scripts/slurm_lab.sh up|down FOLDER [NODES]
#
# Installs Debian's packages where they are missing (as root). Everything it starts listens on the loopback address only
# and keeps its files in FOLDER: munged, mariadbd (a socket, no port), slurmdbd, slurmctld, and a slurmd for each node.
# `up` prints nothing but `export SLURM_CONF=...`; the daemons' logs are in FOLDER/log.
set -euo pipefail

usage() {
    echo "usage: scripts/slurm_lab.sh up|down FOLDER [NODES]" >&2
    exit 2
}
[ $# -ge 2 ] || usage
verb=$1
mkdir -p "$2"
lab=$(cd "$2" && pwd)
nodes=${3:-2}
ports=$((17000 + RANDOM % 20000))

fail() {
    echo "slurm_lab: $1" >&2
    tail -n 5 "$lab"/log/*.log >&2 2>/dev/null || true
    exit 6
}

packages() {
    command -v slurmctld >/dev/null && command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null && return
    export DEBIAN_FRONTEND=noninteractive
    # No daemon of a package's own may start: they would use the default ports.
    [ -e /usr/sbin/policy-rc.d ] || printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    { apt-get update -qq && apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends \
        slurmctld slurmd slurmdbd slurm-client munge mariadb-server; } >"$lab/log/apt.log" 2>&1 ||
        fail "Debian's packages of Slurm could not be installed"
}

within() { # seconds, what, command...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what did not come up"
        sleep 0.2
    done
}

munge_up() {
    (umask 077 && head -c 1024 /dev/urandom >"$lab/munge/key")
    munged --force --num-threads=2 --key-file="$lab/munge/key" --socket="$lab/munge/socket" \
        --pid-file="$lab/run/munged.pid" --log-file="$lab/log/munged.log" --seed-file="$lab/munge/seed"
}

database_up() {
    mariadb-install-db --user=root --datadir="$lab/db" --auth-root-authentication-method=normal >"$lab/log/db-install.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$lab/db" --socket="$lab/run/db.sock" --skip-networking \
        --pid-file="$lab/run/mariadbd.pid" --innodb-buffer-pool-size=32M --innodb-flush-log-at-trx-commit=0 \
        >"$lab/log/mariadbd.log" 2>&1 &
    within 60 "mariadbd" mariadb -S "$lab/run/db.sock" -uroot -e 'select 1'
    mariadb -S "$lab/run/db.sock" -uroot -e "create database slurm_acct_db; create user slurm@localhost identified by 'slurm';
        grant all on slurm_acct_db.* to slurm@localhost"
    cat >"$lab/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((ports + 1))
SlurmUser=root
LogFile=$lab/log/slurmdbd.log
PidFile=$lab/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
    chmod 600 "$lab/etc/slurmdbd.conf"
    MYSQL_UNIX_PORT="$lab/run/db.sock" SLURM_CONF="$lab/etc/slurm.conf" slurmdbd
    within 60 "slurmdbd" bash -c "exec 3<>/dev/tcp/127.0.0.1/$((ports + 1))"
}

configure() {
    local host memory i
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
    {
        cat <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ports
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
StateSaveLocation=$lab/state
SlurmdPidFile=$lab/run/slurmd.%n.pid
SlurmdLogFile=$lab/log/slurmd.%n.log
SlurmdSpoolDir=$lab/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((ports + 1))
AccountingStoragePass=$lab/munge/socket
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=600
MessageTimeout=30
SlurmdTimeout=60
JobRequeue=1
CONF
        for i in $(seq "$nodes"); do
            echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((ports + 1 + i)) CPUs=2 RealMemory=$memory State=UNKNOWN"
        done
        echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
        echo "PartitionName=short Nodes=n[1-$nodes] MaxTime=00:02:00 State=UP"
    } >"$lab/etc/slurm.conf"
}

names() { # the processes of a run look the first node up by its name
    local i
    for i in $(seq "$nodes"); do
        grep -qE "^127\.0\.0\.1 n$i\$" /etc/hosts || echo "127.0.0.1 n$i" >>/etc/hosts
    done
}

all_idle() { [ "$(sinfo --noheader --Node --partition=main --format=%t | grep -c idle)" = "$nodes" ]; }

up() {
    local i
    mkdir -p "$lab"/{etc,log,run,munge,state}
    # munge trusts no folder that others may write to
    chmod 755 "$lab" && chmod 700 "$lab/munge"
    packages
    names
    configure
    munge_up
    database_up
    export SLURM_CONF=$lab/etc/slurm.conf
    sacctmgr --immediate add cluster lab >"$lab/log/sacctmgr.log" 2>&1 || true # it may have made itself known already
    slurmctld -f "$SLURM_CONF"
    for i in $(seq "$nodes"); do
        mkdir -p "$lab/spool.n$i"
        slurmd -f "$SLURM_CONF" -N "n$i"
    done
    within 60 "slurmctld" all_idle
    echo "export SLURM_CONF=$SLURM_CONF"
}

no_jobs() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }

jobs_gone() { # a job outlives the daemons that would have ended it
    [ -s "$lab/run/slurmctld.pid" ] && kill -0 "$(cat "$lab/run/slurmctld.pid")" 2>/dev/null || return 0
    timeout 20 scancel --user=root --state=PENDING 2>/dev/null || true
    timeout 20 scancel --user=root --full --signal=KILL 2>/dev/null || true
    timeout 20 scancel --user=root 2>/dev/null || true
    for _ in $(seq 60); do no_jobs && return; sleep 0.5; done
    echo "slurm_lab: some jobs have not ended: $(squeue --noheader --format='%i %T' 2>&1 | tr '\n' ' ')" >&2
}

down() {
    local file pid
    export SLURM_CONF=$lab/etc/slurm.conf
    jobs_gone
    for name in 'slurmd.*' slurmctld slurmdbd mariadbd munged; do
        for file in "$lab"/run/$name.pid; do
            [ -s "$file" ] || continue
            pid=$(cat "$file")
            kill "$pid" 2>/dev/null || continue
            # a slurmd without its controller takes minutes to obey
            for _ in $(seq 30); do [ -d "/proc/$pid" ] && sleep 0.1; done
            kill -9 "$pid" 2>/dev/null || true
        done
    done
}

case $verb in
up) up ;;
down) down ;;
*) usage ;;
esac
