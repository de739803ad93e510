"""What survives a kill, and several processes as one run.

Reading order: checkpoint (what is saved and restored), workdirs (the folder of a run),
model_paths (what the
path of a model means), adapter_base (which base LoRA adapters belong to), hosts (start-up checks of several
processes), watchdog (runs that hang, or die again and
again), preemption (SIGTERM).
"""
