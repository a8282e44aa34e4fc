"""Segment images: `python predict.py checkpoint=PATH input=photo.jpg output=DIR`. Folders and globs work, too."""

from pem_lightning.run import main

if __name__ == "__main__":
    main("predict")
