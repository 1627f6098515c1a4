"""Checkpoints on disk: `save` writes one, `restore` brings it back, `directory` knows which there are."""
