# A service around one model:
#   docker build -t model .
#   docker run -p 8000:8000 -e API_KEY=… -v ./runs/x:/model:ro model
#   docker run … -v log:/log model --checkpoint /model/best.pt --log /log/requests.db
# The first stage installs; the second keeps only the installed packages: no pip cache, no compilers, no tests.

FROM python:3.11-slim AS installed
# PyTorch's own index has CPU builds of a few hundred megabytes; the default index brings CUDA, several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements-serve.txt .
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --no-compile --extra-index-url "$TORCH_INDEX" \
       "$(grep ^torch== requirements-serve.txt)+cpu" -r requirements-serve.txt \
    && cd /venv/lib/python3.11/site-packages \
    && rm -rf torch/include torch/test pandas/tests pyarrow/include pyarrow/tests numpy/*/tests

FROM python:3.11-slim
COPY --from=installed /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY errors.py config.py model.py task.py pipeline.py predict.py serve.py ./
COPY sources sources
COPY preprocessing preprocessing
COPY backbones backbones
COPY evaluation evaluation
COPY serving serving
RUN install -d -o nobody /log
USER nobody
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=30s --interval=30s --timeout=3s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
CMD ["--checkpoint", "/model/best.pt"]
