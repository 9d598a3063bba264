"""Parts of Secateur that are installed as extras: which one brings a package that is missing.

Imports next to nothing: the command line asks it before it has a command line.
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur.device_profiles.wording import command

PARTS: Mapping[str, tuple[str, ...]] = {
    "export": ("onnx", "onnxruntime", "onnxscript", "scipy"),
    "pipeline": (
        *(
            "asyncssh",
            "fastapi",
            "huggingface_hub",
            "jinja2",
            "jsonschema",
            "mlflow",
            "optuna",
            "pandas",
            "PIL",
            "prefect",
            "psutil",
        ),
        *("pyarrow", "pymoo", "rich", "sklearn", "sqlalchemy", "torchvision", "typer"),
    ),
    "detection": ("faster_coco_eval",),
    "timm": ("timm",),
    "openvino": ("openvino",),
    "ncnn": ("ncnn", "pnnx"),
    "postgres": ("psycopg2",),
    "dask": ("distributed", "prefect_dask"),
    "ray": ("prefect_ray", "ray"),
}
"""Extra of pyproject.toml -> the packages it brings, as they are imported."""
EXTRA_OF = {package: extra for extra, packages in PARTS.items() for package in packages}


def missing(error: BaseException) -> str | None:
    """What to install, where an import failed for want of a part; None = it failed for another reason."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in EXTRA_OF:
        return None
    install = command("pip", "install", f"secateur[{EXTRA_OF[error.name]}]")
    return f"this needs {error.name}, a part that is not installed; run: {install}"
