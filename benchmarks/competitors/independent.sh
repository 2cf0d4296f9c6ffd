#!/usr/bin/env bash
# One process per rank, none knows of the others: independent.sh NUM_WORKERS OPTIONS...
set -u

total_workers=$1
shift
script="$(dirname "$0")/independent_worker.py"

workers=()
for ((worker_id = 0; worker_id < total_workers; worker_id++)); do
    CUDA_VISIBLE_DEVICES=$worker_id "${PYTHON:-python}" "$script" \
        --worker_id "$worker_id" --total_workers "$total_workers" "$@" &
    workers+=($!)
done

status=0
for worker_id in "${!workers[@]}"; do
    if ! wait "${workers[$worker_id]}"; then
        echo "worker $worker_id failed" >&2
        status=1
    fi
done
exit $status
