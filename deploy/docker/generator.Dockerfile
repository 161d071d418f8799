# The generator: question encoder and decoding engine.
# Build from the project's root: docker build -f deploy/docker/generator.Dockerfile -t ragpair-generator:0.1.0 .
FROM python:3.11-slim AS build

# For generator_service/model/cpu_kernels.cpp.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Where torch alone comes from (a CPU or CUDA build); empty takes the default package index.
ARG TORCH_INDEX_URL=
ARG TORCH_VERSION=2.13.0

RUN python -m venv /opt/ragpair
ENV PATH=/opt/ragpair/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$TORCH_VERSION"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim

# cpu or gpu: on a GPU, Triton needs a C compiler for what calls its kernels, at the first start.
ARG DEVICE=cpu
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = gpu ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin ragpair
COPY --from=build /opt/ragpair /opt/ragpair
# A container's own loopback is of no use to its callers: listen on every address unless told otherwise.
# /tmp is what can be written to, also where the rest of the container cannot.
ENV PATH=/opt/ragpair/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/tmp/huggingface \
    TRITON_HOME=/tmp \
    RAG_GENERATOR_GRPC_HOST=0.0.0.0 \
    RAG_GENERATOR_HTTP_HOST=0.0.0.0
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 8052
ENTRYPOINT ["rag-generator"]
