"""The ranks of harness.run_ranks: torchrun tests/run_many.py FOLDER PID. They start once, and take
job after job from FOLDER, <n>.json with [ranks, [["x.py", "--a=1"], ...]], as long as process PID
lives. The scripts run one after another in this process; what a script leaves behind (process
group) must be gone."""

import itertools
import json
import os
import runpy
import sys
import time

import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
init_process_group, rank = dist.init_process_group, int(os.environ["RANK"])
folder, parent = sys.argv[1:]
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def init_apart(backend, device_id=None):
    # a second group would wait on the keys that the first left in the launcher's store
    apart = dist.PrefixStore(f"{job}/{run}", store)
    init_process_group(backend, store=apart, rank=rank, world_size=ranks)


dist.init_process_group = init_apart
for job in itertools.count():
    while not os.path.exists(path := f"{folder}/{job}.json"):
        os.kill(int(parent), 0)  # raises when it is gone
        time.sleep(0.02)
    with open(path) as f:
        (ranks, argvs), run = json.load(f), 0  # counted within a job: not all ranks are in each
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    for argv in argvs if rank < ranks else []:
        run, sys.argv = run + 1, argv
        runpy.run_path(argv[0], run_name="__main__")
    sys.stdout.flush()
    open(f"{folder}/{job}.done{rank}", "w").close()
