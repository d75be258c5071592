"""A checkpoint without its weights; imports nothing by itself.

`spec` puts it together: `config` reads config.json, `headers` the safetensors files, `template` says which tensors make
which unit, `hub` finds what the local cache holds.
"""
