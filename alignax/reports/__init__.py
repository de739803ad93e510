"""What a run says while it runs and afterwards: metrics, progress, tables and curves.

Reading order: metrics (metrics.jsonl, intervals, FLOPs), progress (the line in the
terminal), tables (metrics as text), curves (learning curves as pictures), events
(TensorBoard files).
"""
