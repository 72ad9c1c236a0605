# One stage: no compiler is needed, and what must not stay (downloads, caches, a token) is never in a layer to begin with.
# Layers go from the least to the most often changed: packages, model, code.
FROM python:3.11-slim

# NVIDIA_*: what NVIDIA's own images set, so that a container runtime lends the GPU.
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app

# Each package comes from one index only: those of constraints.txt from PyPI, PyTorch and the CUDA libraries that it asks
# for from PyTorch's, whose build for CUDA 12.6 runs on every driver of CUDA 12 and 13. Not installed is triton, which
# PyTorch asks for too: it compiles kernels that nothing here uses, 0.7 GB. Left out are tests and the CUDA libraries that
# no other library and nothing of PyTorch's names: cuSOLVER for several GPUs, NVRTC's other build, code for triton.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
COPY requirements.txt builder/constraints.txt ./
RUN pip install --no-cache-dir --no-compile --no-deps -r constraints.txt \
    && pip install --no-cache-dir --no-compile --no-deps --index-url "$TORCH_INDEX" "$(grep ^torch== requirements.txt)" \
    && sed -nE 's/^Requires-Dist: ((cuda|nvidia)-.*)/\1/p' /usr/local/lib/python3.11/*/torch-*.dist-info/METADATA >cuda.txt \
    && pip install --no-cache-dir --no-compile --index-url "$TORCH_INDEX" -r cuda.txt \
    && rm cuda.txt \
    && find /usr/local/lib/python3.11 \( -type d -name tests -o -name 'libcusolverMg.so*' -o -name 'libnvrtc*.alt.so*' \
        -o -name 'libnvshmem_device.*' \) -prune -exec rm -r {} +

# Bytecode is made here, for Python's own library too, since the worker's user cannot write it, and is not checked against
# the times of the sources, which a reproducible build sets: -f replaces what pip left of the other kind, -x skips a file
# of PyTorch's that needs a newer Python.
RUN python -m compileall -qf -j 0 -x py312_intrinsics --invalidation-mode unchecked-hash /usr/local/lib/python3.11

# The model in float16: another one is --build-arg MODEL_ID=..., none is MODEL_ID=, a gated one needs
# --secret id=hf_token,src=FILE.
# Only what fetching needs is copied, so that an edit elsewhere does not download it again.
ARG MODEL_ID=CompVis/stable-diffusion-v1-4
ARG MODEL_REVISION=
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/fetch_model.py builder/
COPY src/__init__.py src/errors.py src/settings.py src/
COPY src/model/__init__.py src/model/cuda_driver.py src/model/repository.py src/model/
RUN --mount=type=cache,target=/tmp/huggingface --mount=type=secret,id=hf_token \
    [ -z "$MODEL_ID" ] \
    || HF_HOME=/tmp/huggingface HF_TOKEN_PATH=/run/secrets/hf_token PYTHONDONTWRITEBYTECODE=1 \
    python -m builder.fetch_model --model "$MODEL_ID" --revision "$MODEL_REVISION" --output /model

# Which files a start opens is recorded, for a start to read them ahead.
COPY handler.py test_input.json ./
COPY builder/record_start.py builder/
COPY src src
RUN python -m compileall -q --invalidation-mode unchecked-hash . \
    && python -m builder.record_start --output src/start_files.txt \
    && echo "worker:x:1000:1000::/app:/usr/sbin/nologin" >> /etc/passwd \
    && chown 1000:1000 .
USER 1000:1000

# The model is here, or in RunPod's cache: the worker needs no network but RunPod's.
ENV HOME=/app MODEL_ID=${MODEL_ID:+/model} HF_HUB_OFFLINE=1
CMD ["python", "handler.py"]

ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Stable Diffusion worker for RunPod Serverless" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="MIT AND LicenseRef-CreativeML-Open-RAIL-M"
