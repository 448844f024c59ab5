# The environment of `make setup` on Debian 12, run as an ordinary user.
#   docker build -t slotstream .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD/data:/app/data" \
#       -v "$PWD/runs:/app/runs" slotstream accelerate launch -m train.pretrain --config configs/NAME.yaml
# PyTorch brings its CUDA libraries; the host has the NVIDIA driver and container toolkit.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# First what the installation depends on, so that a change of code does not repeat it.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY tools/setup.sh tools/setup.sh
RUN PIP_NO_CACHE_DIR=1 make setup && rm -rf /var/lib/apt/lists/*

COPY . .
RUN useradd --create-home slotstream && mkdir -p data runs && chown slotstream data runs \
    && mkdir -m 1777 /var/cache/numba
USER slotstream
# Any user id may run it: caches go where every user can write.
ENV PATH=/app/.venv/bin:$PATH HOME=/tmp NUMBA_CACHE_DIR=/var/cache/numba
RUN python -m tools.warm_up
CMD ["make", "help"]
