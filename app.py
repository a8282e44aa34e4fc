"""A local page that segments photographs and videos: `python app.py checkpoint=PATH`; all of it: `--cfg job`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    from pem_lightning.cli.launch import main

    main("app")
