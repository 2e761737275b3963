"""A regular package, or one of the same name that a dependency installs would be found instead."""
