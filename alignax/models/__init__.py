"""Models: one decoder, and how its weights come and go."""
