"""A page in the browser that generates images (``rae-xla serve``)."""
