# The command line in a container: `docker build -t pekasc .`, then
# `docker run --rm -v "$PWD:/work" pekasc predict --list slides.txt --adapter adapter --out predicted`
# Built by a hosted job (.github/workflows/hosted.yaml).
FROM python:3.13-slim

LABEL org.opencontainers.image.title="pekasc" \
      org.opencontainers.image.licenses="BSD-3-Clause"

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN python -m pip install --no-cache-dir "/src[io,slides]" && rm -rf /src

# Docker's --user and Apptainer run it as a user without a home: what libraries keep for later goes where anybody may
# write. Mount a folder at /cache to keep downloaded weights.
ENV HOME=/tmp \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache /work
WORKDIR /work
USER 1000
ENTRYPOINT ["pekasc"]
CMD ["--help"]
