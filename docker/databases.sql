-- Beside POSTGRES_DB (mlflow): run once, when the cluster is made.
CREATE DATABASE mlflow_auth;
CREATE DATABASE prefect;
