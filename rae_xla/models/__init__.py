"""What is computed: plain torch modules."""
