"""An editor for tests: adds a word to the file that it is given."""

import sys
from pathlib import Path

path = Path(sys.argv[-1])
path.write_text(f"{path.read_text().rstrip()}, edited\n")
