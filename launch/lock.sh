#!/usr/bin/env bash
# Update locks/*.txt from pyproject.toml with uv, for Linux on x86-64. Locked versions are kept if possible. The CPU
# build of torch comes from PyTorch's index or, if UV_FIND_LINKS is set, from that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
pythons="3.11 3.12 3.13"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
torch=(--torch-backend cpu)
[ -z "${UV_FIND_LINKS:-}" ] || torch=()

lock() { # NAME [arguments of uv pip compile]
  for python in $pythons; do
    cp "locks/$1.txt" "$made/$python"
    uv pip compile pyproject.toml --python-version "$python" --python-platform x86_64-manylinux_2_28 --no-header \
      --no-annotate --quiet --extra real "${@:2}" -o "$made/$python" >/dev/null
  done
  # Merge the files. A line that not all versions of Python need gets a marker.
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
