"""The real host, for which an engine hangs after a few seconds: `python host_impatient.py SITE SECONDS`."""

import sys

from mansard.serving.engine import metrics as engine_metrics
from mansard.serving.host import host

if __name__ == "__main__":
    site, seconds = sys.argv[1:]
    engine_metrics.HUNG_SECONDS = float(seconds)
    sys.exit(host.main(["--site", site]))
