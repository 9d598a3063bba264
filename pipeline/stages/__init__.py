"""The stages of a run: one file each; ``order`` says which there are."""
