"""llama.cpp's server on a GGUF file, until this process is killed: its destructor can wait forever for a thread.

python tests/llama_server.py MODEL.gguf [ADAPTER.gguf]      prints `address http://...`
"""

from __future__ import annotations

import sys
import time

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.cpuparams.n_threads, parameters.warmup, parameters.verbosity = 256, 1, False, 0
if len(sys.argv) > 2:
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
server = xllamacpp.Server(parameters)
print(f"address {server.listening_address}", flush=True)
time.sleep(600)
