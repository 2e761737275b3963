"""One page that shows how runs went, from what they left in their results folders."""
