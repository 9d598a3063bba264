-- Run once by the superuser, when the cluster is made: MLflow and Prefect each own their databases, and no other role
-- connects to them. psql reads the passwords.
\set mlflow `cat /run/secrets/postgres_mlflow`
\set prefect `cat /run/secrets/postgres_prefect`
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
REVOKE CONNECT, TEMPORARY ON DATABASE mlflow, mlflow_auth, prefect, postgres, template1 FROM PUBLIC;
