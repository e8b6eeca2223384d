"""The report that pseudo labels are judged by."""
