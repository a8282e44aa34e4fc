"""Evaluate a checkpoint: `python evaluate.py checkpoint=PATH`. It knows everything else; overrides win."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    from pem_lightning.cli.launch import main

    main("evaluate")
