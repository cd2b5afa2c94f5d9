"""Samples in every shape: Arrow, Parquet, JSON (`samples`), and as each trainer takes them (`trainers`)."""

from tokentape.export.dataset import export_dataset, read_dataset, read_manifest
from tokentape.export.files import FileSamples, read_exported, write_rows
from tokentape.export.row import Row, read_rows
from tokentape.export.samples import samples, stored_samples, to_arrow_stream, to_json_rows, write_parquet
from tokentape.export.trainers import TRAINERS, Trainer

__all__ = [
    "TRAINERS",
    "FileSamples",
    "Row",
    "Trainer",
    "export_dataset",
    "read_dataset",
    "read_exported",
    "read_manifest",
    "read_rows",
    "samples",
    "stored_samples",
    "to_arrow_stream",
    "to_json_rows",
    "write_parquet",
    "write_rows",
]
