#!/usr/bin/env bash
# A run on this machine. Killed, it starts again by itself; started again after a reboot or Ctrl-C, it resumes the run.
#
#   launch/local.sh CONFIG OUTPUT_DIR [KEY=VALUE]...
#   launch/local.sh configs/quickstart.yaml runs/quickstart workers=4
set -euo pipefail

config=${1:?usage: launch/local.sh CONFIG OUTPUT_DIR [KEY=VALUE]...}
output=${2:?usage: launch/local.sh CONFIG OUTPUT_DIR [KEY=VALUE]...}
shift 2

# exec: signals reach the command itself, which passes them on to the run, and that saves what is committed before it ends.
# shellcheck disable=SC2086  # BOMEMETA may be several words
exec ${BOMEMETA:-uv run bomemeta} train "$config" output_dir="$output" --auto-resume --restarts 3 "$@"
