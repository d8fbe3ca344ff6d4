#!/usr/bin/env bash
# Start a node of a Ray cluster in the foreground. Ctrl-C or SIGTERM stops the node.
#   launch/ray_cluster.sh head [options of ray start]
#   launch/ray_cluster.sh worker HEAD:6379 [options of ray start]
# All nodes and the submitting machine need the same token: `ray get-auth-token --generate` writes it to
# ~/.ray/auth_token. RAY_AUTH_TOKEN, or a file that RAY_AUTH_TOKEN_PATH names, takes precedence. RAY_PORT (6379) and
# DASHBOARD_PORT (8265) set the ports of the head. They must not be from 10002 to 19999, which Ray uses for workers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
usage() { echo "usage: launch/ray_cluster.sh head|worker HEAD:PORT [options of ray start]" >&2; exit 2; }
[ -d "$root/.venv" ] && PATH=$root/.venv/bin:$PATH # jobs run the `python` of this PATH
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  echo "there is no token: create one with ray get-auth-token --generate, and copy ~/.ray/auth_token to every node" >&2
  exit 2
fi
case ${1:-} in
head)
  shift
  echo "submit with: grpo submit RECIPE --address http://$(hostname):${DASHBOARD_PORT:-8265}"
  # port 0 for the agent, which accepts the jobs: its default, 52365, may be in use by another Ray on this machine
  exec ray start --head --block --port="${RAY_PORT:-6379}" --dashboard-agent-listen-port=0 \
    --dashboard-host=0.0.0.0 --dashboard-port="${DASHBOARD_PORT:-8265}" "$@"
  ;;
worker)
  [ $# -ge 2 ] || usage
  address=$2
  shift 2
  exec ray start --block --address="$address" --dashboard-agent-listen-port=0 "$@"
  ;;
*) usage ;;
esac
