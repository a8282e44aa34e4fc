"""Segment images and videos: `python predict.py checkpoint=PATH input=photo.jpg output=DIR`; all of it: `--cfg job`."""

from pem_lightning.cli.launch import main

if __name__ == "__main__":
    main("predict")
