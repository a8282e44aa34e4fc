"""Evaluate a checkpoint: `python evaluate.py checkpoint=PATH`. It knows everything else; overrides win."""

from pem_lightning.cli.launch import main

if __name__ == "__main__":
    main("evaluate")
