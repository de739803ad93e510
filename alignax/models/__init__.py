"""Models: one decoder-only transformer, its kernels, its sharding, and its file formats.

Reading order: transformer (the decoder), sizes (what its settings may be), rope (rotary
embeddings and their scalings), attention (by tiles, with masks), contract (matrix
products), int8 (frozen weights in half the memory), sharding (the mesh and the rule table),
xla_head (from hidden states to log-probabilities), pallas_head (the same as TPU kernels),
kernels (attention kernels of other libraries), fallback (logs where a faster kernel does not
apply), lora (adapters), peft (folders of adapters), json_object (settings beside weights),
stored (tensors in files), load, families and gguf (weights of other formats), save, pine
(attention that does not depend on the order of documents).
"""
