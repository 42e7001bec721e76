"""The command of a checkout; an installed package has the same under the name `vqdm`.

python run.py +experiment=demo              # the table of the README
python run.py +experiment=tiny_vq3          # one row of it
python run.py table=table1_tiny             # a table of experiments/: what is missing is run
python run.py table=table1_tiny row=table1_tiny_fp   # one row of it, as a job of its own
python run.py +experiment=sdxl_vq3 plan=true
python run.py --help, list=experiments|tables|runs          # what there is
python run.py --multirun +experiment=tiny_codec quantize=gptq quantize.bits=2,3,4   # jobs: conf/hydra/launcher
"""

import importlib.util
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"vqdm needs Python 3.11, 3.12 or 3.13; this is {sys.version.split()[0]}. Make the environment with one.")
if importlib.util.find_spec("hydra") is None:
    sys.exit("error: the packages are not installed here; run `sh scripts/setup.sh`, then `.venv/bin/python run.py …`")

from vqdm.__main__ import main

if __name__ == "__main__":
    main()
