#!/usr/bin/env bash
# All that only a GPU can tell, on this machine's: bash benchmarks/gpu.sh [cifar10.zip, CIFAR-10 as images]
# Tables go to benchmarks/results/gpu-*.md, what stops and goes on to .epsd/. Each part that fails is named; the others run.
set -u
cd "$(dirname "$0")/.." || exit 1
images=${1:-}
out=benchmarks/results
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p .epsd
failed=0
part() { echo "== $1"; shift; "$@" || { echo "failed: $*" >&2; failed=1; }; }

part "steps, objectives, scoring" python benchmarks/gpu.py --parts step objectives scoring --write $out/gpu-steps.md
part "memory of the presets" python benchmarks/memory.py --device cuda --write $out/gpu-memory.md
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
  part "two processes over nccl" bash -ec "python stages/prepare.py
    for stage in prune train detect; do torchrun --nproc-per-node 2 stages/\$stage.py; done"
fi
if [ -n "$images" ]; then
  part "a whole run" python benchmarks/gpu.py --parts run --images "$images" --write $out/gpu-run.md
  for sparsity in 0.98 0.95 0.9; do  # several share the card; each stops and goes on by itself
    python benchmarks/comparison.py --preset cifar10-resnet18 --images "$images" --sparsities $sparsity \
      --scores epsd "random erk" prospr "epsd spread" "epsd shuffled" --objectives cskd pskd dlb cross_entropy --seeds 3 \
      --set train.epochs=30 --out .epsd/gpu-$sparsity.jsonl --write $out/gpu-scores-$sparsity.md &
  done
  wait
fi
exit $failed
