"""Parts of `data_loading.py`: formats, readers, report."""
