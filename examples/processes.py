"""Curvature by several processes: ``torchrun --nproc-per-node 2 examples/processes.py``.

Each process has a share of the data; all of them get the same matrices, those of all data.
"""

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from curvops import EKFACLinearOperator, GGNLinearOperator, share_of


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" for GPUs, after torch.cuda.set_device(local rank)
    group = dist.group.WORLD

    # the same model in each process: from a seed, a checkpoint, or broadcast from one
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    params = dict(model.named_parameters())
    dataset = TensorDataset(torch.randn(1001, 16), torch.randint(4, (1001,)))

    # no datum twice and none left out; shares need not be equal, and may be empty
    loader = DataLoader(share_of(dataset, group), batch_size=128)
    problem = model, torch.nn.CrossEntropyLoss(), params, loader

    ggn = GGNLinearOperator(*problem, process_group=group)
    with ggn.linearized():
        top = ggn.eigenpairs(3).values
    ekfac = EKFACLinearOperator(*problem, process_group=group)
    step = ekfac.inverse(damping=1e-2) @ ggn.risk.gradient()

    if dist.get_rank() == 0:
        print("largest eigenvalues of the GGN:", top.tolist())
        print("norm of a natural-gradient step:", float(torch.cat([part.flatten() for part in step]).norm()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
