"""Segment images and videos: `python predict.py checkpoint=PATH input=photo.jpg output=DIR`; all of it: `--cfg job`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    from pem_lightning.cli.launch import main

    main("predict")
