# docker build -t clipdistill .                             training and everything else, with CUDA's torch
# docker build --build-arg PIP_ARGUMENTS="..." -t clipdistill .   e.g. the index of torch's builds for CPUs alone
# docker run --gpus all -v "$PWD:/work" clipdistill train --recipe clip-rd --data captions.json ... --out runs/first
# docker build --target serve -t clipdistill-serve . && docker run -p 127.0.0.1:8000:8000 -v "$PWD/export:/model:ro" clipdistill-serve
FROM python:3.12-slim AS serve
ARG PIP_ARGUMENTS=""
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir ${PIP_ARGUMENTS} "/source[serve,export,openvino]" && useradd clipdistill
USER clipdistill
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["clipdistill", "serve"]
CMD ["/model", "--host", "0.0.0.0"]

FROM python:3.12-slim
ARG PIP_ARGUMENTS=""
ARG EXTRAS="export,openvino,search,tensorboard"
# a compiler, for torch.compile
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir ${PIP_ARGUMENTS} "/source[${EXTRAS}]"
RUN useradd --create-home clipdistill && mkdir /work && chown clipdistill /work
USER clipdistill
WORKDIR /work
ENTRYPOINT ["clipdistill"]
CMD ["doctor"]
