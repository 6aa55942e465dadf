"""``python -m quietstar`` is the console command."""

import sys

from quietstar.cli.main import main

sys.exit(main())
