#!/usr/bin/env bash
# Run a recipe as a job of a Ray cluster that is only on this machine: start Ray with a job server on the loopback
# interface, run `grpo submit`, and stop Ray at the end. The exit code is that of the run. On Ctrl-C and SIGTERM the run
# saves and stops.
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

# setsid: Ctrl-C must not reach Ray, because the run needs Ray to finish its step. Port 0 is for the agent, which accepts
# the jobs: its default port, 52365, may be in use by another Ray on this machine, such as the private Ray of a run.
setsid ray start --head --block --node-ip-address=127.0.0.1 --port="$port" --dashboard-host=127.0.0.1 \
  --dashboard-port="$dashboard" --dashboard-agent-listen-port=0 --temp-dir="$folder/ray" >"$folder/ray.log" 2>&1 &
ray=$!
trap 'trap "" INT TERM; kill "$ray" 2>/dev/null || true; wait "$ray" || true; rm -rf "$folder"' EXIT
until (: <"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; do
  kill -0 "$ray" 2>/dev/null || { cat "$folder/ray.log" >&2; exit 1; }
  sleep 1
done

trap 'kill -TERM "$run"' INT TERM # TERM, because a background process of bash ignores INT until it sets a handler
grpo submit "$@" --address "http://127.0.0.1:$dashboard" --stop-on-signal &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait`, but not the run
  code=0
  wait "$run" || code=$?
done
exit "$code"
