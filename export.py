"""Export a checkpoint for another runtime: `python export.py checkpoint=PATH format=onnx`; all of it: `--cfg job`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    from pem_lightning.cli.launch import main

    main("export")
