#!/usr/bin/env bash
# A run as a job on a Ray cluster that is there already. Its driver starts again when it is killed (--restarts 3, the default); submitted
# again, the run resumes.
#
#   export RAY_API_SERVER_ADDRESS=http://HEAD:8265
#   launch/job_submit.sh CONFIG OUTPUT WORKERS [KEY=VALUE]...
#   launch/job_submit.sh configs/quickstart.yaml /shared/runs/quickstart 8
#
# OUTPUT is an absolute path that all of the cluster's machines share, or a URI such as s3://BUCKET/RUN.
# The cluster has bomemeta installed; where it only has uv, add WITH_UV=--uv. (uv itself sets UV.)
# A cluster with tokens: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) as on the cluster.
set -euo pipefail

config=${1:?usage: launch/job_submit.sh CONFIG OUTPUT WORKERS [KEY=VALUE]...}
output=${2:?usage: launch/job_submit.sh CONFIG OUTPUT WORKERS [KEY=VALUE]...}
workers=${3:?usage: launch/job_submit.sh CONFIG OUTPUT WORKERS [KEY=VALUE]...}
shift 3

# shellcheck disable=SC2086  # BOMEMETA may be several words, WITH_UV none
exec ${BOMEMETA:-uv run bomemeta} submit "$config" output_dir="$output" workers="$workers" "$@" ${WITH_UV:-}
