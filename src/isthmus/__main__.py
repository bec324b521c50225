"""`python -m isthmus`: the command line."""

import sys

from isthmus.cli.main import main

sys.exit(main())
