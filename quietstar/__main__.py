"""``python -m quietstar`` is the console command."""

import sys

from quietstar.cli import main

sys.exit(main())
