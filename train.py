"""Train PEM: `python train.py task=panoptic dataset=cityscapes`. `--help` lists choices, `--cfg job` the experiment."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    from pem_lightning.cli.launch import main

    main("train")
