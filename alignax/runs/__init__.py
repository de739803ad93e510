"""Checkpoints and the folder of a run, and several processes as one run.

Reading order: checkpoint (saves and restores a state), workdirs (the folder of a run),
model_paths (the kinds of model paths), adapter_base (which base LoRA adapters belong to),
hosts (start-up checks of several processes), lease (one process per folder), watchdog (runs
that hang or fail repeatedly), preemption (SIGTERM, Ctrl-C).
"""
