"""The output of a run: metrics, progress, tables and learning curves.

Reading order: metrics (metrics.jsonl, intervals, FLOPs), progress (the line in the
terminal), tables (metrics as text), curves (learning curves as pictures), trackers
(TensorBoard, Weights & Biases and others), events (TensorBoard files), model_card
(the README.md of an exported model).
"""
