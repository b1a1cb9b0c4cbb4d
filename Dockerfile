# A service around one model:
#   docker build -t model .
#   docker run -p 8000:8000 -e API_KEY=… -v ./runs/x:/model:ro model
#   docker run … -v log:/log model --checkpoint /model/best.pt --log /log/requests.db
# For a model of texts from Hugging Face: docker build --build-arg EXTRAS=transformers -t model .
# Another port: docker run -p 9000:9000 -e PORT=9000 …, or --port 9000 after the checkpoint; the health check follows.
# The first stage installs; the second keeps only the installed packages: no pip cache, no compilers, no tests.
# For a build that can be repeated, give the base image by its digest: --build-arg BASE=python:3.11-slim@sha256:…
# (`docker buildx imagetools inspect python:3.11-slim` prints it; it changes with every security update).

ARG BASE=python:3.11-slim
FROM ${BASE} AS installed
# PyTorch's own index has CPU builds of a few hundred megabytes; the default index brings CUDA, several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# More packages, such as transformers.
ARG EXTRAS=""
COPY requirements-serve.txt requirements-serve.lock ./
# All packages by hash, and torch alone from its own index.
RUN python -m venv --without-pip /venv \
    && install="pip --python /venv/bin/python install --no-cache-dir --no-compile" \
    && $install --no-deps --require-hashes -r requirements-serve.lock \
    && $install --no-deps --index-url "$TORCH_INDEX" "$(grep ^torch== requirements-serve.txt)+cpu" \
    && if [ -n "$EXTRAS" ]; then $install -r requirements-serve.txt $EXTRAS; fi \
    && cd /venv/lib/python3.11/site-packages \
    && rm -rf torch/include torch/test pandas/tests pyarrow/include pyarrow/tests numpy/*/tests

FROM ${BASE}
COPY --from=installed /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY errors.py console.py config.py model.py task.py pipeline.py predict.py serve.py ./
COPY scaling scaling
COPY sources sources
COPY preprocessing preprocessing
COPY backbones backbones
COPY evaluation evaluation
COPY serving serving
RUN install -d -o nobody /log
USER nobody
ENV PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
# The port is the last one that the service (process 1) was started with.
HEALTHCHECK --start-period=30s --interval=30s --timeout=3s \
    CMD ["python", "-c", "import re, urllib.request; port = re.findall('--port.([0-9]+)', open('/proc/1/cmdline').read())[-1]; urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2)"]
ENTRYPOINT ["sh", "-c", "exec python serve.py --host 0.0.0.0 --port \"$PORT\" \"$@\"", "serve"]
CMD ["--checkpoint", "/model/best.pt"]
