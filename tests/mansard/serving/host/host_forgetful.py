"""A host that keeps a prepared process for no time at all: `python host_forgetful.py SITE`."""

import sys

from mansard.serving.host import engines, host

engines.PREPARED_SECONDS = 0.0

if __name__ == "__main__":
    sys.exit(host.main(["--site", sys.argv[1]]))
