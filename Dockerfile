FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1
WORKDIR /app

# the layer that changes least and weighs most
COPY requirements.txt builder/constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt

# the model in float16; only what fetching needs is copied, so that an edit elsewhere does not download it again
ARG MODEL_ID=CompVis/stable-diffusion-v1-4
ARG MODEL_REVISION=133a221b8aa7292a167afc5127cb63fb5005638b
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/fetch_model.py builder/
COPY src/__init__.py src/settings.py src/weights.py src/
RUN HF_HOME=/tmp/huggingface python -m builder.fetch_model \
        --model "$MODEL_ID" --revision "$MODEL_REVISION" --output /model \
    && rm -rf /tmp/huggingface

COPY handler.py test_input.json ./
COPY src src

RUN useradd --create-home worker && chown worker .
USER worker

# the worker needs no network but RunPod's, and its log no more than INFO: at DEBUG the SDK prints every picture
ENV MODEL_ID=/model HF_HUB_OFFLINE=1 RUNPOD_LOG_LEVEL=INFO
CMD ["python", "handler.py"]
