"""What survives a kill, and several processes as one run.

Reading order: checkpoint (what is saved and restored), workdirs (the folder of a run),
adapter_base (which base LoRA adapters belong to), hosts (start-up checks of several
processes), watchdog (runs that hang, or die again and
again), preemption (SIGTERM).
"""
