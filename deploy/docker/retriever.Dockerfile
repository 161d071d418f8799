# The retriever, with rag-index beside it to build and verify indexes.
# Build from the project's root: docker build -f deploy/docker/retriever.Dockerfile -t ragpair-retriever:0.1.0 .
FROM python:3.11-slim AS build

# Where torch alone comes from (a CPU or CUDA build); empty takes the default package index.
ARG TORCH_INDEX_URL=
ARG TORCH_VERSION=2.13.0
# cpu, gpu or cuvs: which faiss.
ARG EXTRAS=cpu

RUN python -m venv /opt/ragpair
ENV PATH=/opt/ragpair/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$TORCH_VERSION"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin ragpair
COPY --from=build /opt/ragpair /opt/ragpair
# A container's own loopback is of no use to its callers: listen on every address unless told otherwise.
ENV PATH=/opt/ragpair/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/tmp/huggingface \
    RAG_RETRIEVER_GRPC_HOST=0.0.0.0 \
    RAG_RETRIEVER_HTTP_HOST=0.0.0.0
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8051
ENTRYPOINT ["rag-retriever"]
