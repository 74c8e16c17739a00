#!/usr/bin/env bash
# Training on all workers of a Cloud TPU VM slice; a spot slice that is taken away is asked for again.
#
#   TPU=pretraining ZONE=us-west4-a configs/launch/tpu_vm.sh
#   TPU=pretraining ZONE=us-west4-a configs/launch/tpu_vm.sh train.steps=50000              # settings are added
#
# The workers find each other through the slice's metadata. `out` has to be a directory that all of them share: a
# Filestore mounted at /mnt/shared, say, as SETUP may do. On preemption a worker gets SIGTERM, and all end with status 75
# after saving a step; a worker that is lost at once is named by the others, which end too. Either way the loop goes on.
set -euo pipefail

TPU="${TPU:?the name of the slice}"
ZONE="${ZONE:?its zone}"
TYPE="${TYPE:-v5litepod-16}"
IMAGE="${IMAGE:-v2-alpha-tpuv5-lite}"
# What a new worker needs before it can train; this directory is copied to it first.
SETUP="${SETUP:-pip install --quiet './t5x_lite[tpu,gcs]'}"

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

command="cd t5x_lite && t5x-lite train configs/pretrain_10m.yaml data.path='/mnt/shared/books/*.txt' out=/mnt/shared/runs/pretrained \
  --unfinished-status 75 $*"

while true; do
  state="$(gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" --format='value(state)' || echo MISSING)"
  if [ "$state" != READY ]; then
    if [ "$state" != MISSING ]; then
      gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE" --quiet || true
    fi
    if ! gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$TYPE" --version "$IMAGE" --spot; then
      sleep 300
      continue
    fi
    gcloud compute tpus tpu-vm scp --recurse "$PWD" "$TPU":t5x_lite --zone "$ZONE" --worker=all
    on_all_workers "$SETUP"
  fi
  status=0
  on_all_workers "$command" || status=$?
  case "$status" in
    0) exit 0 ;;
    2) exit 2 ;; # a setting is wrong, and would be again
  esac
  sleep 30
done
