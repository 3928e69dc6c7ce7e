# PrefixCap on a CPU. The build runs the demo, and fails where the demo fails.
#
#   docker build --tag prefixcap .
#   docker run --rm prefixcap train.py -h
#   docker run --rm --volume "$PWD:/files" prefixcap predict.py --checkpoint /files/coco_prefix-009.pt /files/photo.jpg

FROM python:3.11-bookworm

# Java is for METEOR and SPICE.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends default-jre-headless \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1

WORKDIR /prefixcap

# The packages come first, so that a change of the code does not install them again.
COPY Makefile requirements.txt ./
COPY .ci/install.py .ci/install.py
RUN make setup

COPY . .
RUN make demo

ENV PATH=/prefixcap/.venv/bin:$PATH
ENTRYPOINT ["python"]
CMD ["predict.py", "-h"]
