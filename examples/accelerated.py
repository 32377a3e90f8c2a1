"""The same within Accelerate's training script: ``accelerate launch --num_processes 2 examples/accelerated.py``.

Its ``prepare`` gives each process other batches, and repeats some data so that all have equally many; for curvature each
datum must come once, so that the data are shared by `curvops.share_of` instead.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from curvops import HessianLinearOperator, share_of


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    dataset = TensorDataset(torch.randn(501, 16), torch.randint(4, (501,)))
    loss = torch.nn.CrossEntropyLoss()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_size=32))
    for X, y in loader:
        optimizer.zero_grad()
        accelerator.backward(loss(prepared(X), y))
        optimizer.step()

    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    own = DataLoader(share_of(dataset, group), batch_size=64) if group else DataLoader(dataset, batch_size=64)
    plain = accelerator.unwrap_model(prepared)
    hessian = HessianLinearOperator(plain, loss, dict(plain.named_parameters()), own, process_group=group)
    trace = hessian.trace(num_products=64)
    accelerator.print(f"trace of the Hessian: {float(trace):.2f} ± {float(trace.standard_error):.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
