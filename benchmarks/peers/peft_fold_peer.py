"""Fold an adapter with PEFT as its documentation says: `peft_fold_peer.py BASE ADAPTER OUT`.

The base is loaded in the dtype that it is stored in.
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
