"""The rows of a CSV file, as mappings."""

from __future__ import annotations

import csv


def csv_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
