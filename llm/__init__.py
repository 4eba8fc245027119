"""The model in plain torch: nothing here imports Ray."""
