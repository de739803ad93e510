"""Generates responses to a file of prompts, as a config describes; can be resumed.

Reading order: respond (the loop over finished prompts), starts (prompts and the given
beginnings of responses), row_settings (settings that prompts bring), responder (builds what
answers them), output (the file of responses).
"""
