#!/usr/bin/env bash
# transformers 5.24.0: generate(tokenizer=...) hands the tokenizer to every call of the model's forward.
#
# Expected: `tokenizer` serves stop strings inside generate, as documented, and is consumed there. Unused arguments of
# generate that forward does not know are refused ("The following `model_kwargs` are not used by the model").
# Seen: forward of a Llama receives tokenizer=<object> in its **kwargs, in the prefill and in each decoding step. Models
# that check their arguments fail, and so does `transformers serve`, which always passes a tokenizer.
#
# Exit code: 0 if the behavior is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
import transformers

shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape)).eval()
received = []
forward = model.forward


def watched(*args, **kwargs):
    received.append("tokenizer" in kwargs)
    return forward(*args, **kwargs)


model.forward = watched
tokenizer = object()  # only stop strings would use it
model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, tokenizer=tokenizer, pad_token_id=0)
print(f"transformers {transformers.__version__}: {sum(received)} of {len(received)} calls of forward got the tokenizer")
sys.exit(0 if received and all(received) else 1)
PYTHON
