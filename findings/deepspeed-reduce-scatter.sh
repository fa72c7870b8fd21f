#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO stages 1 and 2: with "reduce_scatter": true no reduce-scatter is ever called.
#
# Expected: gradients are reduced by torch.distributed.reduce_scatter_tensor, which moves half the bytes of an all-reduce.
# Seen (torch 2.13.0, gloo, two ranks, 16,384 parameters, calls on tensors of more than 1,000 elements in one update):
#     use_multi_rank_bucket_allreduce true (the default)   all_reduce of all 16,384 gradients, then all_gather of weights
#     use_multi_rank_bucket_allreduce false                one reduce per rank of its 8,192 gradients, then all_gather
# Both stages behave alike. So the default moves 1.5 times the bytes of an update that reduce-scatters, and each rank receives
# gradients that it discards. Stage 3 does call reduce_scatter_tensor.
#
# Exit code: 0 if the behavior is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy setuptools wheel
DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cd "$folder"
cat >count.py <<'PYTHON'
"""Count the collectives of one update: count.py STAGE MULTI_RANK"""

import collections
import json
import os
import sys

import torch
import torch.distributed

counts: collections.Counter = collections.Counter()


def watch(name):
    inner = getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        sizes = [value.numel() for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        if max(sizes, default=0) > 1000:
            counts[name] += 1
        return inner(*args, **kwargs)

    setattr(torch.distributed, name, counted)


for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor"):
    watch(name)

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
deepspeed.init_distributed("gloo", verbose=False)
zero = {
    "stage": int(sys.argv[1]),
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": sys.argv[2] == "true",
    "overlap_comm": False,
}
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(4)))
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters()),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    },
)
counts.clear()
engine.backward(engine(torch.randn(2, 64)).square().mean())
engine.step()
if torch.distributed.get_rank() == 0:
    with open(f"{sys.argv[1]}-{sys.argv[2]}.json", "w") as file:
        json.dump(counts, file)
torch.distributed.barrier()
os._exit(0)
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
for stage in 1 2; do
    for multi in true false; do
        venv/bin/python -m torch.distributed.run --nproc-per-node 2 --master-port 29731 count.py $stage $multi >log 2>&1 ||
            { cat log; exit 1; }
        echo "stage $stage, use_multi_rank_bucket_allreduce $multi: $(cat $stage-$multi.json)"
    done
done
venv/bin/python - <<'PYTHON'
import json
import sys

changed = False
for stage in (1, 2):
    default, single = (json.load(open(f"{stage}-{multi}.json")) for multi in ("true", "false"))
    changed |= "reduce_scatter_tensor" in default or "reduce_scatter_tensor" in single
    changed |= default.get("all_reduce", 0) < 1 or single.get("reduce", 0) != 2
sys.exit(1 if changed else 0)
PYTHON
