"""Directories of the AdapterHub library, `adapters`: read onto our methods, and written.

    adapter_config.json          settings, and what base they are for
    adapter.safetensors          tensors, or pytorch_adapter.bin
    head_config.json             of a head saved with it; model_head.safetensors or a .bin
    adapter_fusion_config.json   of a fusion, whose members are saved elsewhere
    adapter_setup.json           a composition; its adapters and fusions lie in folders below

Also those of its forerunner adapter-transformers. A file here that defines `KIND` reads one kind of
settings; no list names them. Nothing is imported here, so that files are looked at without torch.
"""
