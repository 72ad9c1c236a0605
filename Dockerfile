# One stage: no compiler is needed, and what must not stay (downloads, caches, a token) is never in a layer to begin with.
# The layers stand in the order of how seldom they change: packages, model, code.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1
WORKDIR /app

# PyTorch brings triton, which compiles kernels that nothing here asks for: 0.7 GB.
# Bytecode is made here, for Python's own library too, since the worker's user cannot write it, and is not checked against
# the times of the sources, which a reproducible build sets: what pip left of the other kind is made again (-f). One file
# of PyTorch's is for newer Pythons.
COPY requirements.txt builder/constraints.txt ./
RUN pip install --no-cache-dir --no-compile -r requirements.txt -c constraints.txt \
    && pip uninstall --yes triton \
    && find /usr/local/lib/python3.11 -type d -name tests -prune -exec rm -r {} + \
    && python -m compileall -qf -j 0 -x py312_intrinsics --invalidation-mode unchecked-hash /usr/local/lib/python3.11

# The model in float16: another one is --build-arg MODEL_ID=..., a gated one --secret id=hf_token,src=FILE.
# Only what fetching needs is copied, so that an edit elsewhere does not download it again.
ARG MODEL_ID=CompVis/stable-diffusion-v1-4
ARG MODEL_REVISION=
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/fetch_model.py builder/
COPY src/__init__.py src/settings.py src/weights.py src/
RUN --mount=type=cache,target=/tmp/huggingface --mount=type=secret,id=hf_token \
    HF_HOME=/tmp/huggingface HF_TOKEN_PATH=/run/secrets/hf_token PYTHONDONTWRITEBYTECODE=1 \
    python -m builder.fetch_model --model "$MODEL_ID" --revision "$MODEL_REVISION" --output /model

COPY handler.py test_input.json ./
COPY src src
RUN python -m compileall -q --invalidation-mode unchecked-hash . \
    && echo "worker:x:1000:1000::/app:/usr/sbin/nologin" >> /etc/passwd \
    && chown 1000:1000 .
USER 1000:1000

# the model is here: the worker needs no network but RunPod's
ENV HOME=/app MODEL_ID=/model HF_HUB_OFFLINE=1
CMD ["python", "handler.py"]

ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Stable Diffusion worker for RunPod Serverless" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="MIT AND LicenseRef-CreativeML-Open-RAIL-M"
