"""``python -m taskoffer``."""

import sys

from taskoffer.cli.main import main

sys.exit(main())
