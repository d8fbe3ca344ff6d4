#!/usr/bin/env bash
# A run by the way that it takes on a cluster, on this machine alone: a Ray with a job server on the loopback interface,
# `grpo submit` to it, and Ray taken down at the end. The exit code is the run's; Ctrl-C and SIGTERM stop it, saved.
#   launch/local.sh RECIPE [section.option=value ...] [options of grpo submit]
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: launch/local.sh RECIPE [section.option=value ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
[ -d "$root/.venv" ] && PATH=$root/.venv/bin:$PATH
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free_port) dashboard=$(free_port)
grpo submit "$@" --address "http://127.0.0.1:$dashboard" --dry-run >/dev/null # a misspelt recipe, before Ray is started
folder=$(mktemp -d /tmp/grpo-local-XXXXXX)

# setsid: Ctrl-C is for the run, which needs Ray to finish its step. The agent takes the jobs; its own port, 52365, may be
# another Ray's of this machine, also that of a run without a cluster
setsid ray start --head --block --node-ip-address=127.0.0.1 --port="$port" --dashboard-host=127.0.0.1 \
  --dashboard-port="$dashboard" --dashboard-agent-listen-port=0 --temp-dir="$folder/ray" >"$folder/ray.log" 2>&1 &
ray=$!
trap 'trap "" INT TERM; kill "$ray" 2>/dev/null || true; wait "$ray" || true; rm -rf "$folder"' EXIT
until (: <"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; do
  kill -0 "$ray" 2>/dev/null || { cat "$folder/ray.log" >&2; exit 1; }
  sleep 1
done

trap 'kill -TERM "$run"' INT TERM # not INT, which bash lets a process in the background ignore until it takes it
grpo submit "$@" --address "http://127.0.0.1:$dashboard" --stop-on-signal &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal has ended the wait, not the run
  code=0
  wait "$run" || code=$?
done
exit "$code"
