"""Files are what safetensors' own reader takes them for."""

import errno
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import curvops
from curvops.files import read_about, read_tensors, replace_atomically, write_tensors
from curvops.tour import load_coarse, load_matrices, save_coarse, save_matrices
from curvops.tour.coarse_files import CoarseFile

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


def flipped(path):
    """A file with one bit changed in each of its tensors, one after the other: the tensor's name, and the file's bytes."""
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for name, entry in json.loads(whole[8:start]).items():
        if name != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]:
            changed = bytearray(whole)
            changed[start + entry["data_offsets"][0]] ^= 1
            yield name, bytes(changed)


def problem():
    model = torch.nn.Linear(3, 2).double()
    data = [(torch.rand(4, 3).double(), torch.randint(2, (4,))) for _ in range(4)]
    return model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def kinds(path):
    """By kind of file how one is written, and how it is read."""
    own, checkpoint = problem(), curvops.Checkpoint(path, every=1)
    hessian = curvops.HessianLinearOperator(*own)
    kfac = curvops.EKFACLinearOperator(*own)
    made = {
        operator.__name__: lambda operator=operator: operator(*own, checkpoint=checkpoint)
        for operator in (curvops.KFACLinearOperator, curvops.EKFACLinearOperator, curvops.KFOCLinearOperator)
    }
    made["trace"] = lambda: hessian.trace(num_products=6, checkpoint=checkpoint)
    made["norm"] = lambda: hessian.frobenius_norm(num_products=4, checkpoint=checkpoint)
    made["eigenpairs"] = lambda: hessian.eigenpairs(2, checkpoint=checkpoint)
    made["density"] = lambda: hessian.spectral_density(depth=3, num_vectors=2, checkpoint=checkpoint)
    found = {name: (function, function) for name, function in made.items()}
    found["save"] = (lambda: kfac.save(path), lambda: curvops.load(path, own[2]))
    found["matrices"] = (lambda: save_matrices(path, {"Hessian": torch.rand(2, 2)}), lambda: load_matrices(path))
    found["coarse"] = (lambda: save_coarse(path, CoarseFile(norms={"H": torch.rand(1, 1)})), lambda: load_coarse(path))
    return found


def test_a_flipped_bit_is_seen_in_each_tensor_of_each_kind_of_file(tmp_path):
    path = tmp_path / "file"
    for kind, (write, read) in kinds(path).items():
        path.unlink(missing_ok=True)
        write()
        whole = path.read_bytes()
        names = []
        for name, changed in flipped(path):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"is damaged or was edited: .* Remove the file, or write it anew\."):
                read()
            names.append(name)
        assert names, kind
        path.write_bytes(whole)
        read()


def test_a_flipped_bit_is_seen_in_what_is_known_about_tensors(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2), "b": torch.ones(2)}, {"count": 12}, "test")
    whole = path.read_bytes()
    for written, other in (
        (b'count\\": 12', b'count\\": 13'),
        (b'\\"sha256\\"', b'\\"sha257\\"'),
        (b'\\"sha256 of tensors\\"', b'\\"sha256 of tensort\\"'),
        (b'"b":{', b'"c":{'),
        (b'"F32"', b'"I32"'),
    ):
        assert written in whole
        path.write_bytes(whole.replace(written, other, 1))
        with pytest.raises(ValueError, match="is damaged or was edited"):
            read_tensors(path, "test")
    path.write_bytes(whole.replace(b'count\\": 12', b'count\\": 13'))
    with pytest.raises(ValueError, match="'what is known about its tensors' is not what was written"):
        read_about(path, "test")


def test_files_of_before_have_no_hashes_and_are_read(tmp_path):
    path = tmp_path / "file"
    save_file({"a": torch.ones(2)}, path, metadata={"curvops": json.dumps({"format": "test", "known": 1})})
    tensors, about = read_tensors(path, "test")
    assert tensors["a"].tolist() == [1, 1] and about == {"format": "test", "known": 1}


def test_another_librarys_edit_is_seen(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2)}, {}, "test")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"a": torch.ones(2) * 2}, path, metadata=metadata)
    with pytest.raises(ValueError, match="'a' is not what was written"):
        read_tensors(path, "test")


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    path = tmp_path / "file"
    path.write_text("before", encoding="utf-8")
    for given in ((errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied", "the partial file")):

        def write(partial, given=given):
            partial.write_bytes(b"begun")
            raise OSError(*given[:2], *[str(partial)] * (len(given) == 3))

        with pytest.raises(OSError, match=given[1]) as caught:
            replace_atomically(path, write)
        assert caught.value.filename == str(path) and caught.value.errno == given[0]
    assert path.read_text(encoding="utf-8") == "before" and list(tmp_path.iterdir()) == [path]
