"""Files are what safetensors' own reader takes them for."""

import torch
from safetensors.torch import load_file

from curvops.files import read_tensors, write_tensors

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


def test_safetensors_reads_what_is_written(tmp_path):
    made = (torch.arange(15.0).view(3, 5) - 4).square()
    tensors = {str(dtype): made.to(dtype) for dtype in DTYPES}
    tensors |= {"number": torch.tensor(3.5), "none": torch.zeros(0, 3), "turned": made.T, "part": made[1:, 2:4]}
    write_tensors(tmp_path / "file", tensors, {"ü": [1, "a"]}, "test")
    found, about = read_tensors(tmp_path / "file", "test")
    assert about["ü"] == [1, "a"] and list(tmp_path.iterdir()) == [tmp_path / "file"]
    for others in (found, load_file(tmp_path / "file")):
        assert others.keys() == tensors.keys()
        assert all(torch.equal(others[n], t) and others[n].dtype == t.dtype for n, t in tensors.items())
