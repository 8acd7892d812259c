# scconv-deploy on the CPU: docker build . -t scconv-deploy:latest && docker run --rm -v "$PWD:/work" scconv-deploy doctor
FROM python:3.11-slim

COPY . /opt/scconv-deploy
# the CPU build of the pinned torch; pip's default on Linux is the CUDA build of several gigabytes
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' /opt/scconv-deploy/constraints.txt)" \
    && pip install --no-cache-dir --constraint /opt/scconv-deploy/constraints.txt "/opt/scconv-deploy[data]" \
    && rm -r /opt/scconv-deploy

WORKDIR /work
ENTRYPOINT ["scconv-deploy"]
