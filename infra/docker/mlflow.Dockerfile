# The MLflow server with its basic-auth application. Build from the repository root:
#   docker build -f infra/docker/mlflow.Dockerfile -t aai-mlflow:0.1.0 .
FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt 'mlflow[auth]' boto3 psycopg2-binary \
    && useradd --uid 1000 --create-home mlflow
COPY infra/docker/basic_auth.ini /etc/mlflow/basic_auth.ini
ENV MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic_auth.ini
USER 1000
WORKDIR /data
CMD ["mlflow", "server", "--help"]
