"""`python -m stages.lineage`."""

import sys

from stages.lineage.graph import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
