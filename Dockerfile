# The layers that change least often come first: packages, model, code. No step needs a compiler, and none leaves a
# download, a cache or the token in its layer, so one stage is enough.
FROM python:3.11-slim

# NVIDIA_* as in NVIDIA's own images: without them a container runtime may provide no GPU.
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app

# PyTorch and the CUDA libraries it requires come from PyTorch's index, everything else from PyPI, so no package can come
# from the wrong one. The build for CUDA 12.6 runs on every driver for CUDA 12 and 13. PyTorch also requires triton, a
# compiler of 0.7 GB that this worker never uses, so it is not installed.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
COPY requirements.txt builder/constraints.txt ./
RUN pip install --no-cache-dir --no-compile --no-deps -r constraints.txt \
    && pip install --no-cache-dir --no-compile --no-deps --index-url "$TORCH_INDEX" "$(grep ^torch== requirements.txt)" \
    && sed -nE 's/^Requires-Dist: ((cuda|nvidia)-.*)/\1/p' /usr/local/lib/python3.11/*/torch-*.dist-info/METADATA >cuda.txt \
    && pip install --no-cache-dir --no-compile --index-url "$TORCH_INDEX" -r cuda.txt \
    && rm cuda.txt

# The worker's user cannot write bytecode, so all of it is compiled here, Python's own library included. It is never
# checked against the sources: a reproducible build changes their times. -f replaces bytecode that is checked; -x skips a
# file of PyTorch's that needs a newer Python.
RUN python -m compileall -qf -j 0 -x py312_intrinsics --invalidation-mode unchecked-hash /usr/local/lib/python3.11

# The model in float16. Another one: --build-arg MODEL_ID=..., a hub id or owner/name/file.safetensors, which takes all but
# its weights from BASE_MODEL; none: --build-arg MODEL_ID=; a gated one also needs --secret id=hf_token,src=FILE. Only the modules that fetch it are copied first, so other edits do not fetch it again.
ARG MODEL_ID=CompVis/stable-diffusion-v1-4
ARG MODEL_REVISION=
ARG BASE_MODEL=CompVis/stable-diffusion-v1-4
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/fetch_model.py builder/
COPY src/__init__.py src/errors.py src/setting_types.py src/settings.py src/
COPY src/model/__init__.py src/model/checks.py src/model/cuda_driver.py src/model/hub.py src/model/loading.py \
    src/model/loras.py src/model/places.py src/model/repository.py src/model/single_file.py src/model/
RUN --mount=type=cache,target=/tmp/huggingface --mount=type=secret,id=hf_token \
    [ -z "$MODEL_ID" ] \
    || HF_HOME=/tmp/huggingface HF_TOKEN_PATH=/run/secrets/hf_token PYTHONDONTWRITEBYTECODE=1 \
    python -m builder.fetch_model --model "$MODEL_ID" --revision "$MODEL_REVISION" --base "$BASE_MODEL" --output /model

# The list of files that a start reads lets each start read them ahead.
COPY handler.py test_input.json ./
COPY builder/record_start.py builder/
COPY src src
RUN python -m compileall -q --invalidation-mode unchecked-hash . \
    && python -m builder.record_start --output src/start_files.txt \
    && echo "worker:x:1000:1000::/app:/usr/sbin/nologin" >> /etc/passwd \
    && chown 1000:1000 .
USER 1000:1000

# The model is in the image or in RunPod's cache, so the worker never asks the hub.
ENV HOME=/app MODEL_ID=${MODEL_ID:+/model} BASE_MODEL=${MODEL_ID:+/model} HF_HUB_OFFLINE=1
CMD ["python", "handler.py"]

ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Stable Diffusion worker for RunPod Serverless" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="MIT AND LicenseRef-CreativeML-Open-RAIL-M"
