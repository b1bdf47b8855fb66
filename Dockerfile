# tunesmith for CPUs and, with the NVIDIA container toolkit, for GPUs: PyTorch's packages bring CUDA with them.
#   docker build -t tunesmith .
#   docker run --rm -it --gpus all -v "$PWD:/work" tunesmith train my.yaml
FROM python:3.11-slim-bookworm

# A compiler, because Triton compiles a small launcher the first time a kernel runs on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The cache of hubs and compiled kernels needs a home that the user may write to, whoever that is (docker run --user).
RUN useradd --create-home --uid 1000 trainer && chmod 1777 /home/trainer
ENV HOME=/home/trainer PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY configs configs
COPY recipes recipes
COPY datasets datasets
COPY docs docs
RUN pip install --constraint constraints.txt ".[flash]" && rm -rf build

USER 1000
WORKDIR /work
ENTRYPOINT ["trainer"]
CMD ["--help"]
