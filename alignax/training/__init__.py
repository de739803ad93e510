"""From a config to a trained model.

Reading order: loop (`train(config, workdir)`), step (one optimiser step), gradient (its
gradient, accumulated over micro-batches), build (from a config to the pieces of a run),
defaults (the keys of a config), ranges (of their numbers), config_flag (keys on the command
line), checks (what can be wrong in a config), plugins (the plug-ins of a config), loading
(models and tokenizers), on_policy (rollouts from a config), start_check (what must hold at
step 0), evaluation, stages (several runs in one config), parallel (scoring and sampling over
a mesh), optim (optimisers and schedules), explain (what a config would take), show (the
first rows of its data).
"""
