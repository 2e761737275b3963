"""``python -m rae_xla`` is ``rae-xla``."""

from rae_xla.cli.main import main

raise SystemExit(main())
