# docker build -t pem-lightning .                        # CPU
# docker build -t pem-lightning --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .     # NVIDIA GPUs
# docker run --rm -v "$PWD:/work" pem-lightning predict checkpoint=camvid input=street.jpg
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" --user "$(id -u):$(id -g)" pem-lightning train ...
FROM python:3.12-slim

# The builds of torch bring what they need of CUDA; the machine only needs NVIDIA's driver and container toolkit.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Of pyproject.toml's, comma-separated.
ARG EXTRAS=export

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/tmp MPLCONFIGDIR=/tmp
WORKDIR /source
# First what changes rarely, so that a new build reuses it.
COPY requirements.txt ./
RUN pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
        "$(grep '^torch==' requirements.txt)" \
    && pip install -r requirements.txt
COPY . .
RUN pip install ".[$EXTRAS]" && rm -rf /source/*

RUN useradd --create-home pem && mkdir /work && chown pem /work
USER pem
WORKDIR /work
ENTRYPOINT ["pem"]
