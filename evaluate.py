"""Evaluate a checkpoint: `python evaluate.py checkpoint=PATH`. Everything else is known from it and can be overridden."""

from pem_lightning.run import main

if __name__ == "__main__":
    main("evaluate")
