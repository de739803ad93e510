"""Models: one decoder, its kernels, how it is sharded, and how its weights come and go.

Reading order: transformer (the decoder), attention (by tiles, with masks), contract
(matrix products), sharding (the mesh and the rule table), xla_head (from hidden states to
log-probabilities), pallas_head (the same as TPU kernels), kernels (attention kernels of
other libraries), fallback (where a faster path does not apply), lora (adapters), load,
families and gguf (weights of other formats), save, pine (attention over documents in any
order).
"""
