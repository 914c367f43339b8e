"""Runs scripts one after another in one process: torchrun tests/run_many.py '[["x.py", "--a=1"]]'.
The ranks start once for many checks; what a script leaves behind (process group) must be gone."""

import json
import os
import runpy
import sys

import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
init_process_group = dist.init_process_group
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def init_apart(backend, device_id=None):
    # a second group would wait on the keys that the first left in the launcher's store
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    init_process_group(backend, store=dist.PrefixStore(str(run), store), **ranks)


dist.init_process_group = init_apart
run = 0
for argv in json.loads(sys.argv[1]):
    run, sys.argv = run + 1, argv
    runpy.run_path(argv[0], run_name="__main__")
