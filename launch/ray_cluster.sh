#!/usr/bin/env bash
# A node of a Ray cluster, by hand. Stays in the foreground; Ctrl-C or SIGTERM takes the node down.
#   launch/ray_cluster.sh head [options of ray start]
#   launch/ray_cluster.sh worker HEAD:6379 [options of ray start]
# Every node, and whoever submits, needs the same token: `ray get-auth-token --generate` writes ~/.ray/auth_token, or
# RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN give it. RAY_PORT (6379) and DASHBOARD_PORT (8265) are the head's;
# not one from 10002 to 19999, which Ray gives to workers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
usage() { echo "usage: launch/ray_cluster.sh head|worker HEAD:PORT [options of ray start]" >&2; exit 2; }
[ -d "$root/.venv" ] && PATH=$root/.venv/bin:$PATH # jobs run the `python` of this PATH
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  echo "there is no token: make one with ray get-auth-token --generate, and copy ~/.ray/auth_token to every node" >&2
  exit 2
fi
case ${1:-} in
head)
  shift
  echo "submit with: grpo submit RECIPE --address http://$(hostname):${DASHBOARD_PORT:-8265}"
  # the agent takes the jobs; its own port, 52365, may be another Ray's of this machine
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
