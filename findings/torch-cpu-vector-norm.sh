#!/usr/bin/env bash
# torch 2.13.0, CPU: the fp32 norm of a large tensor is off by up to 0.4%, because its squares are summed sequentially.
#
# Expected: torch.linalg.vector_norm sums pairwise, like torch.sum does, and is right to about 1e-7.
# Seen (x86_64, one thread): relative error for n standard normal values, against fp64
#     n            vector_norm   square().sum().sqrt()
#     1,000,000        1e-05         3e-08
#     10,000,000       4e-04         7e-08
#     50,000,000       4e-03         3e-08
# Tensor.norm, torch._foreach_norm and torch.nn.utils.get_total_norm (so clip_grad_norm_ too) give the same value.
# A gradient of 50 million elements on a CPU is therefore clipped at a norm that is 0.4% too low. On CUDA the reduction is
# chunked and right. Remedy: pass dtype=torch.float64, or sum the squares.
#
# Exit code: 0 if the behavior is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - <<'PYTHON'
import sys

import torch

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
errors = {}
print(f"torch {torch.__version__}")
for n in (10**6, 10**7, 5 * 10**7):
    x = torch.randn(n, generator=generator)
    exact = x.double().norm().item()
    values = {
        "vector_norm": torch.linalg.vector_norm(x).item(),
        "get_total_norm": torch.nn.utils.get_total_norm([x]).item(),
        "vector_norm fp64": torch.linalg.vector_norm(x, dtype=torch.float64).item(),
        "square().sum().sqrt()": x.square().sum().sqrt().item(),
    }
    errors[n] = {name: abs(value / exact - 1) for name, value in values.items()}
    print(f"{n:>11,}", {name: f"{error:.0e}" for name, error in errors[n].items()})
large = errors[5 * 10**7]
as_described = min(large["vector_norm"], large["get_total_norm"]) > 1e-3
as_described &= max(large["vector_norm fp64"], large["square().sum().sqrt()"]) < 1e-6
sys.exit(0 if as_described else 1)
PYTHON
