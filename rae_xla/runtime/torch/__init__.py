"""The torch backend: one device, or several with FSDP2 and DDP."""
