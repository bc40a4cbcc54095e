import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything is tested on the CPU, where results are the same bit for bit

sys.path.insert(0, str(Path(__file__).parent.parent))
