"""Train PEM: `python train.py task=panoptic dataset=cityscapes`. `--help` lists choices, `--cfg job` the experiment."""

from pem_lightning.cli.launch import main

if __name__ == "__main__":
    main("train")
