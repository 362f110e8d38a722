"""llama.cpp's server on a GGUF file, as the wheel of xllamacpp has it, with as little rounding as it can.

python llama_server.py FILE --host HOST --port PORT
"""

import argparse
import signal

import xllamacpp as llama

parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
options = parser.parse_args()
settings = llama.CommonParams()
settings.model.path, settings.hostnames, settings.port = options.file, [options.host], options.port
settings.n_parallel, settings.n_ctx = 4, 2048
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = llama.Server(settings)
signal.pause()
