"""Segment images: `python predict.py checkpoint=PATH input=photo.jpg output=DIR`. The input can be a folder or a glob."""

from pem_lightning.run import main

if __name__ == "__main__":
    main("predict")
