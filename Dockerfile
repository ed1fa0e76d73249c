# The training image: CUDA, all containers and engines, the project itself. Build it in the root of the project:
#   docker build --tag nepa-dist .
# and give it GPUs, shared memory for the loader's workers, the images and a folder for the runs that user 10001 may write to:
#   docker run --gpus all --ipc host -v /data/imagenet:/data:ro -v ./runs:/app/runs nepa-dist pretrain vit_b --data /data

# CUDA 13.0 is what torch of constraints.txt is built for. "devel" has nvcc, which DeepSpeed asks for.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# OpenCV and libjpeg-turbo: ffcv compiles against them. python3-dev: torch.compile does. git: a run records the commit.
# Versions are not pinned here (DL3008): Ubuntu's archive drops old ones, so that a pinned build would soon fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git libopencv-dev libturbojpeg0-dev pkg-config python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 nepa \
    && python3 -m venv /opt/venv \
    && install --directory --owner nepa /app /app/runs
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app

# The libraries come before the code, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir nepa_dist jobs \
    && pip install --no-cache-dir --constraint constraints.txt pip \
    && pip install --no-cache-dir --constraint constraints.txt --build-constraint constraints.txt \
        --editable '.[deepspeed,fp8,slurm,streaming,webdataset]' \
    && pip install --no-cache-dir --constraint constraints.txt --build-constraint constraints.txt ffcv

COPY . .
RUN pip install --no-cache-dir --no-deps --build-constraint constraints.txt --editable .

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nepa-dist" \
      org.opencontainers.image.description="Distributed pretraining of vision transformers with NEPA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.2-devel-ubuntu24.04"

USER 10001
ENTRYPOINT ["python", "jobs/submit.py"]
