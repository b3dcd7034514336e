"""`python -m stages.tracking`."""

import sys

from stages.tracking.tracker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
