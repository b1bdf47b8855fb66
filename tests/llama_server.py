"""llama.cpp's server on a GGUF file, until this process is killed: its destructor can wait forever for a thread.

python tests/llama_server.py MODEL.gguf [ADAPTER.gguf]      prints `address http://...`
"""

from __future__ import annotations

import sys
import time


def main(model: str, adapter: str | None = None) -> None:
    """Serve on a free port; prints its address."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.cpuparams.n_threads, parameters.warmup, parameters.verbosity = 256, 1, False, 0
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(parameters)
    print(f"address {server.listening_address}", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
