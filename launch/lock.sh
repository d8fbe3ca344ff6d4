#!/usr/bin/env bash
# Makes locks/*.txt of pyproject.toml with uv, for Linux on x86-64. Versions that are in them stay where they can. uv takes
# the CPU build of torch from PyTorch's index or, where UV_FIND_LINKS is set, from that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
pythons="3.11 3.12 3.13"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
torch=(--torch-backend cpu)
[ -z "${UV_FIND_LINKS:-}" ] || torch=()

lock() { # NAME uv's arguments
  for python in $pythons; do
    cp "locks/$1.txt" "$made/$python"
    uv pip compile pyproject.toml --python-version "$python" --python-platform x86_64-manylinux_2_28 --no-header \
      --no-annotate --quiet --extra real "${@:2}" -o "$made/$python" >/dev/null
  done
  # One file for all: a line that is not every Python's says whose it is.
  # shellcheck disable=SC2086
  (cd "$made" && awk '
    !($0 in of) { lines[++n] = $0 }
    { of[$0] = of[$0] (of[$0] ? " or " : "") "python_version == \047" FILENAME "\047"; in_how_many[$0]++ }
    END { for (i = 1; i <= n; i++) print lines[i] (in_how_many[lines[i]] < ARGC - 1 ? " ; " of[lines[i]] : "") }
  ' $pythons) | LC_ALL=C sort --stable -t= -k1,1 >"locks/$1.txt"
}
lock dev --extra cpu --extra dev --override locks/overrides.txt "${torch[@]}"
lock cpu --extra cpu --override locks/overrides.txt "${torch[@]}"
lock gpu-dev --extra gpu --extra dev
lock gpu --extra gpu
