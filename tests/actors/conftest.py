import sys
from pathlib import Path

# For `tests.actors.controlled_expert`, which Ray's workers import too: they search the folder that pytest runs in.
sys.path.append(str(Path(__file__).parents[2]))
