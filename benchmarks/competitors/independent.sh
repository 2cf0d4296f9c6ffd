#!/usr/bin/env bash
# One process per rank, none knows of the others: independent.sh NUM_WORKERS OPTIONS...
total_workers=$1
shift
workers=()
for ((worker_id = 0; worker_id < total_workers; worker_id++)); do
    CUDA_VISIBLE_DEVICES=$worker_id "${PYTHON:-python}" "$(dirname "$0")/independent_worker.py" \
        --worker_id "$worker_id" --total_workers "$total_workers" "$@" &
    workers+=($!)
done
status=0
for worker in "${workers[@]}"; do
    wait "$worker" || status=1
done
exit $status
