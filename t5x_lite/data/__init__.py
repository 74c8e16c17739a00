"""The data room: files to records, records to tokens, tokens to batches. It knows no model and no configuration."""
